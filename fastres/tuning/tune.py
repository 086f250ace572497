"""Measuring the configurations of every candidate on a network's layers, and writing the user's tables.

What a table already has is left alone, so that a second run compiles and measures nothing. On a GPU all
work is done in other processes (fastres.workers): a kernel that hangs or crashes ends its process and not the tuning.
Configurations are first compiled and run once, in as many processes as there are cores, since compiling is
what takes long; then each is timed in one process, alone, on more buffers than the L2 holds.

The candidates' first configurations come first, of all problems; further ones only of candidates that are
near the best. Whenever it ends, what was measured until then is written.
"""

from __future__ import annotations

import csv
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastres import env
from fastres.plan.candidate import REGISTRY, Candidate
from fastres.plan.problem import Problem, Target
from fastres.tuning import table
from fastres.tuning.config import to_dict
from fastres.workers import Answer, ask

log = logging.getLogger("fastres.tuning")

# What one compilation and first run may take before its process is ended, in seconds; and one timing.
_COMPILE_S, _TIMING_S = 90.0, 20.0
# Configurations of every candidate that are tried in any case; further ones where its best so far takes at most
# this many times the best candidate's time.
_FIRST, _WITHIN = 2, 1.5
# The share of the time allowed that compiling may take, wave by wave.
_COMPILING = 0.6
# What the log of trials says of the machine.
_LOGGED = ("gpu", "driver", "torch", "triton", "fastres", "date")
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

    `candidates` names some ("hopper.dual") or their families ("hopper"); empty: all but "reference". What
    FASTRES_BACKENDS leaves out is not among them.
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
    if env.excluded() & {candidate.name, candidate.backend}:
        return False
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
    thorough: bool = False,
    limit_s: float = float("inf"),
    jobs: int | None = None,
    budget_s: float = 0.05,
    log_to: Path | None = None,
    on_result: Callable[[Result], None] = lambda result: None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """Measure and write the user's tables.

    Args:
        candidates: see `wanted`. user: folder of the tables; default `table.user_dir()`.
        again: measure also what the tables have.
        thorough: every configuration of every candidate, near the best or not.
        limit_s: seconds after which nothing new is begun.
        jobs: processes that compile; default: as many as cores, at most 16; 0: everything in this process,
            without its protection.
        budget_s: seconds of timing a configuration.
        log_to: a CSV file that every trial is appended to.
        on_result: called with each result at the end; on_progress: with a line of text now and then.
    """
    user = table.user_dir() if user is None else user
    todo = list(wanted(problems, target, candidates=candidates, user=user, again=again))
    if not todo:
        return []
    if device.type != "cuda":
        jobs = 0
    elif jobs is None:
        jobs = min(16, os.cpu_count() or 1)
    run = _Run(todo, target, device, jobs, budget_s, time.monotonic() + limit_s, on_progress)
    header = _header(device)
    try:
        for first, end in ((0, _FIRST), (_FIRST, None)):
            run.wave(first, end, thorough)
            run.write(user, header)  # what comes next may be interrupted for good
    finally:
        run.write(user, header)
        if log_to is not None:
            run.log(log_to, header)
    results = run.results()
    for result in results:
        on_result(result)
    return results


