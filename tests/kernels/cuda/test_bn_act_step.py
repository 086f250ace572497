"""binding_bn_act_step: bn_act's forward and gradients as one call each, against their passes and against fp64."""

import pytest
import torch
import torch.nn.functional as F
from test_any import _make, _stat, _vector

import fastres.backends.cuda_ops as ops
from fastres.activation import KINDS
from fastres.ops import bn_act, bn_act_passes, primitives
from tests.oracle import assert_close_to_oracle, assert_same_bits

RELU, RELU6, SILU = (KINDS.index(kind) for kind in ("relu", "relu6", "silu"))
WHOLE = list(primitives.WHOLE)
MOMENTUM, EPS = 0.3, 1e-5
cases = pytest.mark.parametrize(
    ("shape", "layout", "dtype"),
    [
        pytest.param(shape, layout, dtype, id=f"{'x'.join(map(str, shape))}-{layout}-{str(dtype)[6:]}")
        for shape, layout, dtype in [
            ((2, 16, 4, 8), "nhwc", torch.bfloat16),
            ((3, 24, 5, 7), "nchw", torch.float16),
            ((2, 5, 3, 3), "nhwc", torch.float32),
            ((9, 64), "nchw", torch.float64),
            ((2, 8, 3, 4, 5), "nchw", torch.bfloat16),
        ]
    ],
)


class Given:
    """The tensors of one call, all different from 0 and 1."""

    def __init__(self, shape, layout, dtype, device, running=None):
        self.x, self.residual, self.grad = (_make(shape, dtype, layout, device) for _ in "xrg")
        self.x = self.x * 2 + 3
        c, self.stat = shape[1], _stat(dtype)
        self.mean, self.bias = (_vector(c, dtype, device) for _ in "mb")
        self.weight, self.var = (_vector(c, dtype, device).abs() + 0.5 for _ in "wv")
        running = running or self.stat
        self.running_mean, self.running_var = self.bias.to(running), self.var.to(running)
        self.count = self.x.numel() // c

    def numbers(self, n):
        return [torch.full_like(self.mean, float("nan")) for _ in range(n)]


def _forward_by_passes(g, residual, affine, running, mean, var, act):
    """out, mean, invstd."""
    weight, bias = (g.weight, g.bias) if affine else (None, None)
    if mean is None:
        mean, var = g.numbers(2)
        ops.bn_stats(g.x, mean, var)
    invstd, scale, shift = g.numbers(3)
    ops.bn_finalize(mean, var, weight, bias, *running, MOMENTUM, EPS, g.count, invstd, scale, shift)
    out = torch.empty_like(g.x)
    ops.bn_act(g.x, residual, scale, shift, act, 0.0, out)
    return [out, mean, invstd]


@cases
@pytest.mark.parametrize("act", [RELU, SILU], ids=["relu", "silu"])
@pytest.mark.parametrize("running", ["stat", "bf16", "fp16"])
def test_forward_gives_the_bits_of_its_passes(shape, layout, dtype, act, running, device):
    if running != "stat" and dtype == torch.float64:
        pytest.skip("running statistics of float64 are float64")
    kind = {"stat": None, "bf16": torch.bfloat16, "fp16": torch.float16}[running]
    g = Given(shape, layout, dtype, device, kind)
    for residual, affine in ((g.residual, True), (None, False)):
        head = (g.x, residual, *((g.weight, g.bias) if affine else (None, None)))
        tail = (MOMENTUM, EPS, act, 0.0)
        # the batch's own statistics, then given ones; moving running statistics, then none
        for given in ((None, None), (g.mean, g.var)):
            for moves in (True, False):
                mine, theirs = (
                    [g.running_mean.clone(), g.running_var.clone()] if moves else [None, None] for _ in "mt"
                )
                got = ops.bn_act_forward(*head, *mine, *given, True, *tail, None)
                want = _forward_by_passes(g, residual, affine, theirs, *given, act)
                if given[0] is not None:
                    del want[1]
                assert len(got) == len(want) and got[0].stride() == g.x.stride()
                for one, other in zip([*got, *mine], [*want, *theirs], strict=True):
                    assert (one is None) == (other is None)
                    if one is not None:
                        assert_same_bits(one, other)
                assert not moves or not torch.equal(mine[0], g.running_mean)
        if kind is not None:
            continue
        # frozen, into a tensor of the caller's, which may be x
        want = _forward_by_passes(g, residual, affine, (None, None), g.running_mean, g.running_var, act)
        frozen = (g.running_mean, g.running_var, None, None, False, *tail)
        before = g.running_mean.clone()
        out, invstd = ops.bn_act_forward(*head, *frozen, None)
        into = g.x.clone()
        (again,) = ops.bn_act_forward(into, *head[1:], *frozen, into)
        assert_same_bits(out, want[0])
        assert_same_bits(into, want[0], "in place")
        assert_same_bits(invstd, want[2])
        assert_same_bits(again, want[2])
        assert torch.equal(before, g.running_mean)


