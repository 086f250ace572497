"""`triton.shifted_block` in the interpreter: 3x3, expand, residual or shortcut, reduce or none."""

import pytest
import torch
from problems import check_candidate, problem_of

from fastres.activation import RELU, Activation
from fastres.backends import triton_portable  # noqa: F401 (registers)
from fastres.plan.candidate import REGISTRY
from fastres.plan.pattern import SHIFTED_BLOCK
from fastres.plan.problem import ConvSpec
from fastres.tuning.portable_config import ChainConfig

CANDIDATE = REGISTRY["triton.shifted_block"]
CONFIG = ChainConfig(16, 16, 16, 16, 4, 2)


def block(n, c, c1, k, z, h, w, c0=0, stride=1, dtype=torch.float32, act=RELU):
    layers = dict(
        conv=ConvSpec(n, c, h, w, c1, (3, 3), padding=(1, 1), act=act),
        expand=ConvSpec(n, c1, h, w, k, (1, 1), act=RELU, residual=True),
    )
    if z:
        layers["reduce"] = ConvSpec(n, k, h, w, z, (1, 1), act=RELU)
    if c0:
        layers["shortcut"] = ConvSpec(n, c0, stride * h, stride * w - stride + 1, k, (1, 1), (stride, stride))
    return problem_of(SHIFTED_BLOCK, dtype, **layers)


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 16, 16, 32, 16, 5, 7),
        (1, 16, 16, 16, 0, 5, 7),
        (2, 9, 5, 20, 7, 3, 4),
        (1, 16, 8, 16, 8, 3, 5, 16),
        (1, 8, 16, 24, 0, 3, 4, 20, 2),
        (1, 1, 1, 1, 1, 1, 1),
    ],
    ids=str,
)
def test_shifted_block(shape, dtype, integers):
    check_candidate(CANDIDATE, block(*shape, dtype=dtype), CONFIG, integers=integers)


@pytest.mark.parametrize("kind", ["gelu", "hardswish", "silu"])
def test_padding_channels_stay_zero_after_any_activation(kind):
    check_candidate(CANDIDATE, block(1, 8, 5, 16, 8, 3, 4, act=Activation(kind)), CONFIG)


def test_wide_offsets_give_the_same_numbers(monkeypatch):
    monkeypatch.setattr("fastres.backends.triton_portable.expand_reduce.wide", lambda problem: True)
    check_candidate(CANDIDATE, block(2, 8, 8, 16, 8, 3, 4, 16, 2), CONFIG, integers=True)
