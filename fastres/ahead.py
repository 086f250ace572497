"""Compiling the Triton kernels of a plan before they are bound: many at once, in processes of their own.

Triton compiles a kernel where it is first launched, one after another and one or two seconds each, and threads do not
help. What other processes compile lies in Triton's cache on disk, where this one finds it. They need no GPU and make
no CUDA context: the target is described to them.

    compile_plan(plan, inputs)   what engines call before a plan is bound
    jobs_of(plan, inputs)        the kernel calls of a plan
    compile_ahead(jobs, target)  compiles what the cache lacks; returns when it is there

Whatever goes wrong here is told to the log alone: binding compiles what is missing, as it would without this.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastres import env
from fastres.plan.candidate import REGISTRY
from fastres.plan.measure import alone
from fastres.plan.planner import Plan
from fastres.plan.problem import Problem, Target
from fastres.plan.steps import activation_strides

log = logging.getLogger("fastres")

# Fewer are compiled where they are needed: starting a process takes as long as compiling two kernels (2.5 s on a
# server's core).
_WORTH = 4
# What one kernel may take before its process is ended, in seconds; the largest take 20 on a slow core.
_PATIENCE_S = 120.0


@dataclass(frozen=True)
class Job:
    """One call of a candidate; `planar` names the inputs that come contiguous, others are channels_last."""

    candidate: str
    problem: Problem
    config: Any
    planar: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Source:
    """A Triton or Gluon kernel as a launch with these arguments specialises it, for a GPU that need not be here.

    Attributes:
        kernel: the `@triton.jit` or `@gluon.jit` function.
        arguments: all of its parameters by name; tensors may be on the meta device.
        options: num_warps and the like.
        capability: 90 for sm_90.
    """

    kernel: Any
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]
    capability: int

    def built(self) -> tuple[Any, Any, Any]:
        """(Triton's source object, its parsed options, its target), as `JITFunction.run` makes them."""
        from triton import knobs
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, make_backend
        from triton.runtime.jit import create_function_from_signature

        kernel, target = self.kernel, GPUTarget("cuda", self.capability, 32)
        backend = make_backend(target)
        given = {
            **self.options,
            "debug": self.options.get("debug", kernel.debug) or knobs.runtime.debug,
            "instrumentation_mode": knobs.compilation.instrumentation_mode,
        }
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, _ = bind(*[self.arguments[name] for name in kernel.arg_names], **given)
        options, signature, constants, attributes = kernel._pack_args(
            backend, dict(given), bound, specialization, dict(given)
        )
        make = ASTSource
        if kernel.is_gluon():
            from triton.experimental.gluon._runtime import GluonASTSource

            make = GluonASTSource
        return make(kernel, signature, constants, attributes), options, target

    def key(self) -> str:
        """What Triton's cache on disk files it under."""
        from triton._C.libtriton import get_cache_invalidating_env_vars
        from triton.compiler import make_backend
        from triton.runtime.cache import get_cache_key

        source, options, target = self.built()
        backend = make_backend(target)
        # as `triton.compile` does
        options = backend.parse_options({**options.__dict__, **source.parse_options()})
        text = get_cache_key(source, backend, options, env_vars=get_cache_invalidating_env_vars())
        return hashlib.sha256(text.encode()).hexdigest()

    def compile(self) -> Any:
        """Triton's compiled kernel, from its cache or made now and put there. Raises what Triton raises."""
        import triton

        source, options, target = self.built()
        return triton.compile(source, target=target, options=options.__dict__)


def sources(job: Job, target: Target) -> list[Source]:
    """The kernels that binding compiles, found on the meta device: no memory is taken and nothing computed."""
    candidate = REGISTRY[job.candidate]
    _, buffers, constants = alone(candidate, job.problem, job.config, "meta", job.planar)
    found = candidate.kernels(job.problem, job.config, buffers, constants)
    return [Source(kernel, arguments, options, target.capability) for kernel, arguments, options in found]


def jobs_of(plan: Plan, inputs: Sequence[Any] = ()) -> list[Job]:
    """The kernel calls that running `plan` on inputs like these binds."""
    given = dict(zip(plan.graph.inputs, inputs, strict=False))
    found: dict[Job, None] = {}
    for segment in plan.segments:
        if segment.candidate is not None:
            takes = segment.candidate.planar(segment.problem)
            planar = {
                name for name, value in segment.match.inputs if name in takes and _row_major(given.get(value))
            }
            found[Job(segment.candidate.name, segment.problem, segment.cost.config, frozenset(planar))] = None
    return list(found)


def _row_major(x: Any) -> bool:
    return isinstance(x, Tensor) and activation_strides(x, True) != activation_strides(x, False)


def missing(jobs: Iterable[Job], target: Target) -> list[Job]:
    """Those of which some kernel is not in Triton's cache, each binary once, those of many layers (which take
    longest) first."""
    from triton.runtime.cache import get_cache_manager

    found: dict[str, Job] = {}
    for job in jobs:
        try:
            keys = {source.key(): f"{source.kernel.__name__[:150]}.json" for source in sources(job, target)}
        except Exception as error:  # binding will tell
            log.info("not compiled ahead: %s on %s: %s", job.candidate, job.problem, error)
            continue
        for key, name in keys.items():
            if key not in found and not get_cache_manager(key).get_group(name):
                found[key] = job
    return sorted(dict.fromkeys(found.values()), key=lambda job: -len(job.problem.layers))


def compile_job(job: Job, target: Target) -> float:
    """Seconds that compiling took; what a worker does."""
    from fastres import backends

    # All of them: to unpickle a configuration has imported its own family alone.
    backends.load()
    start = time.perf_counter()
    for source in sources(job, target):
        source.compile()
    return time.perf_counter() - start


def processes() -> int:
    """How many may compile at once: FASTRES_COMPILE_JOBS, else the cores that this process may use (shared with
    torchrun's others), at most 16."""
    asked = env.compile_jobs()
    if asked is not None:
        return asked
    try:
        together = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    except ValueError:
        together = 1
    return min(16, len(os.sched_getaffinity(0)) // together)


def compile_plan(plan: Plan, inputs: Sequence[Any]) -> None:
    """`compile_ahead` of what running `plan` on inputs like these binds, once a plan."""
    if not plan.compiled:
        plan.compiled = True
        jobs = jobs_of(plan, inputs)
        compile_ahead([job for job in jobs if REGISTRY[job.candidate].compiles], plan.target)


def compile_ahead(
    jobs: Iterable[Job], target: Target, *, worth: int = _WORTH, until: float = float("inf")
) -> int:
    """Compiles what Triton's cache lacks of `jobs`, if it is `worth` as many kernels; how many it compiled.

    After `until` (time.monotonic) none is begun any more. Raises ValueError for a FASTRES_COMPILE_JOBS that is no
    number, and nothing else.
    """
    count = processes()
    try:
        return _compile_ahead(list(jobs), target, worth, count, until)
    except Exception as error:  # never the user's failure
        log.info("kernels are compiled as they are bound: %s: %s", type(error).__name__, error)
        return 0


def _compile_ahead(jobs: list[Job], target: Target, worth: int, count: int, until: float) -> int:
    # Only NVIDIA's GPUs have a capability: the target of others is not described here.
    if not jobs or count < 2 or not target.capability or not target.triton or _compiles_anyway():
        return 0
    start = time.perf_counter()
    wanted = missing(jobs, target)
    if len(wanted) < worth:
        return 0
    from fastres.workers import ask

    done = 0
    for job, answer in ask(
        wanted, compile_job, (target,), jobs=min(count, len(wanted)), patience_s=_PATIENCE_S, until=until
    ):
        done += not answer.reason
        if answer.reason:
            log.info("not compiled ahead: %s on %s: %s", job.candidate, job.problem, answer.reason)
    log.info("compiled %d of %d kernels in %.1f s", done, len(wanted), time.perf_counter() - start)
    return done


def _compiles_anyway() -> bool:
    """Whether what others compile would not be found, or nothing is compiled at all."""
    from triton import knobs

    return bool(knobs.runtime.interpret or knobs.compilation.always_compile)
