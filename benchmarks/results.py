"""Rows: one provider at one case, as they stand in the CSV files."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from fastres.bench.environment import Environment


@dataclass
class Row:
    """One measurement, or why there is none.

    Attributes:
        level, name, problem, model, count, batch, dtype: the case (see `benchmarks.case.Case`).
        status: "ok"; "wrong" (its error is above `error_allowed`: it gets no time); "failed"; "skipped".
        reason: why it is not "ok".
        clock: "call", "kernel" or "host".
        median_ms, p20_ms, p80_ms, rounds: of one call.
        speedup, speedup_p20, speedup_p80: baseline's time / this time, pair by pair.
        gb_s, tflop_s: least bytes and arithmetic of the problem / median.
        floor_ms: the problem's kernels at the rates measured in this run; roofline: floor / median.
        copy_gb_s, matmul_tflop_s: those rates.
        images_s: batch / median, of networks.
        latency_p50_ms, latency_p99_ms: of single calls, each waited for.
        first_call_s: from building to the first result.
        peak_mib: most GPU memory, beyond what was taken before.
        error: worst image's ||y - ref|| / ||ref|| against fp64; max_abs_error: the largest |y - ref|;
            argmax: share of equal classes.
    """

    level: str
    name: str
    problem: str
    model: str
    count: int
    batch: int
    dtype: str
    provider: str
    status: str = "ok"
    reason: str = ""
    clock: str = ""
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    rounds: int | None = None
    speedup: float | None = None
    speedup_p20: float | None = None
    speedup_p80: float | None = None
    bytes: int | None = None
    flops: int | None = None
    gb_s: float | None = None
    tflop_s: float | None = None
    floor_ms: float | None = None
    roofline: float | None = None
    copy_gb_s: float | None = None
    matmul_tflop_s: float | None = None
    images_s: float | None = None
    latency_p50_ms: float | None = None
    latency_p99_ms: float | None = None
    first_call_s: float | None = None
    peak_mib: float | None = None
    error: float | None = None
    error_allowed: float | None = None
    max_abs_error: float | None = None
    argmax: float | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """What makes rows of two files the same measurement."""
        return (self.level, self.name, self.problem, str(self.batch), self.dtype, self.provider)


_FIELDS = {field.name: field.type for field in fields(Row)}
ENVIRONMENT = tuple(field.name for field in fields(Environment))
COLUMNS = (*_FIELDS, *ENVIRONMENT)


@dataclass
class Results:
    """The rows of a file, and the environment of its first row."""

    rows: list[Row]
    environment: dict[str, str]
    path: Path | None = None


@contextmanager
def writing(path: Path, environment: Environment) -> Iterator[Callable[[Iterable[Row]], None]]:
    """A function that appends rows to a CSV file at once, the environment in every row.

    The file is `path`.part until the block has ended without an error: an interrupted run leaves what it
    measured and replaces no earlier file. Numbers have six digits at most.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = environment.as_dict()
    part = path.with_name(f"{path.name}.part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()

        def append(rows: Iterable[Row]) -> None:
            for row in rows:
                writer.writerow({name: _text(getattr(row, name)) for name in _FIELDS} | machine)
            file.flush()

        yield append
    os.replace(part, path)


def write(path: Path, rows: Iterable[Row], environment: Environment) -> None:
    """Write `rows` to a CSV file."""
    with writing(path, environment) as append:
        append(rows)


def read(path: Path) -> Results:
    """The rows of a file that `write` wrote.

    Raises:
        ValueError: if it is none, naming the columns that are missing.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: no results file, it lacks {', '.join(missing)}")
        given = list(reader)
    rows = [Row(**{name: _value(name, line[name]) for name in _FIELDS}) for line in given]
    return Results(rows, {name: given[0][name] if given else "" for name in ENVIRONMENT}, path)


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(name: str, text: str) -> object:
    kind = str(_FIELDS[name])
    if kind == "str":
        return text
    if text == "":
        return None
    return int(text) if kind.startswith("int") else float(text)
