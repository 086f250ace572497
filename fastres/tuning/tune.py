"""Measuring every configuration of every candidate on a network's layers, and writing the user's tables.

What a table already has is left alone, so that a second run compiles and measures nothing. On a GPU,
configurations are first compiled and run once in processes of their own, several at a time: compiling is
what takes long, and a kernel that hangs or crashes ends its process and not the tuning. Then each is timed
alone, on more buffers than the L2 holds.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastres.plan.candidate import REGISTRY, Candidate
from fastres.plan.problem import Problem, Target
from fastres.tuning import table
from fastres.tuning.config import to_dict

log = logging.getLogger("fastres.tuning")

# What one compilation and first run may take before its process is ended, in seconds.
_PATIENCE_S = 180.0
# Buffers to rotate through may take this share of the GPU's free memory.
_MEMORY_SHARE = 0.4


@dataclass(frozen=True)
class Trial:
    """One configuration of one candidate on one problem; `config` counts in `Candidate.configs`."""

    candidate: str
    problem: Problem
    config: int


@dataclass(frozen=True)
class Result:
    """A candidate's best configuration on a problem; or, without one, why every one failed."""

    candidate: str
    problem: Problem
    config: Any = None
    ms: float = 0.0
    reason: str = ""


def problems_of(
    model: nn.Module, shape: Sequence[int], dtype: torch.dtype, flags: tuple[str, ...] = ()
) -> list[Problem]:
    """The distinct problems that any registered pattern finds in `model` on inputs of `shape`."""
    from fastres.graph.capture import capture
    from fastres.plan.specs import problem_of, propagate

    graph = capture(model)
    shapes = propagate(graph, (torch.empty(tuple(shape), device="meta", dtype=dtype),), dtype)
    users, found = graph.users(), {}
    for start in range(len(graph.nodes)):
        for pattern in REGISTRY.patterns():
            for match in pattern.matches(graph.nodes, start, users):
                problem = problem_of(match, shapes, dtype, flags)
                if problem is not None:
                    found[problem] = None
    return list(found)


def wanted(
    problems: Iterable[Problem],
    target: Target,
    *,
    candidates: Sequence[str] = (),
    user: Path | None = None,
    again: bool = False,
) -> Iterator[tuple[Problem, list[Candidate]]]:
    """Per problem, the candidates to measure: those that accept it and, unless `again`, are not in the
    user's table.

    `candidates` names some ("hopper.dual") or their families ("hopper"); empty: all but "reference".
    """
    user = table.user_dir() if user is None else user
    known = {name: table.load(table.path(user, target.arch, name)) for name in REGISTRY.candidates}
    for problem in problems:
        found = []
        for candidate in REGISTRY.candidates.values():
            if candidate.pattern.name != problem.pattern or not _named(candidate, candidates):
                continue
            entry = known[candidate.name] and known[candidate.name].layers.get(problem.layer_key, {}).get(
                problem.n
            )
            if (again or not entry) and candidate.accepts(problem, target) is None:
                found.append(candidate)
        if found:
            yield problem, found


def _named(candidate: Candidate, names: Sequence[str]) -> bool:
    if not names:
        return candidate.backend != "reference"
    return candidate.name in names or candidate.backend in names


