"""The kernel calls of a plan, held to PyTorch's unfused arithmetic in fp64.

prove_plan(plan, inputs, device)   what engines call: {(candidate, problem): why it is left out}
prove(job, target, device)         one call, in this process; raises Disproved
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastres import backends
from fastres.ahead import Job, jobs_of
from fastres.graph.fold import LayerParameters
from fastres.graph.ir import Node
from fastres.plan.candidate import REGISTRY, Candidate
from fastres.plan.measure import call_of, random_input, random_nodes, runner
from fastres.plan.planner import Plan
from fastres.plan.problem import ConvSpec, LinearSpec, Problem, Target
from fastres.plan.steps import on_device
from fastres.proof.record import Disproved, faults_of, wanted

# Different images; a larger batch repeats them, so that fp64 computes no more than these.
_DISTINCT = 3
# Threads that run the same plan wait for its proof.
_one_at_a_time = threading.Lock()


# -- one proof -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """What a few images give.

    Attributes:
        nodes: the layers, with random parameters. inputs: by name.
        exact: role → output in fp64. own: in the problem's type, by PyTorch's unfused calls.
    """

    nodes: dict[str, Node]
    inputs: dict[str, Tensor]
    exact: dict[str, Tensor]
    own: dict[str, Tensor]


def prove(job: Job, target: Target, device: torch.device | str) -> float:
    """The largest error, relative to the largest value of its output: of two runs on random data, bit by bit the same.

    With u the rounding of the type (fp32: of a sum as long; TF32: of its factors), every element has to be within
    4 x the largest error of PyTorch's own calls + 2 u max|y| of fp64's, and the worst image's norm within 2 x PyTorch's
    relative error + u. Raises Disproved where it is not, and what the kernel raises.
    """
    backends.load()
    candidate, problem, device = REGISTRY[job.candidate], job.problem, torch.device(device)
    if reason := candidate.accepts(problem, target):
        raise RuntimeError(reason)
    with torch.inference_mode(False), torch.no_grad(), on_device(device), _tf32("tf32" in problem.flags):
        expected = expect(problem.with_batch(min(problem.n, _DISTINCT)), str(device), job.planar)
        repeated = torch.arange(problem.n, device=device) % _DISTINCT
        inputs = {name: _like(x[repeated], x) for name, x in expected.inputs.items()}
        parameters = {role: LayerParameters(node) for role, node in expected.nodes.items()}
        buffers, constants = call_of(candidate, problem, job.config, parameters, inputs)
        run = runner(candidate, problem, job.config, inputs, buffers, constants)
        runs: list[dict[str, Tensor]] = []
        for _ in range(2):
            if not candidate.allocates:
                for role in problem.outputs:
                    buffers[role].fill_(math.nan)
            if buffers.workspace is not None:
                buffers.workspace.fill_(0xFF)  # NaN in every type
            runs.append({role: out.clone() for role, out in run().items()})
        worst = max((_hold(problem, role, out, expected) for role, out in runs[0].items()), default=0.0)
        for role, out in runs[1].items():
            if not torch.equal(out, runs[0][role]):
                raise Disproved(f"{role}: two runs differ")
        return worst


@lru_cache(maxsize=4)
def expect(problem: Problem, device: str, planar: frozenset[str]) -> Expected:
    """What a candidate for `problem` has to compute; the same at every call. Kept for the next configuration."""
    where = torch.device(device)
    cuda = [where] if where.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(0)
        nodes = random_nodes(problem, device)
        inputs = {name: random_input(problem, name, device, name in planar) for name in problem.inputs}
    reference = REGISTRY[f"reference.{problem.pattern}"]

    def computed(dtype: torch.dtype) -> dict[str, Tensor]:
        wanted = replace(problem, dtype=dtype)
        parameters = {role: LayerParameters(node, dtype) for role, node in nodes.items()}
        given = {name: x.to(wanted.input_dtype(name)) for name, x in inputs.items()}
        buffers, constants = call_of(reference, wanted, None, parameters, given)
        return runner(reference, wanted, None, given, buffers, constants)()

    return Expected(nodes, inputs, computed(torch.float64), computed(problem.dtype))


def _like(values: Tensor, x: Tensor) -> Tensor:
    """`values` in the strides of x, which no batch size changes."""
    return torch.empty_strided(values.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(values)


def _hold(problem: Problem, role: str, out: Tensor, expected: Expected) -> float:
    exact, own = expected.exact[role], expected.own[role]
    if not exact.numel():
        return 0.0
    unit = _rounding(problem, out.dtype)
    largest = exact.abs().max()
    own_error = (own.double() - exact).abs().max()
    own_norm = _norms(own.double() - exact, exact).max()
    error = norm = torch.zeros((), dtype=torch.float64, device=out.device)
    for some in out.split(_DISTINCT):  # fp64 of a large batch would not fit
        difference = some.double() - exact[: some.shape[0]]
        error = torch.maximum(error, difference.abs().max())  # NaN stays
        norm = torch.maximum(norm, _norms(difference, exact[: some.shape[0]]).max())
    for what, found, theirs, allowed in (
        ("an element", error, own_error, 4 * own_error + 2 * unit * largest),
        ("an image's relative norm", norm, own_norm, 2 * own_norm + unit),
    ):
        if not bool(found <= allowed):
            raise Disproved(
                f"{role}: {what} is {found.item():.2g} off, {allowed.item():.2g} may be, "
                f"PyTorch's own calls are {theirs.item():.2g} off"
            )
    return (error / largest.clamp_min(torch.finfo(torch.float64).tiny)).item()


def _norms(difference: Tensor, exact: Tensor) -> Tensor:
    """Each image's relative norm."""
    tiny = torch.finfo(torch.float64).tiny
    return difference.flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1).clamp_min(tiny)


def _rounding(problem: Problem, dtype: torch.dtype) -> float:
    eps = torch.finfo(dtype).eps
    if dtype.itemsize < 4:
        return eps
    depth = max(
        [math.prod(spec.weight_shape[1:]) for _, spec in problem.layers if isinstance(spec, ConvSpec)]
        + [spec.c for _, spec in problem.layers if isinstance(spec, LinearSpec)],
        default=1,
    )
    return max(math.sqrt(depth) * eps, 2.0**-10 if "tf32" in problem.flags else 0.0)


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """PyTorch's convolutions with TF32 factors, or without."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


# -- a plan's proofs -------------------------------------------------------------------------------------------------


def prove_plan(
    plan: Plan, inputs: Sequence[Any], device: torch.device, work: Callable[..., float] = prove
) -> dict[tuple[str, Problem], str]:
    """(candidate, problem) → why it must not run, of all kernel calls of `plan` on inputs like these."""
    if not wanted(device):
        return {}
    with _one_at_a_time:
        if plan.faults is None:
            calls = {key_of(job): job for job in jobs_of(plan, inputs) if of_ours(REGISTRY[job.candidate])}
            faults = faults_of(calls, device, work, plan.target, str(device))
            plan.faults = {(calls[key].candidate, calls[key].problem): why for key, why in faults.items()}
    return plan.faults


def of_ours(candidate: Candidate) -> bool:
    """Whether its device code is this library's; PyTorch's own calls are trusted."""
    return candidate.source.startswith("kernels/")


def key_of(job: Job) -> str:
    """What its proof is kept under. Batch sizes up to the same power of two count as one: who meets many would
    start a process for each."""
    planar = f" contiguous {','.join(sorted(job.planar))}" if job.planar else ""
    batch = 1 << (job.problem.n - 1).bit_length()
    return f"{job.candidate} n<={batch} {job.problem.layer_key} {job.config}{planar}"
