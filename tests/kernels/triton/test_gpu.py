"""The portable Triton kernels on a GPU: every distinct layer of the named networks, and random problems.

Poisoned and guarded outputs, two bitwise equal runs, fp64 oracle: see `check_candidate`. What takes long is
compiling, 1,100 kernels of about a second: tests are cut into shares that take 30 s at most, and `pytest -m gpu`
runs them in as many processes as there are cores (tests/conftest.py).
"""

import gc
from dataclasses import replace

import pytest
import torch
from problems import DISTINCT, NETWORKS, check_candidate, network_problems, random_problems, random_shares

pytest.importorskip("triton", reason="Triton cannot be imported")
from fastres.backends import triton_ops, triton_portable  # noqa: F401 (registers)
from fastres.plan.candidate import REGISTRY
from fastres.plan.target import detect

pytestmark = pytest.mark.gpu
NAMES = sorted(name for name, c in REGISTRY.candidates.items() if c.backend == "triton")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# How many parts a candidate's problems are cut into.
SHARES = [(name, share) for name in NAMES for share in range(4 if name == "triton.conv_bn_act" else 1)]


def pytest_generate_tests(metafunc):
    """24 random problems of each kernel and type: 650 kernels of 0.5 s of compiling, 20 s on 16 cores."""
    random_shares(metafunc, 24)


@pytest.fixture
def target():
    yield detect(torch.device("cuda", torch.cuda.current_device()))
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def ieee_reference():
    """PyTorch's own error is the yardstick: not that of TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("n", [1, 3, 32, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "share"), SHARES)
def test_layers_of_the_networks(name, share, dtype, n, target):
    candidate = REGISTRY[name]
    # Processes share the GPU's memory: of the largest tensors only those that the networks are run in.
    size = 112 if dtype == torch.float32 and n == 256 else 224
    taken = [
        problem
        for normalize in ((False, True) if name == "triton.stem_pool" else (False,))
        for problem in network_problems(candidate.pattern, tuple(NETWORKS), n, dtype, size, normalize)
        if candidate.accepts(problem, target) is None
    ]
    if not taken:
        pytest.skip(f"{name} takes none of these problems in {dtype}")
    shares = [other for other, _ in SHARES].count(name)
    for index, problem in enumerate(taken[share::shares]):
        config = candidate.configs(problem, target)[0]
        for planar in (False, True) if candidate.planar(problem) else (False,):
            check_candidate(candidate, problem, config, "cuda", seed=index, distinct=DISTINCT, planar=planar)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_random_problems(name, dtype, random_share, target):
    """Every configuration that tune may try, in turn, and each problem on whole numbers too. What is refused in IEEE
    fp32 is computed in TF32. `--random 90` makes 200 and more of each kernel."""
    candidate, checked = REGISTRY[name], 0
    problems = random_problems(candidate.pattern, random_share.stop, dtype, DTYPES.index(dtype))
    for index, problem in list(enumerate(problems))[random_share.start :]:
        if dtype == torch.float32 and candidate.accepts(problem, target) is not None:
            problem = replace(problem, flags=("tf32",))
        if candidate.accepts(problem, target) is None:
            configs = candidate.configs(problem, target)
            config = configs[index % len(configs)]
            # Whole numbers between two products may be too large for TF32.
            for integers in (False,) if problem.flags else (False, True):
                check_candidate(candidate, problem, config, "cuda", seed=index, integers=integers)
            checked += 1
    if not checked:
        pytest.skip(f"{name} takes none of these problems in {dtype}")


@pytest.mark.parametrize("name", NAMES)
def test_tf32(name, target):
    candidate, checked = REGISTRY[name], 0
    for problem in network_problems(candidate.pattern, ("resnet50",), 3, torch.float32):
        problem = replace(problem, flags=("tf32",))
        if candidate.accepts(problem, target) is None:
            check_candidate(candidate, problem, candidate.configs(problem, target)[0], "cuda")
            checked += 1
    if not checked:
        pytest.skip(f"{name} takes none of these problems in TF32")


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(32, 64, 56, 56), (3, 2048, 7, 7), (5, 17, 9, 11)], ids=str)
def test_training_primitives(shape, dtype, layout):
    """A whole BN + add + ReLU, forward and backward, against fp64 autograd and PyTorch's own error."""

    def tensor():
        return torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=layout)

    x, residual, grad = tensor(), tensor(), tensor()
    weight, bias = torch.rand(shape[1], device="cuda") + 0.5, torch.randn(shape[1], device="cuda")
    mean, var, sum_dy, sum_dy_xhat = (torch.empty(shape[1], device="cuda") for _ in range(4))
    out, grad_x, grad_residual = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)

    def run():
        triton_ops.bn_stats(x, mean, var)
        invstd = (var + 1e-5).rsqrt()
        scale = weight * invstd
        triton_ops.bn_act(x, residual, scale, bias - mean * scale, 1, 0.0, out)
        common = (grad, x, residual, out, mean, invstd, weight, bias, 1, 0.0)
        triton_ops.bn_act_backward_reduce(*common, sum_dy, sum_dy_xhat, grad_residual)
        count = x.numel() // shape[1]
        # as bn_act does: the second pass has dz in place of its gradient, and nothing but x beside it
        second = (grad_residual, x, None, None, mean, invstd, weight, bias, 0, 0.0)
        triton_ops.bn_act_backward(*second, sum_dy / count, sum_dy_xhat / count, grad_x, None)
        return [t.clone() for t in (out, grad_x, grad_residual, sum_dy, sum_dy_xhat)]

    def reference(kind):
        leaves = [t.detach().to(kind).requires_grad_() for t in (x, residual)]
        wide = torch.float64 if kind == torch.float64 else torch.float32
        affine = [t.to(wide).requires_grad_() for t in (weight, bias)]
        y = torch.nn.functional.batch_norm(leaves[0], None, None, *affine, training=True, eps=1e-5)
        y = (y + leaves[1]).relu()
        # The mask is that of the rounded output, which a kernel reads.
        y.backward(grad.to(kind) * (out > 0))
        return [y.detach(), *(leaf.grad for leaf in leaves), affine[1].grad, affine[0].grad]

    first, second = run(), run()
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other), "two runs differ"
    oracle, own = reference(torch.float64), reference(dtype)
    for ours, exact, theirs in zip(first, oracle, own, strict=True):
        limit = 1.5 * (theirs.double() - exact).norm() + 1e-6 * exact.norm()
        assert (ours.double() - exact).norm() <= limit
