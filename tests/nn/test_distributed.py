"""Two processes, each with its share of the batch, against one process with all of it (gloo, fp64, CPU)."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import fastres.nn as ours
from fastres import ops

SHARES = ((0, 4), (4, 6))  # uneven on purpose


def _model():
    torch.manual_seed(0)
    return ours.ResNet(ours.Bottleneck, [1, 1], num_classes=5).double()


def _batch():
    torch.manual_seed(1)
    return torch.randn(6, 3, 24, 20, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])


def _close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def _gradients(model):
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def sync_batch_norm_equals_one_process(rank, share):
    x, target = _batch()
    whole = _model()
    F.cross_entropy(whole(x), target, reduction="sum").backward()
    # PyTorch's DDP refuses SyncBatchNorm on a CPU, so the gradients are summed here.
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(_model())
    F.cross_entropy(synced(x[share]), target[share], reduction="sum").backward()
    for p in synced.parameters():
        dist.all_reduce(p.grad)
    _close(_gradients(synced), _gradients(whole))
    _close(dict(synced.named_buffers()), dict(whole.named_buffers()))


def a_compiled_layer_synchronises_in_one_graph(rank, share):
    x, _ = _batch()
    whole = ours.BNAct(3).double()
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(whole))
    mine, every = (t.clone().requires_grad_() for t in (x[share], x))
    compiled = torch.compile(synced, fullgraph=True, backend="aot_eager")
    got, want = compiled(mine), whole(every)
    got.square().sum().backward()
    want.square().sum().backward()
    _close((got, mine.grad, synced.bn.running_var), (want[share], every.grad[share], whole.bn.running_var))


def ordinary_batch_norm_keeps_its_own_statistics(rank, share):
    x, target = _batch()
    model = DDP(_model(), broadcast_buffers=False)
    F.cross_entropy(model(x[share]), target[share]).backward()
    shards = [copy.deepcopy(_model()) for _ in SHARES]
    for shard, bounds in zip(shards, SHARES, strict=True):
        F.cross_entropy(shard(x[slice(*bounds)]), target[slice(*bounds)]).backward()
    first, second = (_gradients(shard) for shard in shards)
    _close(_gradients(model), {name: (first[name] + second[name]) / 2 for name in first})
    _close(dict(model.module.named_buffers()), dict(shards[rank].named_buffers()))


def a_process_without_samples_takes_part(rank, share):
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weight = torch.ones(3, dtype=torch.float64)
    mine = (x if rank == 0 else x[:0]).clone().requires_grad_()
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    out = ops.bn_act(mine, mean, var, weight, training=True, group=dist.group.WORLD)
    out.square().sum().backward()
    whole = x.clone().requires_grad_()
    mean1, var1 = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    expected = ops.bn_act(whole, mean1, var1, weight, training=True)
    expected.square().sum().backward()
    _close((mean, var), (mean1, var1))
    if rank == 0:
        _close((out, mine.grad), (expected, whole.grad))
    else:
        assert out.shape == (0, 3, 5, 5) and mine.grad.shape == (0, 3, 5, 5)


def one_value_a_channel_is_enough_together(rank, share):
    x = torch.tensor([[1.0], [3.0]]).double()
    mean, var = torch.zeros(1).double(), torch.ones(1).double()
    ops.bn_act(x[rank : rank + 1], mean, var, training=True, momentum=1.0, group=dist.group.WORLD)
    _close((mean, var), (torch.tensor([2.0]).double(), torch.tensor([2.0]).double()))


CHECKS = (
    sync_batch_norm_equals_one_process,
    a_compiled_layer_synchronises_in_one_graph,
    ordinary_batch_norm_keeps_its_own_statistics,
    a_process_without_samples_takes_part,
    one_value_a_channel_is_enough_together,
)


def _worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        share = slice(*SHARES[rank])
        for check in CHECKS:
            check(rank, share)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")
def test_two_processes_train_as_one(tmp_path):
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
