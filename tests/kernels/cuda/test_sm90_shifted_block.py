"""sm90_shifted_block: TMA, mbarriers, warp roles and shared tiles; in the emulator and on a Hopper."""

import pytest
import torch
from problems import H100, check_candidate, problem_of

from fastres.activation import IDENTITY, RELU
from fastres.backends.cuda.shifted_block import Sm90ShiftedBlock
from fastres.plan.pattern import SHIFTED_BLOCK
from fastres.plan.problem import ConvSpec

CANDIDATE = Sm90ShiftedBlock()
BF16, FP16 = torch.bfloat16, torch.float16


def _problem(n, h, w, dtype, reduce=True, channels=64, expanded=256, act=RELU):
    layers = dict(
        conv=ConvSpec(n, channels, h, w, channels, (3, 3), padding=(1, 1), act=act),
        expand=ConvSpec(n, channels, h, w, expanded, (1, 1), act=RELU, residual=True),
    )
    if reduce:
        layers["reduce"] = ConvSpec(n, expanded, h, w, channels, (1, 1), act=RELU)
    return problem_of(SHIFTED_BLOCK, dtype, **layers)


@pytest.mark.parametrize("reduce", [False, True], ids=["expand", "expand+reduce"])
@pytest.mark.parametrize("extent", [(2, 16, 16), (3, 9, 13), (1, 3, 5)], ids=lambda e: "x".join(map(str, e)))
def test_equals_fp64(extent, reduce, every_schedule):
    # Whole tiles, ragged ones, and one tile that is larger than the image.
    check_candidate(CANDIDATE, _problem(*extent, (BF16, FP16)[extent[0] % 2], reduce), None, every_schedule)


def test_whole_numbers_are_exact(device):
    check_candidate(CANDIDATE, _problem(1, 16, 8, FP16), None, device, integers=True)


@pytest.mark.gpu
@pytest.mark.parametrize("reduce", [False, True], ids=["expand", "expand+reduce"])
@pytest.mark.parametrize("batch", [1, 3, 32, 256])
def test_stage_1_on_a_gpu(batch, reduce):
    for dtype in (BF16, FP16):
        check_candidate(CANDIDATE, _problem(batch, 56, 56, dtype, reduce), None, "cuda", runs=5)
        check_candidate(CANDIDATE, _problem(batch, 57, 41, dtype, reduce), None, "cuda")


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (_problem(1, 8, 8, BF16, channels=128), "64 -> 64"),
        (_problem(1, 8, 8, BF16, expanded=128), "256 channels"),
        (_problem(1, 8, 8, BF16, act=IDENTITY), "ReLU"),
        (_problem(1, 8, 8, torch.float32), "dtype"),
        (_problem(2**14, 56, 56, BF16), "2^31 elements"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason(problem, reason):
    assert reason in CANDIDATE.accepts(problem, H100)


def test_it_takes_stage_1_on_a_hopper():
    assert CANDIDATE.accepts(_problem(256, 56, 56, BF16), H100) is None
