"""`triton.conv_bn_act` in the interpreter: every form against fp64 PyTorch, on tiny odd shapes."""

import builtins
import random
from collections import Counter
from dataclasses import replace
from types import FunctionType, SimpleNamespace

import pytest
import torch
from problems import check_candidate, conv_problem

from fastres.activation import IDENTITY, KINDS, RELU, Activation
from fastres.backends.triton_portable.conv_bn_act import ConvBnAct
from fastres.kernels.triton.conv_bn_act import claim_part, part_of
from fastres.plan.candidate import REGISTRY
from fastres.tuning.portable_config import ConvConfig

CANDIDATE = REGISTRY["triton.conv_bn_act"]
IMPLICIT = ConvConfig("implicit", 16, 16, 16, 4, 2)
DEPTHWISE = ConvConfig("depthwise", 16, 16, 1, 4, 1)
STATIONARY = ConvConfig("stationary", 16, 16, 32, 4, 2, dynamic=True)
PERSISTENT = ConvConfig("persistent", 16, 16, 16, 4, 2, dynamic=True)
DTYPES = [torch.float32, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize(
    "shape, fields",
    [
        ((2, 8, 5, 7, 12, 3), {}),
        ((1, 16, 5, 7, 17, 3), dict(residual=True, act=RELU)),
        ((2, 16, 5, 7, 16, 3), dict(stride=2)),
        ((1, 16, 6, 7, 16, 3), dict(dilation=2, padding=2)),
        ((1, 16, 5, 7, 8, 3), dict(padding=0)),
        ((1, 8, 7, 6, 8, (1, 3)), dict(stride=(2, 1), padding=(1, 2), dilation=(1, 2))),
        ((1, 8, 5, 4, 8, (2, 2)), dict(padding=(1, 0), act=RELU)),
        ((1, 16, 5, 7, 8, 1), dict(padding=1)),
        ((1, 24, 5, 7, 20, 1), dict(stride=2)),
        ((3, 40, 3, 3, 7, 1), dict(residual=True)),
        ((1, 3, 9, 7, 7, 7), dict(stride=2, padding=3, act=RELU)),
        ((1, 1, 1, 1, 1, 1), {}),
        ((2, 5, 3, 4, 7, 3), dict(affine=False)),
        ((2, 5, 3, 4, 7, 1), dict(affine=False, bias=False)),
    ],
)
def test_implicit_gemm(shape, fields, dtype, integers):
    check_candidate(CANDIDATE, conv_problem(*shape, dtype=dtype, **fields), IMPLICIT, integers=integers)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "c, k, groups",
    [(16, 16, 4), (32, 32, 2), (24, 24, 3), (8, 16, 8), (12, 6, 3), (40, 40, 5), (64, 64, 2)],
    ids=lambda v: str(v),
)
def test_grouped(c, k, groups, dtype):
    problem = conv_problem(1, c, 5, 4, k, 3, dtype=dtype, groups=groups, act=RELU, residual=True)
    check_candidate(CANDIDATE, problem, IMPLICIT)
    check_candidate(CANDIDATE, problem.with_batch(2), IMPLICIT, integers=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "c, fields",
    [
        (16, {}),
        (20, dict(stride=2, residual=True, act=RELU)),
        (7, dict(dilation=2, padding=2)),
        (17, dict(padding=0, act=RELU)),
    ],
)
def test_depthwise(c, fields, dtype):
    problem = conv_problem(2, c, 5, 7, c, 3, dtype=dtype, groups=c, **fields)
    check_candidate(CANDIDATE, problem, DEPTHWISE)
    check_candidate(CANDIDATE, problem, DEPTHWISE, integers=True)
    # The same layer as a matrix product with block-diagonal weights.
    check_candidate(CANDIDATE, problem, IMPLICIT, integers=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [STATIONARY, PERSISTENT], ids=lambda c: c.form)
@pytest.mark.parametrize("c, k", [(32, 32), (24, 40), (8, 8), (32, 56)])
@pytest.mark.parametrize("residual", [False, True])
def test_pointwise_forms(c, k, residual, config, dtype):
    problem = conv_problem(2, c, 5, 7, k, 1, dtype=dtype, residual=residual, act=RELU)
    check_candidate(CANDIDATE, problem, config)
    check_candidate(CANDIDATE, problem, config, integers=True)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("config", [STATIONARY, PERSISTENT], ids=lambda c: c.form)
def test_many_tiles(config, dynamic):
    """39 rows of tiles, two columns, two programs a column: several rounds of claims. (The interpreter runs one
    program after the other: the first one claims them all, the last one finds none and zeroes the counter.)"""
    config = replace(config, dynamic=dynamic)
    problem = conv_problem(1, 16, 24, 26, 24, 1, dtype=torch.float16, residual=True, act=RELU)
    assert CANDIDATE.counters(problem, config) == (dynamic and (2 if config.form == "stationary" else 1))
    check_candidate(CANDIDATE, problem, config, integers=True)


