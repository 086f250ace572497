"""Cases run in a process of their own: a crash, a hang or a lost GPU costs one provider there, not the run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from benchmarks import engine, levels
from benchmarks.case import Case
from benchmarks.providers import providers
from benchmarks.providers.base import Provider
from benchmarks.results import Row
from benchmarks.scope import Scope
from benchmarks.trial import new_row
from fastres import backends, native
from fastres.ahead import Job, compile_ahead
from fastres.plan.candidate import REGISTRY
from fastres.plan.planner import table_cost
from fastres.plan.problem import Target, dtype_name
from fastres.plan.target import detect
from fastres.workers import Worker

# A provider that ended this many processes is not tried again.
MOST_DEATHS = 2
# The last part of a run's time, in which nothing more is begun, and what is begun is timed.
_LAST = 0.05
# A process that starts, and a C++ compiler, may take so many seconds at least, on a busy machine.
_START_S = 150.0


@dataclass(frozen=True)
class Work:
    """What is measured; a process makes the same list of cases from it.

    Attributes:
        select: patterns of providers, none for all.
        only: (level, batch, dtype, provider) of the rows that are wanted; None: all.
        threads: CPU threads; None: PyTorch's.
    """

    scope: Scope
    levels: tuple[str, ...]
    select: tuple[str, ...] = ()
    only: frozenset[tuple[str, int, str, str]] | None = None
    threads: int | None = None

    def cases(self) -> list[Case]:
        """All that somebody takes part in; a GPU's second dtype last, in case time runs out."""
        found = [case for level in self.levels for case in levels.cases(level, self.scope)]
        if self.scope.cuda:
            found.sort(key=lambda case: case.dtype != self.scope.dtypes[0])
        return [case for case in found if self.providers(case)]

    def providers(self, case: Case) -> list[Provider]:
        """Those who are wanted at `case`."""
        known = providers(self.select)
        if self.only is None:
            return known
        setting = (case.level, case.batch, dtype_name(case.dtype))
        return [provider for provider in known if (*setting, provider.name) in self.only]


class Bench:
    """Measures the cases of a `Work`, in a process that is started anew whenever it dies or hangs."""

    def __init__(self, work: Work, patience: float | None = None):
        self.work = work
        self.cases = work.cases()
        self.entries = [engine.entries(case, work.providers(case), work.scope) for case in self.cases]
        self.patience = patience or work.scope.patience
        self._deaths: Counter[str] = Counter()
        self._worker: Worker | None = None

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop(grace_s=1.0)  # it ends by itself if it waits for work

    def measure(
        self, index: int, *, deadline: float | None = None, on_step: Callable[[str], None] = lambda name: None
    ) -> list[Row]:
        """The rows of `cases[index]`, as `engine.measure` gives them.

        A provider that kills the process, loses the GPU or does not answer within the scope's patience is
        failed, and the case is measured again without it. At `deadline` the process is ended, whatever it is
        doing.
        """
        dead = {
            name: f"not tried: it has ended {n} processes"
            for name, n in self._deaths.items()
            if n >= MOST_DEATHS
        }
        while True:
            if deadline is not None and time.monotonic() >= deadline:
                return self._unmeasured(index, "skipped", engine.TIME_OVER, dead)
            step, outcome = self._attempt(index, deadline, dead, on_step)
            if isinstance(outcome, list):
                return outcome
            self._stop()
            if outcome == engine.TIME_OVER:
                continue
            if step in ("", engine.BUILDING, engine.PREPARING, engine.TIMING):
                return self._unmeasured(index, "failed", f"{step or 'start'}: {outcome}", dead)
            self._deaths[step] += 1
            dead[step] = outcome

    def _attempt(
        self, index: int, deadline: float | None, dead: dict[str, str], on_step: Callable[[str], None]
    ) -> tuple[str, list[Row] | str]:
        """The step that was the last to begin, and the rows, or what happened in it."""
        pipe, step = self._connection(), ""
        try:
            last = 0.0 if deadline is None else _LAST * 60 * (self.work.scope.minutes or 0.0)
            pipe.send((index, None if deadline is None else deadline - last, dead))
            while True:
                patience = self._patience(index, step)
                left = patience if deadline is None else min(patience, deadline - time.monotonic())
                if not pipe.poll(max(0.0, left)):
                    over = left < patience
                    return step, engine.TIME_OVER if over else f"no answer within {patience:.0f} s"
                kind, value = pipe.recv()
                if kind == "rows":
                    return step, value
                if kind == "lost":
                    return step, f"the GPU was lost: {value}"
                step = value
                on_step(step)
        except (EOFError, OSError):
            return step, f"its process died: {self._worker.how_it_died()}"

    def _patience(self, index: int, step: str) -> float:
        quick = any(entry.provider == step and not entry.compiles for entry in self.entries[index])
        patience = self.patience * (1 if quick else 3)
        return max(_START_S, patience) if step in ("", engine.BUILDING) else patience

    def _connection(self) -> Connection:
        if self._worker is None:
            self._worker = Worker(_serve, self.work)
        return self._worker.connection

    def _stop(self, grace_s: float = 0.0) -> None:
        if self._worker is not None:
            self._worker.end(grace_s)
            self._worker = None

    def _unmeasured(self, index: int, status: str, reason: str, dead: dict[str, str]) -> list[Row]:
        case, rows = self.cases[index], []
        for entry in self.entries[index]:
            row = new_row(case, entry.provider)
            row.status, row.reason = ("skipped", entry.skip) if entry.skip else (status, reason)
            if entry.provider in dead:
                row.status, row.reason = "failed", dead[entry.provider]
            rows.append(row)
        return rows


def _serve(pipe: Connection, work: Work) -> None:
    """The other end: measures what it is asked for until the pipe closes."""
    if work.threads is not None:
        torch.set_num_threads(work.threads)
    if work.scope.cuda:
        torch.backends.cudnn.benchmark = True
    cases = work.cases()
    built = False
    while True:
        try:
            index, deadline, dead = pipe.recv()
        except EOFError:
            return
        if not built:
            # Once a machine, by a compiler that takes a minute: neither a hang nor anybody's first call.
            pipe.send(("step", engine.BUILDING))
            native.available("cuda" if work.scope.cuda else "cpu")
            if work.scope.cuda and any(p.name.startswith("fastres") for p in work.providers(cases[index])):
                compile_ahead(jobs_of(cases, detect(work.scope.device)), detect(work.scope.device))
            built = True
        try:
            rows = engine.measure(
                cases[index],
                work.providers(cases[index]),
                work.scope,
                deadline=deadline,
                dead=dead,
                on_step=lambda name: pipe.send(("step", name)),
            )
        except engine.DeviceLost as error:
            return pipe.send(("lost", str(error)))
        pipe.send(("rows", rows))


def jobs_of(cases: list[Case], target: Target) -> list[Job]:
    """What fastres's backends compile for the cases that are one kernel each, network-sized ones see to themselves."""
    backends.load()
    found = []
    for problem in dict.fromkeys(case.kernels for case in cases if case.kernels is not None):
        for candidate in REGISTRY.candidates.values():
            fits = candidate.compiles and candidate.pattern.name == problem.pattern
            if fits and candidate.accepts(problem, target) is None:
                found.append(Job(candidate.name, problem, table_cost(candidate, problem, target).config))
    return found