def _gradients_by_passes(g, x, residual, affine, out, invstd, batch_stats, act, wanted):
    vectors = (g.mean, invstd, *((g.weight, g.bias) if affine else (None, None)))
    head = (g.grad, g.grad if x is None else x, residual, out, *vectors, act, 0.0)
    dx, dz = torch.empty_like(g.grad), torch.empty_like(g.grad)
    sums, means, left = g.numbers(2), [None, None], dz if wanted & 2 else None
    centres = wanted & 1 and batch_stats
    if centres or wanted & 12:
        exact = act <= RELU6 or g.grad.dtype == g.stat
        ops.bn_act_backward_reduce(*head, *sums, left if exact else None)
        if exact and left is not None:
            head, left = (dz, head[1], None, None, *vectors, 0, 0.0), None
    if centres:
        means = [s / torch.full_like(s, g.count) for s in sums]
    ops.bn_act_backward(*head, *means, dx, left)
    every = (dx, dz, sums[1], sums[0])
    return [t for bit, t in enumerate(every) if wanted >> bit & 1]


@cases
@pytest.mark.parametrize("act", [RELU, RELU6, SILU], ids=["relu", "relu6", "silu"])
@pytest.mark.parametrize("batch_stats", [True, False], ids=["batch", "frozen"])
def test_gradients_give_the_bits_of_their_passes(shape, layout, dtype, act, batch_stats, device):
    g = Given(shape, layout, dtype, device)
    invstd, kept = g.var.reciprocal(), g.residual.relu()
    for wanted in range(1, 16):
        residual, affine = (g.residual, True) if wanted & 2 else (None, bool(wanted & 4))
        out = kept if act == RELU and wanted % 3 else None
        vectors = (*((g.weight, g.bias) if affine else (None, None)), g.mean, invstd)
        got = ops.bn_act_gradients(g.grad, g.x, residual, *vectors, out, batch_stats, act, 0.0, wanted)
        want = _gradients_by_passes(g, g.x, residual, affine, out, invstd, batch_stats, act, wanted)
        assert len(got) == len(want) == wanted.bit_count()
        for one, other in zip(got, want, strict=True):
            assert_same_bits(one, other, f"wanted {wanted:04b}")
            assert one.stride() == other.stride()


def test_gradients_without_x_where_nothing_depends_on_it(device):
    g = Given((2, 8, 3, 3), "nhwc", torch.float32, device)
    rest = (g.weight, g.bias, g.mean, g.var)
    for wanted in (1, 3, 8, 11):
        got = ops.bn_act_gradients(g.grad, None, None, *rest, g.residual, False, RELU, 0.0, wanted)
        want = _gradients_by_passes(g, None, None, True, g.residual, g.var, False, RELU, wanted)
        for one, other in zip(got, want, strict=True):
            assert_same_bits(one, other, f"wanted {wanted:04b}")
    for refused in ((True, RELU, 0.0, 1), (False, RELU, 0.0, 4), (False, SILU, 0.0, 1)):
        assert ops.bn_act_gradients(g.grad, None, None, *rest, g.residual, *refused) == []


