"""`triton.expand_reduce` in the interpreter: both outputs, residual or shortcut, against fp64 PyTorch."""

import pytest
import torch
from problems import H100, check_candidate, problem_of

from fastres.activation import IDENTITY, RELU, Activation
from fastres.backends import triton_portable  # noqa: F401 (registers)
from fastres.plan.candidate import REGISTRY
from fastres.plan.pattern import EXPAND_REDUCE
from fastres.plan.problem import ConvSpec
from fastres.tuning.portable_config import ChainConfig

CANDIDATE = REGISTRY["triton.expand_reduce"]
CONFIG = ChainConfig(16, 16, 16, 16, 4, 2)


def chain(n, c1, k, z, h, w, c0=0, stride=1, dtype=torch.float32, acts=(RELU, RELU), flags=()):
    layers = dict(
        expand=ConvSpec(n, c1, h, w, k, (1, 1), act=acts[0], residual=True),
        reduce=ConvSpec(n, k, h, w, z, (1, 1), act=acts[1]),
    )
    if c0:
        layers["shortcut"] = ConvSpec(n, c0, stride * h, stride * w - stride + 1, k, (1, 1), (stride, stride))
    return problem_of(EXPAND_REDUCE, dtype, flags, **layers)


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 16, 32, 16, 5, 7),
        (1, 7, 20, 5, 3, 5),
        (2, 8, 40, 24, 3, 3),
        (1, 33, 16, 40, 2, 3),
        (1, 1, 1, 1, 1, 1),
    ],
    ids=str,
)
def test_with_a_residual(shape, dtype, integers):
    check_candidate(CANDIDATE, chain(*shape, dtype=dtype), CONFIG, integers=integers)


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape", [(2, 16, 32, 16, 5, 7, 16), (1, 8, 24, 8, 3, 4, 20, 2), (1, 5, 9, 3, 2, 3, 33, 2)], ids=str
)
def test_with_the_shortcut_inside(shape, dtype, integers):
    check_candidate(CANDIDATE, chain(*shape, dtype=dtype), CONFIG, integers=integers)


@pytest.mark.parametrize("acts", [(IDENTITY, RELU), (Activation("silu"), Activation("gelu"))], ids=str)
def test_other_activations(acts):
    check_candidate(CANDIDATE, chain(1, 16, 24, 16, 3, 5, acts=acts), CONFIG)


def test_wide_offsets_give_the_same_numbers(monkeypatch):
    monkeypatch.setattr("fastres.backends.triton_portable.expand_reduce.wide", lambda problem: True)
    check_candidate(CANDIDATE, chain(2, 16, 16, 16, 3, 5, 16, 2), CONFIG, integers=True)


def test_refuses_what_would_not_fit():
    wide = chain(1, 512, 2048, 512, 7, 7, dtype=torch.bfloat16)
    assert "fits" in CANDIDATE.accepts(wide, H100)
    assert "IEEE" in CANDIDATE.accepts(chain(1, 64, 256, 64, 7, 7), H100)
    assert CANDIDATE.accepts(chain(1, 64, 256, 64, 7, 7, flags=("tf32",)), H100) is None