@dataclass
class _Run:
    """The trials of one call of `tune`, and what came of them."""

    todo: list[tuple[Problem, list[Candidate]]]
    target: Target
    device: torch.device
    jobs: int
    budget_s: float
    until: float
    on_progress: Callable[[str], None]
    # (candidate, problem) → configuration's number → milliseconds, or why there are none
    answers: dict[tuple[str, Problem], dict[int, Answer]] = field(default_factory=dict)
    told: float = 0.0

    def wave(self, first: int, end: int | None, thorough: bool) -> None:
        """Compile and time the configurations [first, end) of every candidate that is worth it."""
        trials = [
            Trial(candidate.name, problem, i)
            for problem, found in self.todo
            for candidate in found
            if thorough or not first or self._near(candidate.name, problem)
            for i in range(len(candidate.configs(problem, self.target)))[first:end]
        ]
        trials.sort(key=lambda trial: trial.config)
        for done, (trial, answer) in enumerate(self._timed(trials), 1):
            self._keep(trial, answer)
            self._tell(f"timed {done} of {len(trials)}")

    def _timed(self, trials: list[Trial]) -> Iterator[tuple[Trial, Answer]]:
        where = self.target, str(self.device)
        if not self.jobs:
            for trial in trials:
                if time.monotonic() > self.until:
                    return
                try:
                    yield trial, Answer(time_trial(trial, *where, self.budget_s))
                except Exception as error:  # the next configuration may run
                    yield trial, Answer(reason=f"{type(error).__name__}: {error}".strip().splitlines()[0])
            return
        now, compiled = time.monotonic(), []
        until = now + _COMPILING * (self.until - now)
        asked = ask(trials, first_run, where, jobs=self.jobs, patience_s=_COMPILE_S, until=until)
        for trial, answer in asked:
            if answer.reason:
                self._keep(trial, answer)
            else:
                compiled.append(trial)
            self._tell(f"compiled {len(compiled)} of {len(trials)}")
        compiled.sort(key=lambda trial: trial.config)
        where = *where, self.budget_s
        yield from ask(compiled, time_trial, where, jobs=1, patience_s=_TIMING_S, until=self.until)

    def _keep(self, trial: Trial, answer: Answer) -> None:
        self.answers.setdefault((trial.candidate, trial.problem), {})[trial.config] = answer

    def _tell(self, text: str) -> None:
        if time.monotonic() > self.told + 10.0:
            self.told = time.monotonic()
            self.on_progress(text)

    def _best(self, candidate: str, problem: Problem) -> tuple[float, int] | None:
        """(milliseconds, number) of the candidate's fastest configuration so far."""
        answers = self.answers.get((candidate, problem), {})
        return min(((a.value, i) for i, a in answers.items() if not a.reason), default=None)

    def _near(self, candidate: str, problem: Problem) -> bool:
        own = self._best(candidate, problem)
        times = [best[0] for name in REGISTRY.candidates if (best := self._best(name, problem))]
        return own is None or own[0] <= _WITHIN * min(times)

    def results(self) -> list[Result]:
        made = []
        for problem, found in self.todo:
            for candidate in found:
                if best := self._best(candidate.name, problem):
                    config = candidate.configs(problem, self.target)[best[1]]
                    made.append(Result(candidate.name, problem, config, best[0]))
                    continue
                reason = "it has no configuration for this problem"
                if candidate.configs(problem, self.target):
                    reason = "the time was up before its turn"
                for answer in self.answers.get((candidate.name, problem), {}).values():
                    reason = answer.reason
                made.append(Result(candidate.name, problem, reason=reason))
        return made

    def write(self, user: Path, header: dict[str, str]) -> None:
        """The best of every candidate so far into its table, with the others' times beside it."""
        results = [result for result in self.results() if not result.reason]
        for name in {result.candidate for result in results}:
            entries = {}
            for result in results:
                if result.candidate == name:
                    peers = {
                        other.candidate: round(other.ms, 6)
                        for other in sorted(results, key=lambda r: r.candidate)
                        if other.problem == result.problem and other.candidate != name
                    }
                    config = to_dict(result.config)
                    entries[result.problem.key] = {
                        "config": config,
                        "ms": round(result.ms, 6),
                        "peers": peers,
                    }
            table.write(user, self.target.arch, name, header, entries)

    def log(self, file: Path, header: dict[str, str]) -> None:
        """Append every trial to a CSV file."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a", newline="") as stream:
            rows = csv.writer(stream)
            if not stream.tell():
                rows.writerow(["problem", "candidate", "config", "ms", "floor_ms", "reason", *_LOGGED])
            for (name, problem), answers in self.answers.items():
                configs = REGISTRY[name].configs(problem, self.target)
                floor = self.target.floor_ms(problem)
                for i, answer in sorted(answers.items()):
                    ms = "" if answer.reason else f"{answer.value:.6f}"
                    known = "" if floor is None else f"{floor:.6f}"
                    made = [header.get(column, "") for column in _LOGGED]
                    rows.writerow([problem.key, name, configs[i] or "", ms, known, answer.reason, *made])


def first_run(trial: Trial, target: Target, device: str) -> None:
    """Compile a configuration and run it once, to the end."""
    _bind(trial, target, device)()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def time_trial(trial: Trial, target: Target, device: str, budget_s: float) -> float:
    """Milliseconds of a configuration: on a GPU in a CUDA graph, on more buffers than the L2 holds."""
    from fastres.bench.timing import rotation, time_gpu, time_interleaved

    with torch.inference_mode(False), torch.no_grad():
        if torch.device(device).type != "cuda":
            run = _bind(trial, target, device)
            return time_interleaved({"": run}, budget_s=budget_s, warmup_s=budget_s / 5)[""].median
        size = max(trial.problem.bytes, 1)
        most = int(_MEMORY_SHARE * torch.cuda.mem_get_info(device)[0] // size)
        runs = [_bind(trial, target, device) for _ in range(max(1, min(rotation(size, device), most)))]
        runs[0]()
        return time_gpu(runs, budget_s=budget_s).median


def _bind(trial: Trial, target: Target, device: str) -> Callable[[], Any]:
    from fastres import backends
    from fastres.plan.measure import bind_alone

    if not REGISTRY.candidates:  # a process of its own
        backends.load()
    candidate = REGISTRY[trial.candidate]
    # loads the library that its kernels are in
    if reason := candidate.accepts(trial.problem, target):
        raise RuntimeError(reason)
    config = candidate.configs(trial.problem, target)[trial.config]
    return bind_alone(candidate, trial.problem, config, torch.device(device))


def _header(device: torch.device) -> dict[str, str]:
    from fastres.bench.environment import environment

    made = environment(device)
    names = ("driver", "clock_sm", "power", "threads", "torch", "cuda", "cudnn", "triton", "fastres", "date")
    header = {"kind": "measured", "gpu": made.device, "source": "fastres tune"}
    return header | {name: value for name in names if (value := getattr(made, name))}
