"""The Hopper kernels on a Hopper: every layer of the networks, random problems, whole numbers, both types."""

import pytest
import torch
from problems import NETWORKS, check_candidate, network_problems, random_problems

from fastres.backends import triton_hopper  # noqa: F401
from fastres.plan.candidate import REGISTRY
from fastres.plan.target import detect

pytestmark = pytest.mark.gpu
HOPPER = [candidate for candidate in REGISTRY.candidates.values() if candidate.backend == "hopper"]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@pytest.fixture(scope="module")
def target():
    found = detect(torch.device("cuda"))
    if found.capability != 90:
        pytest.skip(f"needs compute capability 9.0, this is {found.arch}")
    return found


def exact(problem):
    """A shortcut inside a kernel is not rounded before it is added; the checker's whole numbers assume
    that it is."""
    return problem.get("shortcut") is None


@DTYPES
@pytest.mark.parametrize("n", [1, 3, 32, 256])
@pytest.mark.parametrize("candidate", HOPPER, ids=str)
def test_layers_of_the_networks(candidate, n, dtype, target):
    networks = tuple(NETWORKS) if n < 256 else ("resnet18", "resnet50")
    found = [p for p in network_problems(candidate.pattern, networks, n=n, dtype=dtype)]
    taken = [problem for problem in found if candidate.accepts(problem, target) is None]
    if not taken:
        pytest.skip(candidate.accepts(found[0], target))
    for problem in taken:
        config = candidate.configs(problem, target)[0]
        check_candidate(candidate, problem, config, "cuda", integers=exact(problem))
        check_candidate(candidate, problem, config, "cuda", seed=1)


@DTYPES
@pytest.mark.parametrize("candidate", HOPPER, ids=str)
def test_every_configuration_on_resnet50(candidate, dtype, target):
    for problem in network_problems(candidate.pattern, ("resnet50",), n=5, dtype=dtype):
        if candidate.accepts(problem, target) is None:
            for config in candidate.configs(problem, target):
                check_candidate(candidate, problem, config, "cuda", integers=exact(problem), runs=4)


@DTYPES
@pytest.mark.parametrize("candidate", HOPPER, ids=str)
def test_random_problems(candidate, dtype, target):
    for seed, problem in enumerate(random_problems(candidate.pattern, 200, dtype, seed=7)):
        if candidate.accepts(problem, target) is None:
            config = candidate.configs(problem, target)[0]
            check_candidate(candidate, problem, config, "cuda", seed=seed)
