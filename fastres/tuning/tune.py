"""Measuring the configurations of every candidate on a network's layers, and writing the user's tables.

What a table already has is left alone, so that a second run compiles and measures nothing. The configurations that the
network's time most likely depends on come first (order.py); further ones only of candidates that are near the best. On
a GPU all work is done in other processes (fastres.workers): kernels are compiled by as many as there are cores, since
that takes long and needs no GPU, and each configuration is timed as soon as it is compiled, by one process that has the
GPU to itself, on more buffers than the L2 holds. A kernel that hangs or crashes ends that process and not the tuning.

Every trial is logged as it ends, and every few seconds the tables are written: whenever tuning ends, nothing is lost.
"""

from __future__ import annotations

import csv
import heapq
import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastres import backends, env
from fastres.ahead import Job, compile_job
from fastres.plan.candidate import REGISTRY, Candidate
from fastres.plan.problem import Problem, Target
from fastres.tuning import table
from fastres.tuning.config import to_dict
from fastres.tuning.order import Trial, ranked
from fastres.workers import Answer, ask

# What one compilation may take before its process is ended, in seconds; and one timing.
_COMPILE_S, _TIMING_S = 90.0, 20.0
# Configurations of every candidate that are tried in any case; further ones where its best so far takes at most
# this many times the best candidate's time.
_FIRST, _WITHIN = 2, 1.5
# A candidate that has ended so many processes is tried no more: starting another takes seconds.
_MOST_DEATHS = 2
# Compiled and not yet timed, for each process that compiles: more would be guesses about what is worth it.
_AHEAD = 4
# The tables are written every so many seconds.
_WRITE_S = 10.0
# What the log of trials says of the machine.
_LOGGED = ("gpu", "driver", "torch", "triton", "fastres", "date")
# The reason of a result that nothing was tried for.
NOT_REACHED = "the time was up before its turn"
# Buffers to rotate through may take this share of the GPU's free memory.
_MEMORY_SHARE = 0.4


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
) -> dict[Problem, int]:
    """The distinct problems that any registered pattern finds in `model` on inputs of `shape`, and how often."""
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
                    found[problem] = found.get(problem, 0) + 1
    return found


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
    problems: Iterable[Problem] | Mapping[Problem, int],
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
        problems: as a mapping, with how often each occurs in its network.
        candidates: see `wanted`. user: folder of the tables; default `table.user_dir()`.
        again: measure also what the tables have.
        thorough: every configuration of every candidate, near the best or not.
        limit_s: seconds after which nothing new is begun.
        jobs: processes that compile; default: two less than there are cores, at most 16; 0: everything in this
            process, without its protection.
        budget_s: seconds of timing a configuration.
        log_to: a CSV file that every trial is appended to as it ends.
        on_result: called with each result at the end; on_progress: with a line of text now and then.
    """
    until = time.monotonic() + limit_s
    user = table.user_dir() if user is None else user
    todo = list(wanted(problems, target, candidates=candidates, user=user, again=again))
    if not todo:
        return []
    if device.type != "cuda":
        jobs = 0
    elif jobs is None:
        jobs = max(1, min(16, len(os.sched_getaffinity(0)) - 2))
    counts = problems if isinstance(problems, Mapping) else {}
    trials = ranked(todo, counts, target)
    run = _Run(todo, trials, target, device, jobs, budget_s, until, thorough, _header(device), log_to)
    written = time.monotonic()
    try:
        for done, (trial, answer) in enumerate(run.outcomes(), 1):
            run.keep(trial, answer)
            if time.monotonic() > written + _WRITE_S:
                run.write(user)
                on_progress(f"tried {done} of at most {len(trials)}")
                written = time.monotonic()
    finally:
        run.stopped = True
        run.write(user)
    results = run.results()
    for result in results:
        on_result(result)
    return results


@dataclass
class _Run:
    """The trials of one call of `tune`, and what came of them."""

    todo: list[tuple[Problem, list[Candidate]]]
    trials: list[tuple[float, Trial]]
    target: Target
    device: torch.device
    jobs: int
    budget_s: float
    until: float
    thorough: bool
    header: dict[str, str]
    log_to: Path | None
    # (candidate, problem) → configuration's number → milliseconds, or why there are none
    answers: dict[tuple[str, Problem], dict[int, Answer]] = field(default_factory=dict)
    deaths: Counter[str] = field(default_factory=Counter)
    # compiled and not yet timed: (-value, order, trial)
    ready: list[tuple[float, int, Trial]] = field(default_factory=list)
    compiling: bool = False
    stopped: bool = False
    # two threads compile and time
    changed: threading.Condition = field(default_factory=threading.Condition)

    def outcomes(self) -> Iterator[tuple[Trial, Answer]]:
        """Every trial that was timed; those that did not compile are kept on the way."""
        if not self.jobs:
            for _, trial in self._worth():
                if time.monotonic() > self.until:
                    return
                try:
                    answer = Answer(time_trial(trial, self.target, str(self.device), self.budget_s))
                except Exception as error:  # the next configuration may run
                    answer = Answer(reason=f"{type(error).__name__}: {error}".strip().splitlines()[0])
                yield trial, answer
            return
        self.compiling = True
        threading.Thread(target=self._compile, daemon=True).start()
        where = self.target, str(self.device), self.budget_s
        for trial, answer in ask(
            self._next(), time_trial, where, jobs=1, patience_s=_TIMING_S, until=self.until
        ):
            self.deaths[trial.candidate] += "did not" in answer.reason or "process died" in answer.reason
            yield trial, answer

    def _worth(self) -> Iterator[tuple[float, Trial]]:
        """(value, trial) in their order, without further configurations of what is far from the best; those of
        which nothing is known yet wait until the others are through."""
        later = []
        for last in (False, True):
            for value, trial in later if last else self.trials:
                if trial.config < _FIRST or self.thorough:
                    yield value, trial
                elif self._best(trial.candidate, trial.problem) is None and not last:
                    later.append((value, trial))
                elif self._near(trial.candidate, trial.problem):
                    yield value, trial

    def _compile(self) -> None:
        """The other thread: what is worth it is compiled, and then ready to be timed."""
        values: dict[Job, tuple[float, Trial]] = {}
        order = itertools.count()

        def enqueue(value: float, trial: Trial) -> None:
            with self.changed:
                heapq.heappush(self.ready, (-value, next(order), trial))
                self.changed.notify_all()

        def jobs() -> Iterator[Job]:
            for value, trial in self._worth():
                with self.changed:
                    while len(self.ready) > _AHEAD * self.jobs and self._going():
                        self.changed.wait(0.2)
                if not self._going():
                    return
                candidate = REGISTRY[trial.candidate]
                if not candidate.compiles:
                    enqueue(value, trial)
                    continue
                planar = candidate.planar(trial.problem)
                job = Job(trial.candidate, trial.problem, trial.choice(self.target), planar)
                values[job] = value, trial
                yield job

        try:
            asked = ask(
                jobs(), compile_job, (self.target,), jobs=self.jobs, patience_s=_COMPILE_S, until=self.until
            )
            for job, answer in asked:
                value, trial = values.pop(job)
                if answer.reason:
                    self.keep(trial, answer)
                else:
                    enqueue(value, trial)
        finally:
            with self.changed:
                self.compiling = False
                self.changed.notify_all()

    def _going(self) -> bool:
        return not self.stopped and time.monotonic() < self.until

    def _next(self) -> Iterator[Trial]:
        """The most valuable of what is ready, as soon as something is."""
        while True:
            with self.changed:
                while not self.ready and self.compiling and self._going():
                    self.changed.wait(0.2)
                if not self.ready or not self._going():
                    return
                _, _, trial = heapq.heappop(self.ready)
                self.changed.notify_all()
            if self.deaths[trial.candidate] < _MOST_DEATHS:
                yield trial
            else:
                self.keep(trial, Answer(reason=f"not tried: it has ended {_MOST_DEATHS} processes"))

    def keep(self, trial: Trial, answer: Answer) -> None:
        with self.changed:
            self.answers.setdefault((trial.candidate, trial.problem), {})[trial.config] = answer
            if self.log_to is not None:
                self._log(trial, answer)

    def _best(self, candidate: str, problem: Problem) -> tuple[float, int] | None:
        """(milliseconds, number) of the candidate's fastest configuration so far."""
        with self.changed:
            answers = dict(self.answers.get((candidate, problem), {}))
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
                    reason = NOT_REACHED
                for answer in self.answers.get((candidate.name, problem), {}).values():
                    reason = answer.reason
                made.append(Result(candidate.name, problem, reason=reason))
        return made

    def write(self, user: Path) -> None:
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
            table.write(user, self.target.arch, name, self.header, entries)

    def _log(self, trial: Trial, answer: Answer) -> None:
        """Append the trial to the CSV file."""
        self.log_to.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log_to, "a", newline="") as stream:
            rows = csv.writer(stream)
            if not stream.tell():
                rows.writerow(["problem", "candidate", "config", "ms", "floor_ms", "reason", *_LOGGED])
            floor = self.target.floor_ms(trial.problem)
            ms = "" if answer.reason else f"{answer.value:.6f}"
            known = "" if floor is None else f"{floor:.6f}"
            made = [self.header.get(column, "") for column in _LOGGED]
            config = trial.choice(self.target) or ""
            rows.writerow([trial.problem.key, trial.candidate, config, ms, known, answer.reason, *made])


