"""any_pool_linear against fp64, in the emulator and on a GPU."""

import pytest
import torch
from problems import H100, check_candidate, problem_of

from fastres.backends.cuda.pool_linear import AnyPoolLinear
from fastres.plan.pattern import POOL_LINEAR
from fastres.plan.problem import LinearSpec, PoolSpec

CANDIDATE = AnyPoolLinear()


def _problem(n, c, h, w, k, dtype, bias=True):
    return problem_of(
        POOL_LINEAR, dtype, pool=PoolSpec(n, c, h, w, flat=True), linear=LinearSpec(n, c, k, bias)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    "shape",
    [(1, 512, 7, 7, 100), (5, 200, 3, 5, 70), (9, 128, 1, 1, 64), (2, 264, 9, 4, 1)],
    ids=lambda s: "x".join(map(str, s)),
)
def test_equals_fp64(shape, dtype, device):
    check_candidate(CANDIDATE, _problem(*shape, dtype, bias=shape[0] != 5), None, device)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 32])
@pytest.mark.parametrize("channels", [512, 2048])
def test_heads_of_resnets_equal_fp64_on_a_gpu(channels, batch):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        check_candidate(CANDIDATE, _problem(batch, channels, 7, 7, 1000, dtype), None, "cuda")


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (_problem(64, 512, 7, 7, 1000, torch.bfloat16), "batches up to 32"),
        (_problem(1, 510, 7, 7, 1000, torch.bfloat16), "510 channels"),
        (_problem(1, 512, 7, 7, 1000, torch.float64), "dtype"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason(problem, reason):
    assert reason in CANDIDATE.accepts(problem, H100)