@pytest.mark.parametrize(
    "tiles, programs", [(1, 1), (5, 5), (6, 5), (39, 2), (100, 7), (1000, 66), (12544, 132), (97, 96)]
)
def test_claims_in_any_order_take_every_tile_once(tiles, programs):
    """The kernels' own code, on whole numbers, with programs of very different speeds."""
    counter, rng = [0], random.Random(tiles)

    def atomic_add(pointer, value, sem):
        pointer[0] += value
        return pointer[0] - value

    def atomic_xchg(pointer, value, sem):
        pointer[0] = value

    def plain(function):
        names = {"tl": SimpleNamespace(atomic_add=atomic_add, atomic_xchg=atomic_xchg), "part_of": part_of.fn}
        return FunctionType(function.fn.__code__, {"__builtins__": builtins, **names})

    part, claim = plain(part_of), plain(claim_part)
    for _ in range(2):  # launches
        work = {i: part(i, tiles, programs, True)[:2] for i in range(programs)}
        taken, parts = Counter(), []
        while work:
            # The low numbers are slow.
            i = max(rng.sample(list(work), min(3, len(work))))
            begin, end = work.pop(i)
            if begin < tiles:
                taken.update(range(begin, end, programs))
                begin, end = work[i] = claim(counter, tiles, programs)
                parts.append(max(len(range(begin, end, programs)), 0))
        assert sorted(taken) == list(range(tiles)) and set(taken.values()) == {1}
        assert counter == [0]
    # They shrink to 1/32 of a share, or a tile, and then there are none; seven rounds at most.
    assert parts == sorted(parts, reverse=True) and parts[-programs:] == [0] * programs
    least = max(tiles // programs // 32, 1)
    assert len(parts) == programs or parts[-programs - 1] <= least
    assert len(parts) <= 8 * programs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_activations(kind, dtype):
    problem = conv_problem(1, 16, 5, 7, 16, 1, dtype=dtype, residual=True, act=Activation(kind, 0.1))
    for config in (IMPLICIT, STATIONARY):
        check_candidate(CANDIDATE, problem, config)


@pytest.mark.parametrize("kind", KINDS)
def test_activation_values_and_nan(kind):
    """Through an identity weight, so that act sees the values as they are."""
    from checking import make_nodes

    from fastres.graph.fold import LayerParameters
    from fastres.plan.candidate import Buffers

    act = Activation(kind, 0.25)
    problem = conv_problem(1, 16, 4, 4, 16, 1, act=act, affine=False, bias=False)
    nodes = make_nodes(problem, "cpu")
    nodes["conv"].conv.weight.data.copy_(torch.eye(16).view(16, 16, 1, 1))
    values = torch.tensor([-20.0, -3.0, -1.0, -1e-3, -0.0, 0.0, 1e-3, 1.0, 3.0, 5.9, 6.0, 7.0, 20.0])
    x = torch.zeros(1, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    x[0, 0].view(-1)[: len(values)] = values
    x[0, 3, 0, 0] = float("nan")
    y = torch.empty_like(x)
    constants = CANDIDATE.prepare(problem, IMPLICIT, {"conv": LayerParameters(nodes["conv"])})
    CANDIDATE.bind(problem, IMPLICIT, Buffers({"conv.x": x, "conv": y}), constants)()
    assert y[0, :, 0, 0].isnan().all(), "NaN must reach every output that it is a factor of"
    ref = act(x.double()[:, :1].flatten()[1:])
    torch.testing.assert_close(y[:, :1].flatten()[1:].double(), ref, rtol=1e-6, atol=1e-7)


def test_wide_offsets_give_the_same_numbers(monkeypatch):
    monkeypatch.setattr("fastres.backends.triton_portable.conv_bn_act.wide", lambda problem: True)
    check_candidate(CANDIDATE, conv_problem(2, 16, 5, 7, 16, 3, stride=2), IMPLICIT, integers=True)
    check_candidate(CANDIDATE, conv_problem(2, 16, 5, 7, 16, 3, groups=16), DEPTHWISE, integers=True)


@pytest.mark.parametrize("form", ["stationary", "persistent"])
def test_a_form_that_does_not_fit_is_refused(form):
    config = ConvConfig(form, 16, 16, 16, 4, 2)
    with pytest.raises(ValueError, match=f"{form}.*1x1"):
        check_candidate(ConvBnAct(), conv_problem(1, 16, 5, 7, 16, 3, act=IDENTITY), config)
