"""Mean, linear, both, and max pool in the interpreter, against fp64 PyTorch."""

import pytest
import torch
from problems import check_candidate, problem_of

from fastres.backends import triton_portable  # noqa: F401 (registers)
from fastres.plan.candidate import REGISTRY
from fastres.plan.pattern import GLOBAL_AVG_POOL, LINEAR, MAX_POOL, POOL_LINEAR
from fastres.plan.problem import LinearSpec, PoolSpec
from fastres.tuning.portable_config import ConvConfig, PoolConfig

DTYPES = [torch.float32, torch.float16]
PRODUCT = ConvConfig("implicit", 16, 16, 16, 4, 2)
TILE = PoolConfig(16, 16, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("shape", [(2, 16, 7, 7), (3, 20, 5, 4), (1, 7, 1, 1)], ids=str)
def test_global_avg_pool(shape, flat, dtype):
    problem = problem_of(GLOBAL_AVG_POOL, dtype, pool=PoolSpec(*shape, flat=flat))
    check_candidate(REGISTRY["triton.global_avg_pool"], problem, TILE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("n, c, k", [(1, 16, 16), (5, 40, 7), (20, 17, 33)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(n, c, k, bias, integers, dtype):
    problem = problem_of(LINEAR, dtype, linear=LinearSpec(n, c, k, bias))
    check_candidate(REGISTRY["triton.linear"], problem, PRODUCT, integers=integers)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, k", [((2, 16, 7, 7), 10), ((3, 24, 3, 5), 7)], ids=str)
def test_pool_linear(shape, k, dtype):
    layers = dict(pool=PoolSpec(*shape, flat=True), linear=LinearSpec(*shape[:2], k))
    check_candidate(REGISTRY["triton.pool_linear"], problem_of(POOL_LINEAR, dtype, **layers), PRODUCT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, window",
    [
        ((2, 16, 7, 9), ((3, 3), (2, 2), (1, 1), (1, 1), False)),
        ((1, 5, 6, 6), ((2, 2), (2, 2), (0, 0), (1, 1), True)),
        ((1, 20, 5, 8), ((3, 2), (1, 3), (1, 0), (2, 1), False)),
        ((1, 8, 8, 8), ((3, 3), (2, 2), (0, 0), (1, 1), True)),
    ],
    ids=str,
)
def test_max_pool(shape, window, dtype):
    problem = problem_of(MAX_POOL, dtype, pool=PoolSpec(*shape, *window))
    check_candidate(REGISTRY["triton.max_pool"], problem, TILE, integers=True)
    check_candidate(REGISTRY["triton.max_pool"], problem, TILE)
