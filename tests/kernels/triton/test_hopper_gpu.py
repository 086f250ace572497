"""The Hopper kernels on a Hopper: every layer of the networks, whole numbers, both types, every configuration.

Cut into shares of about 30 s of compiling, as in test_gpu.py.
"""

import gc

import pytest
import torch
from hopper_problems import hopper_problems
from problems import DISTINCT, NETWORKS, check_candidate, network_problems, random_shares

from fastres.backends import triton_hopper  # noqa: F401
from fastres.plan.candidate import REGISTRY
from fastres.plan.target import detect

pytestmark = pytest.mark.gpu
HOPPER = [candidate for candidate in REGISTRY.candidates.values() if candidate.backend == "hopper"]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def pytest_generate_tests(metafunc):
    """16 random problems of each kernel and type: 224 kernels of 1.2 s of compiling, 20 s on 16 cores."""
    random_shares(metafunc, 16)


def shares(most: int):
    """(candidate, share, number of shares): `most` of the GEMM, which takes most problems, else fewer."""
    counts = {"hopper.conv_bn_act": most, "hopper.shifted_block": max(1, most // 4)}
    made = [(c, i, counts.get(c.name, 1)) for c in HOPPER for i in range(counts.get(c.name, 1))]
    return pytest.mark.parametrize(("candidate", "share", "of"), made, ids=lambda value: str(value))


@pytest.fixture
def target():
    found = detect(torch.device("cuda", torch.cuda.current_device()))
    if found.capability != 90:
        pytest.skip(f"needs compute capability 9.0, this is {found.arch}")
    yield found
    gc.collect()
    torch.cuda.empty_cache()


def exact(problem):
    """A shortcut inside a kernel is not rounded before it is added; the checker's whole numbers assume
    that it is."""
    return problem.get("shortcut") is None


@DTYPES
@pytest.mark.parametrize("n", [1, 3, 32, 256])
@shares(3)
def test_layers_of_the_networks(candidate, share, of, n, dtype, target):
    found = [
        problem
        for normalize in ((False, True) if candidate.name == "hopper.stem_pool" else (False,))
        for problem in network_problems(candidate.pattern, tuple(NETWORKS), n, dtype, normalize=normalize)
    ]
    taken = [problem for problem in found if candidate.accepts(problem, target) is None]
    if not taken:
        pytest.skip(candidate.accepts(found[0], target))
    for problem in taken[share::of]:
        config = candidate.configs(problem, target)[0]
        for integers in {exact(problem), False}:
            check_candidate(candidate, problem, config, "cuda", integers=integers, distinct=DISTINCT)
        if candidate.planar(problem):
            check_candidate(candidate, problem, config, "cuda", distinct=DISTINCT, planar=True)


@shares(12)
def test_every_configuration_on_resnet50(candidate, share, of, target):
    problems = network_problems(candidate.pattern, ("resnet50",), n=70, dtype=torch.bfloat16)
    taken = [problem for problem in problems if candidate.accepts(problem, target) is None]
    # Every other one of each problem; neighbours have the same lists.
    trials = [
        (problem, config)
        for index, problem in enumerate(taken)
        for config in candidate.configs(problem, target)[index % 2 :: 2]
    ]
    if not trials:
        pytest.skip(f"{candidate} takes none of these layers")
    for problem, config in trials[share::of]:
        integers = exact(problem)
        check_candidate(candidate, problem, config, "cuda", integers=integers, runs=4, distinct=DISTINCT)


@DTYPES
@pytest.mark.parametrize("candidate", HOPPER, ids=str)
def test_random_problems(candidate, dtype, random_share, target):
    """Of each kernel's own kind; --random 100 makes the 200 that are wanted where there is time for them."""
    taken = [
        (seed, problem)
        for seed, problem in enumerate(hopper_problems(candidate.name, random_share.stop, dtype, 7))
        if candidate.accepts(problem, target) is None
    ]
    if not taken:
        pytest.skip(candidate.accepts(hopper_problems(candidate.name, 1, dtype, 7)[0], target))
    for seed, problem in taken[random_share.start :]:
        configs = candidate.configs(problem, target)
        planar = bool(candidate.planar(problem)) and seed % 2 == 1
        check_candidate(candidate, problem, configs[seed % len(configs)], "cuda", seed=seed, planar=planar)
