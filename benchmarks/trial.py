"""A trial: a built case, on which every provider is verified against fp64 before it is timed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from benchmarks.case import Call, Case, Entry
from benchmarks.providers import BASELINE
from benchmarks.providers.eager import EagerChannelsLast
from benchmarks.results import Row
from fastres.bench.verify import Errors, allowed, errors
from fastres.plan.problem import dtype_name


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
            with _no_cudnn_search():
                self.reference = self.subject.reference()
        self.limit: float | None = None

    def call(self, entry: Entry, row: Row | None = None) -> Call:
        """The verified call of `entry`; `row` is given its errors, its first call's time, its peak memory.

        Raises:
            WrongAnswer: for an answer that is wrong, be it not before the second or third call.
            NotImplementedError: where it does not apply. And whatever the provider raises.
        """
        row = row or new_row(self.case, entry.provider)
        call, found = self._first_calls(entry, row)
        if entry.provider == BASELINE:
            self.limit = allowed(found, self.case.dtype)
        elif self.limit is None:
            baseline = EagerChannelsLast().entry(self.case)
            self.limit = allowed(
                self._first_calls(baseline, new_row(self.case, BASELINE))[1], self.case.dtype
            )
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


@contextmanager
def _no_cudnn_search() -> Iterator[None]:
    """What runs once in fp64 is not worth timing every algorithm of cuDNN in fp64."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def gradients(case: Case) -> AbstractContextManager:
    """The grad mode that a case's calls are made in."""
    return torch.no_grad() if case.level in ("op", "training", "host") else torch.inference_mode()


def new_row(case: Case, provider: str) -> Row:
    """The row of `provider` at `case`, nothing measured yet."""
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