def tune(
    problems: Iterable[Problem],
    target: Target,
    device: torch.device,
    *,
    candidates: Sequence[str] = (),
    user: Path | None = None,
    again: bool = False,
    jobs: int | None = None,
    budget_s: float = 0.1,
    on_result: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Measure and write the user's tables, problem by problem.

    Args:
        candidates: see `wanted`. user: folder of the tables; default `table.user_dir()`.
        again: measure also what the tables have.
        jobs: processes that compile; default: as many as cores, at most 8; 0: compile here (no protection).
        budget_s: seconds of timing a configuration.
        on_result: called with each result as it comes.
    """
    user = table.user_dir() if user is None else user
    todo = list(wanted(problems, target, candidates=candidates, user=user, again=again))
    unfit: dict[Trial, str] = {}
    if device.type == "cuda" and jobs != 0:
        trials = [trial for problem, found in todo for c in found for trial in _trials(c, problem, target)]
        unfit = _compile(trials, target, device, jobs or min(8, os.cpu_count() or 1))
    header = _header(device) if todo else {}
    results = []
    for problem, found in todo:
        here = [_best(candidate, problem, target, device, unfit, budget_s) for candidate in found]
        times = {result.candidate: result.ms for result in here if not result.reason}
        for result in here:
            results.append(result)
            on_result(result)
            if not result.reason:
                peers = {name: round(ms, 6) for name, ms in sorted(times.items()) if name != result.candidate}
                entry = {"config": to_dict(result.config), "ms": round(result.ms, 6), "peers": peers}
                table.write(user, target.arch, result.candidate, header, {problem.key: entry})
    return results


def _trials(candidate: Candidate, problem: Problem, target: Target) -> list[Trial]:
    return [Trial(candidate.name, problem, i) for i in range(len(candidate.configs(problem, target)))]


def _best(candidate, problem, target, device, unfit: dict[Trial, str], budget_s: float) -> Result:
    best, reason = None, "it has no configuration for this problem"
    configs = candidate.configs(problem, target)
    for trial in _trials(candidate, problem, target):
        if trial in unfit:
            reason = unfit[trial]
            continue
        config = configs[trial.config]
        try:
            ms = _time(candidate, problem, config, device, budget_s)
        except Exception as error:  # the next configuration may run
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            log.info("%s on %s [%s]: %s", candidate, problem, config, reason)
            continue
        if best is None or ms < best.ms:
            best = Result(candidate.name, problem, config, ms)
    return best or Result(candidate.name, problem, reason=reason)


def _time(
    candidate: Candidate, problem: Problem, config: Any, device: torch.device, budget_s: float
) -> float:
    from fastres.bench.timing import rotation, time_gpu, time_interleaved
    from fastres.plan.measure import bind_alone

    with torch.inference_mode(False), torch.no_grad():
        if device.type != "cuda":
            run = bind_alone(candidate, problem, config, device)
            return time_interleaved({"": run}, budget_s=budget_s, warmup_s=budget_s / 5)[""].median
        copies = rotation(problem.bytes, device)
        free = torch.cuda.mem_get_info(device)[0]
        copies = max(1, min(copies, int(_MEMORY_SHARE * free // max(problem.bytes, 1))))
        runs = [bind_alone(candidate, problem, config, device) for _ in range(copies)]
        runs[0]()
        return time_gpu(runs, budget_s=budget_s).median


def _header(device: torch.device) -> dict[str, str]:
    from fastres.bench.environment import environment

    made = environment(device)
    names = ("driver", "clock_sm", "power", "threads", "torch", "cuda", "cudnn", "triton", "fastres", "date")
    header = {"kind": "measured", "gpu": made.device, "source": "fastres tune"}
    return header | {name: value for name in names if (value := getattr(made, name))}


def _compile(trials: list[Trial], target: Target, device: torch.device, jobs: int) -> dict[Trial, str]:
    """Compile and run each trial once in one of `jobs` processes; trial → why it cannot run."""
    context = multiprocessing.get_context("spawn")
    waiting, unfit = list(reversed(trials)), {}
    busy: dict[Any, tuple[Any, Trial | None, float]] = {}

    def start() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_worker, args=(theirs, target, str(device)), daemon=True)
        process.start()
        theirs.close()
        busy[ours] = process, None, time.monotonic()
        give(ours)

    def give(connection) -> None:
        process, _, _ = busy[connection]
        if not waiting:
            connection.send(None)
            del busy[connection]
            process.join()
            return
        trial = waiting.pop()
        connection.send(trial)
        busy[connection] = process, trial, time.monotonic()

    for _ in range(min(jobs, len(trials))):
        start()
    while busy:
        for connection in wait(list(busy), timeout=1.0):
            process, trial, _ = busy[connection]
            try:
                reason, alive = connection.recv()
            except EOFError:
                process.join()
                reason, alive = f"its process ended with exit code {process.exitcode}", False
            if alive:
                give(connection)
            else:
                del busy[connection]
                if waiting:
                    start()
            if reason:
                unfit[trial] = reason
        for connection, (process, trial, since) in list(busy.items()):
            if time.monotonic() - since > _PATIENCE_S:
                process.kill()
                process.join()
                unfit[trial] = f"it did not end within {_PATIENCE_S:.0f} s"
                del busy[connection]
                if waiting:
                    start()
    return unfit


def _worker(connection, target: Target, device: str) -> None:
    """Answers every trial with (why it cannot run, whether this process can go on)."""
    from fastres import backends
    from fastres.plan.measure import bind_alone

    backends.load()
    alive = True
    while alive and (trial := connection.recv()) is not None:
        reason = ""
        try:
            candidate = REGISTRY[trial.candidate]
            config = candidate.configs(trial.problem, target)[trial.config]
            bind_alone(candidate, trial.problem, config, torch.device(device))()
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            # An error of the device takes the process's context with it.
            alive = "CUDA error" not in reason
        connection.send((reason, alive))
