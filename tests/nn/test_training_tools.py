"""What surrounds a training loop: memory, autocast, GradScaler, checkpointing, EMA, fused optimizers."""

import copy
import itertools

import pytest
import torch
import torchvision
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import fastres.nn as ours


def _models():
    """fastres's and torchvision's network of one stage more than resnet11, same weights."""
    torch.manual_seed(0)
    reference = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=5)
    fast = ours.ResNet(ours.Bottleneck, [1, 1, 1, 1], num_classes=5)
    fast.load_state_dict(reference.state_dict())
    return fast, reference


def _saved_bytes(model, x):
    """Bytes of distinct memory that one forward keeps for backward, parameters aside."""
    kept, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = model(x)
    return sum(kept.values()), out


@pytest.mark.parametrize("training", [True, False])
def test_a_step_keeps_no_more_than_eager(training):
    fast, reference = _models()
    x = torch.randn(8, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    ours_bytes, out = _saved_bytes(fast.train(training), x)
    theirs_bytes, other = _saved_bytes(reference.train(training), x)
    assert out.requires_grad and other.requires_grad
    # Frozen BN keeps neither the convolutions' outputs nor the normalised ones.
    assert ours_bytes <= (1.0 if training else 0.7) * theirs_bytes, (ours_bytes, theirs_bytes)


def _small_models():
    """One block of fastres and of torchvision in a tiny network, same weights."""
    made = []
    for block in (ours.BasicBlock, torchvision.models.resnet.BasicBlock):
        torch.manual_seed(0)
        stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        made.append(nn.Sequential(stem, block(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)))
    return made


def _finite_step(model, optimizer, x, target, scaler, dtype):
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype):
        out = model(x)
        loss = nn.functional.cross_entropy(out.float(), target)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.item(), out.dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_autocast_with_a_grad_scaler_learns_as_eager_does(dtype, training):
    x, target = torch.randn(8, 3, 16, 16), torch.arange(8) % 5
    losses = []
    for model in _small_models():
        model.train(training)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0, enabled=dtype == torch.float16)
        history = [_finite_step(model, optimizer, x, target, scaler, dtype) for _ in range(4)]
        assert all(kind == dtype for _, kind in history)
        losses.append([loss for loss, _ in history])
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(losses[0], losses[1], rtol=0.1, atol=0.05)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_give_the_same_gradients(reentrant):
    block = ours.Bottleneck(32, 8).double()
    x = torch.randn(4, 32, 6, 6, dtype=torch.float64)
    gradients = []
    for run in (block, lambda t: checkpoint(block, t, use_reentrant=reentrant)):
        block.zero_grad()
        t = x.clone().requires_grad_()
        run(t).square().sum().backward()
        gradients.append([t.grad, *(p.grad.clone() for p in block.parameters())])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(
    ("optimizer", "arguments"), [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})]
)
def test_fused_optimizers_take_the_same_steps(optimizer, arguments):
    x, target = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.arange(4)
    fast = ours.resnet11(num_classes=5).double()
    models = [fast, copy.deepcopy(fast)]
    for model, fused in zip(models, (True, False), strict=True):
        steps = optimizer(model.parameters(), lr=0.01, fused=fused, **arguments)
        for _ in range(2):
            steps.zero_grad()
            nn.functional.cross_entropy(model(x), target).backward()
            steps.step()
    torch.testing.assert_close(*(model.state_dict() for model in models), rtol=1e-7, atol=1e-8)


def test_an_ema_copy_follows_and_predicts():
    model = ours.resnet11(num_classes=5)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    ema.update_parameters(model)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    ema.update_parameters(model)
    torch.testing.assert_close(ema.module.conv1.weight, before["conv1.weight"] + 0.5)
    x = torch.randn(1, 3, 32, 32)
    reference = copy.deepcopy(ema.module).eval()
    with torch.no_grad():
        torch.testing.assert_close(ema.eval()(x), reference(x))


def test_inference_sees_the_weights_of_the_last_optimizer_step():
    model, x = ours.resnet11(num_classes=5), torch.randn(4, 3, 32, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            planned = model(x)
        torch.testing.assert_close(planned, model(x).detach(), rtol=1e-3, atol=1e-3)


def _peak_bytes(step):
    """The most that a step holds at once of what it allocates, by the allocator's own account."""
    allocation = torch._C._profiler._EventType.Allocation
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as prof:
        step()
    events, todo = [], list(prof.profiler.kineto_results.experimental_event_tree())
    while todo:
        event = todo.pop()
        todo += event.children
        if event.typed[0] == allocation:
            events.append((event.start_time_ns, event.typed[1].alloc_size))
    held = list(itertools.accumulate(size for _, size in sorted(events)))
    return max(held), held[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_step_takes_no_more_memory_than_eager(name, dtype):
    x, target = torch.randn(8, 3, 64, 64).contiguous(memory_format=torch.channels_last), torch.arange(8)
    peaks = []
    for library in (ours, torchvision.models):
        model = getattr(library, name)(num_classes=8).to(memory_format=torch.channels_last).train()

        def step(model=model):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x).float(), target)
            loss.backward()

        peak, left = _peak_bytes(step)
        # What is left are the gradients: the account is complete.
        gradients = sum(p.grad.untyped_storage().nbytes() for p in model.parameters())
        assert gradients <= left <= 1.01 * gradients
        peaks.append(peak)
    assert peaks[0] <= peaks[1], peaks
