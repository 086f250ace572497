"""Accelerated models of other libraries in train(): fused ops wherever they fit, and PyTorch's tools around them."""

import copy
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import fastres
from fastres import ops


def small():
    torch.manual_seed(0)
    return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=5)


def step(model, x, run=None):
    """Loss, gradients and buffers of one training step."""
    model.train().zero_grad()
    loss = nn.functional.cross_entropy(
        (model if run is None else run)(x), torch.arange(len(x), device=x.device) % 5
    )
    loss.backward()
    return [loss.detach(), [p.grad.clone() for p in model.parameters()], [b.clone() for b in model.buffers()]]


def pair():
    """An accelerated network and an equal one that is not, and images, all fp64."""
    model = small().double()
    return fastres.accelerate(copy.deepcopy(model)), model, torch.randn(4, 3, 32, 32, dtype=torch.float64)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


def count_bn_act(monkeypatch):
    """What runs of bn_act: (training, with a residual, activation) to how often."""
    seen, real = Counter(), ops.bn_act

    def counting(x, *args, residual=None, act="relu", **keywords):
        seen[(args[4], residual is not None, str(act))] += 1
        return real(x, *args, residual=residual, act=act, **keywords)

    monkeypatch.setattr(ops, "bn_act", counting)
    return seen


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_every_bn_of_a_resnet50_is_fused(library, monkeypatch):
    if library == "timm":
        model = pytest.importorskip("timm").create_model("resnet50", num_classes=5)
    else:
        model = torchvision.models.resnet50(num_classes=5)
    before = {name: (p, p._version) for name, p in model.named_parameters()}
    fast = fastres.accelerate(model).train()
    seen = count_bn_act(monkeypatch)
    fast(torch.randn(2, 3, 32, 32)).sum().backward()
    # 33 BN + ReLU, 16 ends of blocks with the residual added, 4 projections.
    assert seen == {(True, False, "relu"): 33, (True, True, "relu"): 16, (True, False, "identity"): 4}
    after = dict(fast.named_parameters())
    assert all(after[name] is p and p._version == version for name, (p, version) in before.items())
    assert all(p.grad is not None for p in after.values())


def test_a_step_equals_the_original():
    fast, model, x = pair()
    close(step(fast, x), step(model, x))


def test_a_checkpointed_step_equals_the_original():
    fast, model, x = pair()
    runs = [lambda t, net=net: checkpoint(net, t, use_reentrant=False) for net in (fast, model)]
    close(step(fast, x, runs[0]), step(model, x, runs[1]))


def test_autocast_and_grad_scaler_learn_as_eager_does():
    model = small()
    x, target, losses = torch.randn(8, 3, 32, 32), torch.arange(8) % 5, []
    for net in (fastres.accelerate(copy.deepcopy(model)).train(), model.train()):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        losses.append([])
        for _ in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(net(x).float(), target)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(losses[0], losses[1], rtol=0.1, atol=0.05)


def test_compiled_in_one_graph_equals_the_original():
    torch._dynamo.reset()
    fast, model, x = pair()
    close(step(fast, x, torch.compile(fast, fullgraph=True, backend="aot_eager")), step(model, x))


def test_an_ema_copy_follows():
    fast, model, x = pair()
    averaged = AveragedModel(fast, use_buffers=True)
    averaged.update_parameters(fast)
    with torch.no_grad():
        close(averaged.module.eval()(x), model.eval()(x))
    assert isinstance(averaged.module, type(fast))
    step(fast, x)
    assert averaged.module.conv1.weight.grad is None


def test_ddp_of_one_process_equals_the_original(tmp_path):
    fast, model, x = pair()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        close(step(fast, x, DDP(fast)), step(model, x))
    finally:
        dist.destroy_process_group()
