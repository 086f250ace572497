"""any_max_pool against PyTorch, exactly: it only compares."""

import pytest
import torch
from problems import check_candidate, problem_of

from fastres.backends.cuda.max_pool import AnyMaxPool
from fastres.plan.candidate import Buffers
from fastres.plan.pattern import MAX_POOL
from fastres.plan.problem import PoolSpec

CANDIDATE = AnyMaxPool()
SPECS = [
    PoolSpec(2, 64, 12, 12, (3, 3), (2, 2), (1, 1)),
    PoolSpec(1, 24, 9, 11, (3, 2), (2, 3), (1, 0), ceil_mode=True),
    PoolSpec(3, 5, 8, 7, (2, 2), (1, 1), (0, 0), (2, 3)),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_equals_pytorch(spec, dtype, device):
    check_candidate(CANDIDATE, problem_of(MAX_POOL, dtype, pool=spec), None, device)


def test_nan_goes_through_and_padding_never_wins(device):
    spec = PoolSpec(1, 8, 6, 6, (3, 3), (2, 2), (1, 1))
    x = torch.full((1, 8, 6, 6), -float("inf")).to(device, memory_format=torch.channels_last)
    x[0, 3, 2, 2] = float("nan")
    out = torch.zeros(spec.y_shape).to(device, memory_format=torch.channels_last)
    problem = problem_of(MAX_POOL, torch.float32, pool=spec)
    CANDIDATE.bind(problem, None, Buffers({"pool.x": x, "pool": out}), None)()
    want = torch.nn.functional.max_pool2d(x, 3, 2, 1)
    torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)
    assert want.isnan().sum() == 1