@pytest.mark.parametrize("what", ["batch", "given", "frozen"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_bn_act_is_one_call_each_way_and_right(what, layout, device, monkeypatch):
    """The op as users call it, against fp64 and PyTorch's own."""
    calls = []

    def find(name, x):
        def recorded(*args):
            calls.append(name)
            return getattr(ops, name)(*args)

        return recorded

    monkeypatch.setattr(primitives, "find", find)
    for dtype in (torch.float32, torch.bfloat16):
        g = Given((4, 16, 6, 5), layout, dtype, device)
        var, mean = torch.var_mean(g.x.to(g.stat), (0, 2, 3), correction=0)
        given = (mean, var) if what == "given" else None

        def ours(x, r, w, b, m, v, given=given):
            return bn_act(
                x, m, v, w, b, what != "frozen", MOMENTUM, EPS, residual=r, act="relu", statistics=given
            )

        def theirs(x, r, w, b, m, v):
            return F.relu(F.batch_norm(x, m, v, w, b, what != "frozen", MOMENTUM, EPS) + r)

        def run(function, wide=None, g=g):
            given = (g.x, g.residual, g.weight, g.bias, g.running_mean, g.running_var)
            leaves = [t.detach().clone().to(wide or t.dtype) for t in given]
            for leaf in leaves[:4]:
                leaf.requires_grad_()
            out = function(*leaves)
            out.backward(g.grad.to(out.dtype))
            return [out.detach(), *(t.grad for t in leaves[:4]), *leaves[4:]]

        calls.clear()
        got, ref, own = run(ours), run(theirs, torch.float64), run(theirs)
        assert calls == WHOLE
        k = g.count
        # |x| and |xhat| are below 12 and 6 here, sums are of k values
        bounds = [24.0, 24.0, 6.0, 24.0 * k, 6.0 * k, 6.0, 24.0]
        for name, one, exact, other, bound in zip(
            ("out", "dx", "dr", "dw", "db", "rm", "rv"), got, ref, own, bounds, strict=True
        ):
            magnitude = torch.full_like(exact, bound)
            assert_close_to_oracle(
                one, exact, other, magnitude=magnitude, k=k, c=4, check_norm=False, what=name
            )


def _arguments(device):
    g = Given((2, 8, 4, 4), "nhwc", torch.float32, device)
    running = (g.running_mean, g.running_var)
    forward = [g.x, g.residual, g.weight, g.bias, *running, None, None, True, MOMENTUM, EPS, RELU, 0.0, None]
    backward = [g.grad, g.x, g.residual, g.weight, g.bias, g.mean, g.var, None, True, RELU, 0.0, 15]
    return forward, backward


_REFUSED = [
    (0, "x of another type", lambda t: t.int()),
    (0, "x with holes", lambda t: torch.cat([t, t], 3)[..., ::2]),
    (0, "no values", lambda t: t[:0]),
    (0, "no spatial sizes, no channels", lambda t: t.flatten()),
    (0, "x on another device", lambda t: t.to("meta")),
    (1, "residual on another device", lambda t: t.to("meta")),
    (1, "residual of another type", lambda t: t.half()),
    (1, "residual in another order", lambda t: t.contiguous()),
    (1, "residual of another shape", lambda t: t[:1]),
    (2, "weight of another type", lambda t: t.half()),
    (3, "bias with holes", lambda t: torch.stack([t, t], 1)[:, 0]),
    (4, "running_mean of another type than running_var", lambda t: t.half()),
    (4, "running_mean alone", lambda t: None),
    (5, "running_var too long", lambda t: torch.cat([t, t])),
    (11, "act", lambda act: 8),
]


@pytest.mark.parametrize(("at", "what", "change"), _REFUSED, ids=[what for _, what, _ in _REFUSED])
def test_forward_refuses_and_writes_nothing(at, what, change, device):
    arguments, _ = _arguments(device)
    running = arguments[4:6]
    before = [t.clone() for t in running]
    arguments[at] = change(arguments[at])
    assert ops.bn_act_forward(*arguments) == []
    assert all(map(torch.equal, running, before))


def test_forward_refuses_what_has_one_value_a_channel_and_half_given_statistics(device):
    arguments, _ = _arguments(device)
    mean, var = arguments[4:6]
    one = [arguments[0][:1, :, :1, :1], None, *arguments[2:]]
    assert ops.bn_act_forward(*one) == []
    assert ops.bn_act_forward(*arguments[:6], mean, None, *arguments[8:]) == []
    frozen = [*arguments[:6], None, None, False, *arguments[9:]]
    assert len(ops.bn_act_forward(*frozen)) == 2
    assert ops.bn_act_forward(*frozen[:6], mean, var, *frozen[8:]) == []
    assert ops.bn_act_forward(*frozen[:4], mean.half(), var.half(), *frozen[6:]) == []


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 6, 9])
def test_gradients_refuse(at, device):
    _, arguments = _arguments(device)
    assert len(ops.bn_act_gradients(*arguments)) == 4
    arguments[at] = 8 if at == 9 else arguments[at].half()
    assert ops.bn_act_gradients(*arguments) == []


def test_what_is_not_taken_is_converted_and_taken(device, monkeypatch):
    monkeypatch.setattr(primitives, "find", lambda name, x: getattr(ops, name))
    g = Given((2, 8, 3, 3), "nhwc", torch.float32, device)
    arguments = (g.running_mean, g.running_var, None, None, MOMENTUM, EPS, RELU, 0.0, "")
    want = bn_act_passes.train(g.x, g.residual, g.weight, g.bias, *[None] * 4, *arguments[4:])
    got = bn_act_passes.train(g.x, g.residual.contiguous(), g.weight.double(), g.bias, *arguments)
    for one, other in zip(got, want, strict=True):
        assert_same_bits(one, other)


def test_the_same_schemas_as_on_a_cpu():
    import fastres.backends.cpu_ops as cpu_ops

    for name in WHOLE:
        ours, theirs = (str(getattr(m, name)._schema).partition("::")[2] for m in (ops, cpu_ops))
        assert ours == theirs
