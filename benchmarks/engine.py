"""The engine: builds every provider of a case, verifies it against fp64, times those that are right."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Call, Case, Entry
from benchmarks.providers import BASELINE
from benchmarks.providers.base import Provider
from benchmarks.results import Row
from benchmarks.scope import Scope
from benchmarks.trial import Trial, WrongAnswer, gradients, new_row
from fastres.bench import roofline
from fastres.bench.timing import (
    Timing,
    host_overhead,
    latencies,
    ratio,
    rotation,
    time_gpu_interleaved,
    time_interleaved,
)
from fastres.workers import gpu_answers

TIME_OVER = "left out: the run's time was over"
# What is being done when no provider is being built.
BUILDING, PREPARING, TIMING = "fastres's native kernels", "fp64 reference", "timing"

# A compiler is not begun in the last minute: if the end came upon it, the case would be lost for everybody.
_COMPILING_S = 60.0

Calls = dict[str, tuple[Call, Entry]]


class DeviceLost(Exception):
    """The GPU answers this process no more: an illegal access, a failed assertion in a kernel."""


class _Unprepared(Exception):
    """There is no subject or no reference, for anybody."""


class _Failed(Exception):
    """A provider that was right raised while it was timed."""

    def __init__(self, provider: str, error: Exception):
        super().__init__(f"{type(error).__name__}: {_short(error)}")
        self.provider = provider


def entries(case: Case, providers: Sequence[Provider], scope: Scope) -> list[Entry]:
    """What the providers do at a case, the baseline first."""
    taking_part = [p.entry(case) for p in providers if p.takes_part(case, scope)]
    return sorted(taking_part, key=lambda entry: entry.provider != BASELINE)


def measure(
    case: Case,
    providers: Sequence[Provider],
    scope: Scope,
    *,
    deadline: float | None = None,
    dead: Mapping[str, str] | None = None,
    on_step: Callable[[str], None] = lambda name: None,
) -> list[Row]:
    """The rows of one case. A provider that is wrong, fails or does not apply gets a row without a time.

    Args:
        deadline: `time.monotonic()` after which nothing more is begun.
        dead: provider → why it failed before: it is not tried again.
        on_step: called with a provider's name before it is built, with PREPARING and TIMING before those.

    Raises:
        DeviceLost: after a provider's failure that leaves the process without its GPU.
    """
    wanted = entries(case, providers, scope)
    rows = {entry.provider: new_row(case, entry.provider) for entry in wanted}
    calls: Calls = {}
    trial: Trial | None = None
    with gradients(case):
        # Compilers last: what dies before them is tried again without having to wait for them twice.
        for entry in sorted(wanted, key=lambda entry: entry.compiles):
            row = rows[entry.provider]
            if entry.provider in (dead or {}):
                row.status, row.reason = "failed", dead[entry.provider]
                continue
            if not entry.skip and deadline is not None:
                needed = _COMPILING_S if entry.compiles else 0.0
                entry.skip = TIME_OVER if time.monotonic() + needed > deadline else ""
            if entry.skip:
                row.status, row.reason = "skipped", entry.skip
                continue
            try:
                if trial is None:
                    on_step(PREPARING)
                    trial = _prepared(case)
                on_step(entry.provider)
                calls[entry.provider] = (trial.call(entry, row), entry)
            except WrongAnswer as error:
                row.status, row.reason = "wrong", str(error)
            except NotImplementedError as error:
                row.status, row.reason = "skipped", _short(error)
            except _Unprepared as error:
                dead = {entry.provider: str(error) for entry in wanted}
                row.status, row.reason = "failed", str(error)
            except Exception as error:
                row.status, row.reason = "failed", f"{type(error).__name__}: {_short(error)}"
                _require_device(case, row.reason)
        if trial is not None and calls:
            on_step(TIMING)
            _time_all(trial, calls, rows, scope, deadline)
    _clean_up(case)
    return list(rows.values())


def _prepared(case: Case) -> Trial:
    try:
        return Trial(case)
    except Exception as error:
        reason = f"{PREPARING}: {type(error).__name__}: {_short(error)}"
        _require_device(case, reason)
        raise _Unprepared(reason) from error


def _require_device(case: Case, reason: str) -> None:
    """Raises DeviceLost with `reason` where the GPU answers no more."""
    if case.device.type == "cuda" and not gpu_answers(case.device):
        raise DeviceLost(reason)


def _time_all(trial: Trial, calls: Calls, rows: dict[str, Row], scope: Scope, deadline: float | None) -> None:
    """Fill the rows of `calls`; who raises is taken out, and the others are timed without it."""
    while calls:
        try:
            return _time(trial, calls, rows, scope, deadline)
        except _Failed as failed:
            _fail(trial.case, rows, [failed.provider], str(failed))
            del calls[failed.provider]
        except Exception as error:  # an earlier kernel's, perhaps: nobody knows whose
            return _fail(trial.case, rows, list(calls), f"{type(error).__name__}: {_short(error)}")


def _fail(case: Case, rows: dict[str, Row], names: Sequence[str], reason: str) -> None:
    for name in names:
        rows[name].status, rows[name].reason = "failed", f"while it was timed: {reason}"
    _require_device(case, reason)


def _time(trial: Trial, calls: Calls, rows: dict[str, Row], scope: Scope, deadline: float | None) -> None:
    case = trial.case
    seconds = scope.seconds * len(calls)
    if case.clock == "host":
        rounds = 5 if scope.size == "smoke" else 20
        timings = {
            name: host_overhead(_fixed(trial, *given), rounds=rounds, device=case.device)
            for name, given in calls.items()
        }
    elif case.clock == "kernel" and case.device.type == "cuda":
        timings = _kernel_timings(trial, calls, rows, seconds)
    else:
        rotating = {name: _rotating(trial, name, *given) for name, given in calls.items()}
        least = 3 if scope.size == "smoke" else 7
        timings = time_interleaved(
            rotating,
            budget_s=seconds,
            warmup_s=0.1 * scope.seconds,
            min_rounds=least,
            until=deadline,
            device=case.device,
        )
    roof = roofline.measure(case.device, case.dtype)
    for name, timing in timings.items():
        row = rows[name]
        _fill(row, case, timing, roof)
        if BASELINE in timings:
            speedup = ratio(timings[BASELINE], timing)
            row.speedup, row.speedup_p20, row.speedup_p80 = speedup.median, speedup.p20, speedup.p80
        if case.level == "model":
            single = timing  # on a CPU every sample is one call: no network is shorter than a sample must be
            if case.device.type == "cuda":
                fixed = _named(name, _fixed(trial, *calls[name]))
                single = latencies(fixed, budget_s=0.4 * scope.seconds, device=case.device)
            row.latency_p50_ms, row.latency_p99_ms = single.median, single.percentile(0.99)
        if case.level in ("model", "training"):
            row.images_s = case.batch / timing.median * 1e3


def _fixed(trial: Trial, call: Call, entry: Entry) -> Callable[[], object]:
    return partial(call, *entry.inputs(trial.subject.inputs))


def _rotating(trial: Trial, name: str, call: Call, entry: Entry) -> Callable[[], object]:
    given = trial.subject.inputs
    n = rotation(sum(x.numel() * x.element_size() for x in given), given[0].device, most=4)
    copies = [entry.inputs(given)]
    copies += [entry.inputs(tuple(x.clone() for x in given)) for _ in range(n - 1)]
    turn: Iterator[tuple[Tensor, ...]] = itertools.cycle(copies)
    return _named(name, lambda: call(*next(turn)))


def _named(name: str, call: Callable[[], object]) -> Callable[[], object]:
    """`call`, whose errors say whose they are."""

    def run() -> object:
        try:
            return call()
        except Exception as error:
            raise _Failed(name, error) from error

    return run


def _kernel_timings(trial: Trial, calls: Calls, rows: dict[str, Row], seconds: float) -> dict[str, Timing]:
    given, itemsize = trial.subject.inputs, trial.case.dtype.itemsize
    out_bytes = sum(t.numel() * itemsize for t in trial.reference)
    nbytes = sum(x.numel() * x.element_size() for x in given) + out_bytes
    copies = [tuple(x.clone() for x in given) for _ in range(rotation(nbytes, given[0].device))]
    launches = {
        name: [_named(name, partial(call, *entry.inputs(inputs))) for inputs in copies]
        for name, (call, entry) in calls.items()
    }

    def refused(name: str, error: Exception) -> None:
        failed = error if isinstance(error, _Failed) else _Failed(name, error)
        _fail(trial.case, rows, [name], f"no CUDA graph: {failed}")

    graph = {name: entry.capturable for name, (_, entry) in calls.items()}
    return time_gpu_interleaved(launches, budget_s=seconds, graph=graph, on_refusal=refused)


def _fill(row: Row, case: Case, timing: Timing, roof: roofline.Roofline) -> None:
    row.median_ms, row.p20_ms, row.p80_ms = timing.median, timing.p20, timing.p80
    row.rounds = timing.n
    row.copy_gb_s, row.matmul_tflop_s = roof.copy / 1e9, roof.matmul / 1e12
    if case.clock == "host":
        return
    row.gb_s = case.bytes / timing.median / 1e6
    row.tflop_s = case.flops / timing.median / 1e9
    row.floor_ms = sum(roof.floor_ms(nbytes, flops) for nbytes, flops in case.parts)
    row.roofline = row.floor_ms / timing.median


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


def _clean_up(case: Case) -> None:
    # Dynamo keeps compiled code per code object, and stops compiling after a few modules of one class.
    torch._dynamo.reset()
    gc.collect()
    if case.device.type == "cuda":
        torch.cuda.empty_cache()
