"""The engine: builds every provider of a case, verifies it against fp64, times those that are right."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Call, Case, Entry, Subject
from benchmarks.providers import BASELINE
from benchmarks.providers.base import Provider
from benchmarks.providers.eager import EagerChannelsLast
from benchmarks.results import Row
from benchmarks.scope import Scope
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
from fastres.bench.verify import Errors, allowed, errors
from fastres.plan.problem import dtype_name

# Wall-clock seconds that are kept for writing files when a run's minutes are over.
_RESERVE_S = 5.0


def entries(case: Case, providers: Sequence[Provider], scope: Scope) -> list[Entry]:
    """What the providers do at a case, the baseline first."""
    taking_part = [p.entry(case) for p in providers if p.takes_part(case, scope.size)]
    return sorted(taking_part, key=lambda entry: entry.provider != BASELINE)


class WrongAnswer(Exception):
    """A provider's output is too far from fp64."""


class Trial:
    """A built case: its subject, the fp64 reference, and how wrong a provider may be.

    `limit` is what `allowed` says given the baseline's own error; the baseline is run for it if need be.
    """

    def __init__(self, case: Case):
        self.case = case
        with _ordinary_tensors():
            self.subject = case.make()
            self.reference = self.subject.reference()
        self.limit: float | None = None

    def call(self, entry: Entry, row: Row | None = None) -> Call:
        """The verified call of `entry`; `row` is given its errors, its first call's time, its peak memory.

        Raises:
            WrongAnswer: for an answer that is wrong, be it not before the second or third call.
            NotImplementedError: where it does not apply. And whatever the provider raises.
        """
        row = row or _row(self.case, entry.provider)
        call, found = self._first_calls(entry, row)
        if entry.provider == BASELINE:
            self.limit = allowed(found, self.case.dtype)
        elif self.limit is None:
            baseline = EagerChannelsLast().entry(self.case)
            self.limit = allowed(self._first_calls(baseline, _row(self.case, BASELINE))[1], self.case.dtype)
        row.error, row.max_abs_error, row.argmax = found.relative, found.absolute, found.argmax
        row.error_allowed = self.limit
        if not found.relative <= self.limit:
            raise WrongAnswer(f"error {found.relative:.2e} against fp64, allowed {self.limit:.2e}")
        return call

    def _first_calls(self, entry: Entry, row: Row) -> tuple[Call, Errors]:
        cuda = self.case.device.type == "cuda"
        inputs = entry.inputs(self.subject.inputs)
        before = 0
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        with _ordinary_tensors():
            call = entry.build(self.subject)
        out = call(*inputs)
        if cuda:
            torch.cuda.synchronize()
        row.first_call_s = time.perf_counter() - start
        found = errors(out, self.reference)
        # A later call may take another path (a captured graph, a replayed plan): it is checked as well.
        for _ in range(2):
            out = call(*inputs)
        again = errors(out, self.reference)
        if cuda:
            row.peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
        return call, max(found, again, key=lambda e: e.relative)


@contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """Parameters made in inference mode count no versions: fastres would prepare them anew at every call."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def gradients(case: Case) -> AbstractContextManager:
    """The grad mode that a case's calls are made in."""
    return torch.no_grad() if case.level in ("op", "training", "host") else torch.inference_mode()


def measure(
    case: Case,
    providers: Sequence[Provider],
    scope: Scope,
    *,
    deadline: float | None = None,
    on_entry: Callable[[str], None] = lambda name: None,
) -> list[Row]:
    """The rows of one case. A provider that is wrong, fails or does not apply gets a row without a time.

    Args:
        deadline: `time.monotonic()` after which nothing more is begun.
        on_entry: called with each provider's name before it is built.
    """
    wanted = entries(case, providers, scope)
    rows = {entry.provider: _row(case, entry.provider) for entry in wanted}
    calls: dict[str, tuple[Call, Entry]] = {}
    trial: Trial | None = None
    with gradients(case):
        for entry in wanted:
            on_entry(entry.provider)
            row = rows[entry.provider]
            if not entry.skip and deadline is not None and time.monotonic() > deadline - _RESERVE_S:
                entry.skip = "left out: the run's time was over"
            if entry.skip:
                row.status, row.reason = "skipped", entry.skip
                continue
            try:
                trial = trial or Trial(case)
                calls[entry.provider] = (trial.call(entry, row), entry)
            except WrongAnswer as error:
                row.status, row.reason = "wrong", str(error)
            except NotImplementedError as error:
                row.status, row.reason = "skipped", _short(error)
            except Exception as error:
                row.status, row.reason = "failed", f"{type(error).__name__}: {_short(error)}"
        if trial is not None and calls:
            _time(trial, calls, rows, scope)
    _clean_up(case)
    return list(rows.values())


