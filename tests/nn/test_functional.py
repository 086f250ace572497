"""conv_bn_act over modules: fused where they are exactly what is fused, called as they are where not."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torchvision.ops import FrozenBatchNorm2d

from fastres import ops
from fastres.nn import functional


def conv_and_bn(norm=nn.BatchNorm2d, **conv):
    arguments = {"padding": 1, "bias": False} | conv
    pair = nn.ModuleList([nn.Conv2d(4, 8, 3, **arguments), norm(8)]).double()
    for t in [*pair[1].parameters(), *pair[1].buffers()]:
        if t.is_floating_point():
            nn.init.uniform_(t, 0.5, 1.5)
    return pair


def step(pair, function, act, with_residual):
    """Output, gradients and buffers of one forward and backward."""
    pair = copy.deepcopy(pair)
    torch.manual_seed(1)
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    shape = pair[0](x).shape
    residual = torch.randn(shape, dtype=torch.float64, requires_grad=True) if with_residual else None
    out = function(x, pair[0], pair[1], residual, act)
    out.backward(torch.randn(shape, dtype=torch.float64))
    gradients = [x.grad, residual.grad if with_residual else None, *(p.grad for p in pair.parameters())]
    return [out.detach(), *gradients, *pair.buffers()]


def eager(x, conv, bn, residual, act):
    y = bn(conv(x))
    return act(y if residual is None else y + residual)


def check(pair, act=None):
    act = nn.ReLU() if act is None else act
    for mode in (True, False):
        pair.train(mode)
        for with_residual in (True, False):
            got = step(pair, functional.conv_bn_act, act, with_residual)
            want = step(pair, eager, act, with_residual)
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def cumulative(n):
    return nn.BatchNorm2d(n, momentum=None)


def untracked(n):
    return nn.BatchNorm2d(n, track_running_stats=False)


def no_affine(n):
    return nn.BatchNorm2d(n, affine=False)


def group_norm(n):
    return nn.GroupNorm(2, n)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d,
        cumulative,
        untracked,
        no_affine,
        group_norm,
        FrozenBatchNorm2d,
        nn.InstanceNorm2d,
        nn.Identity,
    ],
)
def test_any_norm_gives_the_result_of_calling_the_modules(norm):
    check(conv_and_bn(norm))


@pytest.mark.parametrize(
    "conv",
    [
        {"bias": True},
        {"stride": 2},
        {"groups": 2},
        {"dilation": 2, "padding": 2},
        {"padding": "same"},
        {"padding_mode": "reflect"},
    ],
    ids=str,
)
def test_any_convolution_gives_the_result_of_calling_the_modules(conv):
    check(conv_and_bn(**conv))


ACTIVATIONS = [
    nn.Identity(),
    nn.ReLU6(),
    nn.SiLU(),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.LeakyReLU(0.2),
    nn.Hardswish(),
]


@pytest.mark.parametrize("act", [*ACTIVATIONS, nn.ELU(), nn.PReLU(dtype=torch.float64)], ids=str)
def test_any_activation_gives_the_result_of_calling_the_modules(act):
    check(conv_and_bn(), act)


def test_cumulative_average_equals_pytorchs_over_several_batches():
    ours, theirs = cumulative(3).double(), cumulative(3).double()
    for _ in range(4):
        x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
        functional.bn_act(x, ours)
        theirs(x)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def _weight_norm(conv):
    with pytest.warns(FutureWarning):
        weight_norm(conv)


@pytest.mark.parametrize(
    "change",
    [_weight_norm, parametrizations.weight_norm, lambda conv: prune.l1_unstructured(conv, "weight", 0.5)],
    ids=["weight_norm", "parametrized", "pruned"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_reparametrised_weights_act(change):
    pair = conv_and_bn()
    change(pair[0])
    # Old-style weight norm cannot be deep-copied after a forward; parametrisations train through their own
    # leaves.
    for mode in (True, False):
        pair.train(mode)
        x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
        state = copy.deepcopy(pair.state_dict())
        got = functional.conv_bn_act(x, pair[0], pair[1])
        pair.load_state_dict(state)
        torch.testing.assert_close(got, torch.relu(pair[1](pair[0](x))), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_hooks_fire_and_may_change_the_value(which, mode):
    pair, relu = conv_and_bn().train(mode), nn.ReLU()
    modules = [*pair, relu]
    modules[which].register_forward_hook(lambda module, inputs, output: output * 2)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    state = copy.deepcopy(pair.state_dict())
    got = functional.conv_bn_act(x, *modules[:2], act=relu)
    pair.load_state_dict(state)
    torch.testing.assert_close(got, relu(pair[1](pair[0](x))), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("mode", "op"), [(True, "bn_act"), (False, "conv_bn_act")])
def test_plain_modules_run_the_fused_op(monkeypatch, mode, op):
    calls, original = [], getattr(ops, op)
    monkeypatch.setattr(ops, op, lambda *args, **keywords: calls.append(op) or original(*args, **keywords))
    step(conv_and_bn().train(mode), functional.conv_bn_act, nn.ReLU(), True)
    assert calls == [op]


def test_subclasses_are_called_as_they_are():
    class Doubled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    check(conv_and_bn(Doubled))


def test_no_normalisation():
    conv, x = nn.Conv2d(3, 4, 3).double(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(functional.conv_bn_act(x, conv, None), torch.relu(conv(x)))


@pytest.mark.parametrize("mode", [True, False])
def test_bad_input_is_refused_by_name(mode):
    pair = conv_and_bn().float().train(mode)
    x = torch.randn(2, 4, 5, 5)
    with pytest.raises(ValueError, match=r"residual: expected .*\(2, 8, 5, 5\), got \(2, 8, 1, 1\)"):
        functional.conv_bn_act(x, *pair, residual=torch.randn(2, 8, 1, 1))
    with pytest.raises(TypeError, match="residual: expected the dtype of x"):
        functional.conv_bn_act(x, *pair, residual=torch.randn(2, 8, 5, 5).half())
    with pytest.raises(ValueError, match="expected 4D input"):
        functional.bn_act(x[0], pair[1])
