"""Kernels prove themselves on a GPU before a plan trusts them with anybody's images.

Kernels written by hand meet GPUs, drivers and compilers that nobody has tried together. So before a plan runs for the
first time, each of its kernel calls runs on random data in a process of its own and is held to PyTorch's unfused
arithmetic in fp64. What is wrong, crashes or hangs there is left out, with the reason in the log and in the report, and
the next best is planned.

    prove_plan(plan, inputs, device)   what engines call: {(candidate, problem): why it is left out}
    prove(job, target, device)         one call held to fp64, in this process; raises Disproved

What was found is kept under FASTRES_CACHE/proofs, for this GPU, driver, PyTorch, Triton and these sources: nothing is
proved twice. FASTRES_PROVE=0 trusts every kernel.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastres
from fastres import backends, env
from fastres.ahead import Job, jobs_of
from fastres.graph.fold import LayerParameters
from fastres.graph.ir import Node
from fastres.plan.candidate import REGISTRY
from fastres.plan.measure import call_of, random_input, random_nodes, runner
from fastres.plan.planner import Plan
from fastres.plan.problem import ConvSpec, LinearSpec, Problem, Target
from fastres.plan.steps import on_device

log = logging.getLogger("fastres")

# Where kernels meet what nobody has tried; those of a CPU are tested on CPUs.
DEVICES = ("cuda",)
# Different images; a larger batch repeats them, so that fp64 computes no more than these.
_DISTINCT = 3
# What one proof may take before its process is ended, in seconds; it compiles where nothing was compiled ahead.
_PATIENCE_S = 60.0
_GREETING = "does the GPU answer there?"
# Threads that run the same plan wait for its proof.
_one_at_a_time = threading.Lock()


class Disproved(Exception):
    """A kernel's numbers are wrong."""


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
    """`values` in the memory order of x."""
    planar = x.dim() != 4 or x.is_contiguous()
    order = torch.contiguous_format if planar else torch.channels_last
    return values.contiguous(memory_format=order)


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
    """(candidate, problem) → why it must not run, of all kernel calls of `plan` on inputs like these.

    What cannot be proved, because no process can be started or the GPU's memory is full, is trusted. Never raises, but
    ValueError for a FASTRES_PROVE that is neither 0 nor 1.
    """
    if device.type not in DEVICES or not env.proves():
        return {}
    with _one_at_a_time:
        if plan.faults is None:
            try:
                jobs = [
                    j for j in jobs_of(plan, inputs) if REGISTRY[j.candidate].source.startswith("kernels/")
                ]
                plan.faults = _prove(jobs, plan.target, device, work)
            except Exception as error:  # never the user's failure
                log.info("kernels are not proved: %s: %s", type(error).__name__, error)
                plan.faults = {}
    return plan.faults


def _prove(
    jobs: list[Job], target: Target, device: torch.device, work: Callable[..., float]
) -> dict[tuple[str, Problem], str]:
    record = Record.of(device)
    if unknown := [job for job in jobs if job not in record]:
        start = time.perf_counter()
        _find_out(unknown, record, (target, str(device), work))
        took = time.perf_counter() - start
        log.info("proved %d kernel calls in %.1f s", sum(job in record for job in unknown), took)
    return {(job.candidate, job.problem): fault for job in jobs if (fault := record.fault(job))}


def _find_out(jobs: list[Job], record: Record, context: tuple) -> None:
    """Into the record, what can be found out."""
    from fastres.workers import ask

    answers = False

    def pieces() -> Iterator[Any]:
        yield _GREETING
        if answers:
            yield from jobs

    for job, answer in ask(pieces(), _asked, context, jobs=1, patience_s=_PATIENCE_S):
        fault = why_left_out(answer.reason)
        if job == _GREETING:
            answers = not answer.reason
            if not answers:
                log.info("kernels are not proved, a process of their own has no GPU: %s", answer.reason)
        elif answer.reason and not fault:
            log.info("not proved: %s on %s: %s", job.candidate, job.problem, answer.reason)
        else:
            record.add(job, fault)


def _asked(job: Any, target: Target, device: str, work: Callable[..., float]) -> float:
    if job == _GREETING:
        backends.load()
        return float(torch.zeros(1, device=device).item())
    return work(job, target, device)


def why_left_out(reason: str) -> str:
    """The reason as a report says it, where it speaks against the kernel; else "" (no memory, no process)."""
    if reason.startswith(f"{Disproved.__name__}: "):
        return f"it was wrong on this device: {reason.partition(': ')[2]}"
    if "out of memory" in reason or "SIGKILL" in reason or "did not start" in reason:
        return ""
    if "its process died" in reason or "CUDA error" in reason or "Triton Error [CUDA]" in reason:
        return f"it crashed on this device: {reason}"
    return f"it hung on this device: {reason}" if "did not end" in reason else ""


# -- what is known ---------------------------------------------------------------------------------------------------


class Record:
    """What was proved on a device with the software that is here: a line of text a kernel call, "" or its fault.

    Processes append to one file; what cannot be written is known to this process alone.
    """

    def __init__(self, path: Path):
        self.path = path
        self.known: dict[str, str] = {}
        with contextlib.suppress(OSError):
            for line in path.read_text().splitlines():
                key, tab, fault = line.partition("\t")
                if tab:
                    self.known[key] = fault

    @staticmethod
    def of(device: torch.device) -> Record:
        return _record(env.cache_dir() / "proofs", _surroundings(device))

    def __contains__(self, job: Job) -> bool:
        return _key(job) in self.known

    def fault(self, job: Job) -> str:
        fault = self.known.get(_key(job), "")
        return f"{fault} (noted in {self.path})" if fault else ""

    def add(self, job: Job, fault: str = "") -> None:
        key, fault = _key(job), " ".join(fault.split())
        self.known[key] = fault
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write(f"{key}\t{fault}\n")
        except OSError as error:
            log.info("proofs are not kept: %s", error)


def _key(job: Job) -> str:
    planar = f" contiguous {','.join(sorted(job.planar))}" if job.planar else ""
    return f"{job.candidate} {job.problem.key} {job.config}{planar}"


@cache
def _record(folder: Path, surroundings: str) -> Record:
    return Record(folder / f"{hashlib.sha256(surroundings.encode()).hexdigest()[:16]}.txt")


@cache
def _surroundings(device: torch.device) -> str:
    """What a proof holds for."""
    from fastres.plan.target import detect

    target = detect(device)
    driver = ""
    with contextlib.suppress(OSError):
        driver = Path("/proc/driver/nvidia/version").read_text()
    return "\n".join([target.name, target.arch, driver, torch.__version__, _version("triton"), _sources()])


@cache
def _sources() -> str:
    """A digest of the kernels and of what launches them."""
    folder, digest = Path(fastres.__file__).parent, hashlib.sha256()
    for path in sorted([*(folder / "kernels").rglob("*"), *(folder / "backends").rglob("*")]):
        if path.suffix in (".py", ".cu", ".cuh", ".cpp", ".h"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