def time_trial(trial: Trial, target: Target, device: str, budget_s: float) -> float:
    """Milliseconds of a configuration: on a GPU, once it is proved, in a CUDA graph and on more buffers than the L2
    holds."""
    from fastres.bench.timing import rotation, time_gpu, time_interleaved

    with torch.inference_mode(False), torch.no_grad():
        if torch.device(device).type != "cuda":
            run = _bind(trial, target, device)
            return time_interleaved({"": run}, budget_s=budget_s, warmup_s=budget_s / 5)[""].median
        if env.proves():
            _prove(trial, target, device)
        size = max(trial.problem.bytes, 1)
        most = int(_MEMORY_SHARE * torch.cuda.mem_get_info(device)[0] // size)
        runs = [_bind(trial, target, device) for _ in range(max(1, min(rotation(size, device), most)))]
        runs[0]()
        return time_gpu(runs, budget_s=budget_s).median


def _prove(trial: Trial, target: Target, device: str) -> None:
    """What is wrong has no time: Disproved."""
    from fastres.proof.plan import key_of, of_ours, prove
    from fastres.proof.record import Disproved, Record

    candidate = _loaded(trial)
    if of_ours(candidate):
        job = Job(candidate.name, trial.problem, trial.choice(target), candidate.planar(trial.problem))
        record, key = Record.of(torch.device(device)), key_of(job)
        if fault := record.fault(key):
            raise Disproved(fault)
        if key not in record:
            prove(job, target, device)
            record.add(key)


def _loaded(trial: Trial) -> Candidate:
    if not REGISTRY.candidates:  # a process of its own
        backends.load()
    return REGISTRY[trial.candidate]


def _bind(trial: Trial, target: Target, device: str) -> Callable[[], Any]:
    from fastres.plan.measure import bind_alone

    candidate = _loaded(trial)
    # loads the library that its kernels are in
    if reason := candidate.accepts(trial.problem, target):
        raise RuntimeError(reason)
    return bind_alone(candidate, trial.problem, trial.choice(target), torch.device(device))


def _header(device: torch.device) -> dict[str, str]:
    from fastres.bench.environment import environment

    made = environment(device)
    names = ("driver", "clock_sm", "power", "threads", "torch", "cuda", "cudnn", "triton", "fastres", "date")
    header = {"kind": "measured", "gpu": made.device, "source": "fastres tune"}
    return header | {name: value for name in names if (value := getattr(made, name))}