def _row(case: Case, provider: str) -> Row:
    row = Row(
        case.level,
        case.name,
        case.problem,
        case.model,
        case.count,
        case.batch,
        dtype_name(case.dtype),
        provider,
        clock="call" if case.clock == "kernel" and case.device.type != "cuda" else case.clock,
    )
    row.bytes, row.flops = case.bytes, case.flops
    return row


def _time(trial: Trial, calls: dict[str, tuple[Call, Entry]], rows: dict[str, Row], scope: Scope) -> None:
    case, subject = trial.case, trial.subject
    seconds = scope.seconds * len(calls)
    if case.clock == "host":
        timings = {
            name: host_overhead(
                partial(call, *entry.inputs(subject.inputs)),
                rounds=5 if scope.size == "smoke" else 20,
                device=case.device,
            )
            for name, (call, entry) in calls.items()
        }
    elif case.clock == "kernel" and case.device.type == "cuda":
        timings = _kernel_timings(trial, calls, seconds)
    else:
        fns = {name: _rotating(subject, *given) for name, given in calls.items()}
        least = 3 if scope.size == "smoke" else 5
        timings = time_interleaved(
            fns, budget_s=seconds, warmup_s=0.1 * scope.seconds, min_rounds=least, device=case.device
        )
    roof = roofline.measure(case.device, case.dtype)
    for name, timing in timings.items():
        row = rows[name]
        _fill(row, case, timing, roof)
        if BASELINE in timings:
            speedup = ratio(timings[BASELINE], timing)
            row.speedup, row.speedup_p20, row.speedup_p80 = speedup.median, speedup.p20, speedup.p80
        if case.level == "model":
            call, entry = calls[name]
            single = latencies(
                partial(call, *entry.inputs(subject.inputs)),
                budget_s=0.4 * scope.seconds,
                min_calls=3 if scope.size == "smoke" else 10,
                device=case.device,
            )
            row.latency_p50_ms, row.latency_p99_ms = single.median, single.percentile(0.99)
        if case.level in ("model", "training"):
            row.images_s = case.batch / timing.median * 1e3


def _kernel_timings(trial: Trial, calls: dict[str, tuple[Call, Entry]], seconds: float) -> dict[str, Timing]:
    subject, itemsize = trial.subject, trial.case.dtype.itemsize
    out_bytes = sum(t.numel() * itemsize for t in trial.reference)
    nbytes = sum(x.numel() * x.element_size() for x in subject.inputs) + out_bytes
    copies = [
        tuple(x.clone() for x in subject.inputs) for _ in range(rotation(nbytes, subject.inputs[0].device))
    ]
    launches = {
        name: [partial(call, *entry.inputs(inputs)) for inputs in copies]
        for name, (call, entry) in calls.items()
    }
    graph = {name: entry.capturable for name, (_, entry) in calls.items()}
    return time_gpu_interleaved(launches, budget_s=seconds, graph=graph)


def _rotating(subject: Subject, call: Call, entry: Entry) -> Callable[[], object]:
    nbytes = sum(x.numel() * x.element_size() for x in subject.inputs)
    n = rotation(nbytes, subject.inputs[0].device, most=4)
    copies = [entry.inputs(subject.inputs)]
    copies += [entry.inputs(tuple(x.clone() for x in subject.inputs)) for _ in range(n - 1)]
    turn: Iterator[tuple[Tensor, ...]] = itertools.cycle(copies)
    return lambda: call(*next(turn))


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
