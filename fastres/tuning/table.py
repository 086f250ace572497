"""Tables of measured times: JSON, one file per architecture and candidate, written only by `write` and
sorted, so that a change can be reviewed.

    {"header": {"candidate", "kind", "gpu", "driver", "torch", "triton", "date", …},
     "entries": {problem.key: {"config": {…}, "ms": …, "peers": {other candidate: ms, …}}}}

Kinds of a file: "measured" (this kernel, on such a GPU) and "prototype" (the experiment that the kernel
grew out of was measured, the kernel itself was not; such files are named <candidate>.prototype.json and
count only where nothing is measured). The user's tables lie in the cache and come before those shipped in
fastres/tuning/tables/.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastres.plan.problem import Problem, Target

log = logging.getLogger("fastres.tuning")

# What a kernel takes however small the batch, where one batch size alone is measured: an assumption. At
# batch 1 cuDNN's fused calls took 0.387 ms for the 53 layers of a ResNet-50 (H100).
_START_MS = 5e-3

SHIPPED = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class Entry:
    """What a table says about one problem.

    Attributes:
        config: the best configuration as a JSON object ({} where the candidate has none).
        ms: its time, in milliseconds, at the problem's batch size.
        kind: "measured" (this problem), "nearest" (the same layers at the nearest batch size, `ms` scaled
            to this one) or "prototype" (see above).
        batch: the batch size that was measured.
        header: the file's header: GPU, driver, versions, date.
        peers: milliseconds of other candidates in the same run.
    """

    config: dict[str, Any]
    ms: float
    kind: str
    batch: int
    header: Mapping[str, Any] = field(default_factory=dict, compare=False)
    peers: Mapping[str, float] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Table:
    """One file. `layers` is: layer key → batch size → the raw entry."""

    header: dict[str, Any]
    layers: dict[str, dict[int, dict[str, Any]]]

    def entries(self) -> dict[str, dict[str, Any]]:
        """problem.key → the raw entry."""
        return {f"n{n} {key}": raw for key, by_batch in self.layers.items() for n, raw in by_batch.items()}


def user_dir() -> Path:
    """Where `fastres tune` writes: tables/ in the cache folder (FASTRES_CACHE)."""
    from fastres import env

    return Path(env.cache_dir()) / "tables"


def path(root: Path, arch: str, candidate: str, kind: str = "measured") -> Path:
    return root / arch / (f"{candidate}.json" if kind == "measured" else f"{candidate}.{kind}.json")


def lookup(candidate: str, problem: Problem, target: Target, *, user: Path | None = None) -> Entry | None:
    """What is known about `candidate` on `problem`: its own measurements (the user's, then the shipped
    ones) at this batch size, at the nearest batch size of the identical layers, then its prototype's; else
    None.

    Args:
        user: the folder of the user's tables; default `user_dir()`.
    """
    user = user_dir() if user is None else user
    measured = [load(path(root, target.arch, candidate)) for root in (user, SHIPPED)]
    for table in measured:
        raw = table and table.layers.get(problem.layer_key, {}).get(problem.n)
        if raw:
            return _entry(raw, "measured", problem.n, table)
    for table in measured:
        if table and (found := _nearest(table, problem)):
            return _scaled(*found, "nearest", problem, target, table)
    table = load(path(SHIPPED, target.arch, candidate, "prototype"))
    if table and (found := _nearest(table, problem)):
        return _scaled(*found, "prototype", problem, target, table)
    return None


def _nearest(table: Table, problem: Problem) -> tuple[dict[str, Any], int] | None:
    batches = table.layers.get(problem.layer_key)
    if not batches or not problem.n:
        return None
    batch = min(batches, key=lambda b: (abs(math.log(b / problem.n)), -b))
    return batches[batch], batch


def _entry(raw: dict[str, Any], kind: str, batch: int, table: Table, ms: float | None = None) -> Entry:
    ms = raw["ms"] if ms is None else ms
    return Entry(raw.get("config") or {}, ms, kind, batch, table.header, raw.get("peers") or {})


def _scaled(raw, batch: int, kind: str, problem: Problem, target: Target, table: Table) -> Entry:
    """The time as a line over the batch size: through the nearest two that are measured, or through the
    only one and `_START_MS` at zero; never below the floor."""
    ms = raw["ms"]
    if batch != problem.n:
        others = {b: other["ms"] for b, other in table.layers[problem.layer_key].items() if b != batch}
        start = min(_START_MS, ms)
        if others:
            second = min(others, key=lambda b: (abs(math.log(b / problem.n)), -b))
            start = ms - batch * (ms - others[second]) / (batch - second)
        # Noise may bend the line to either side of what a time can be.
        start = min(max(start, 0.0), ms)
        ms = max(start + (ms - start) * problem.n / batch, target.floor_ms(problem) or 0.0)
    return _entry(raw, kind, batch, table, ms)


def load(file: Path) -> Table | None:
    """The table in `file`, or None where there is none; one that cannot be read is warned of and left out."""
    try:
        stamp = file.stat().st_mtime_ns
    except OSError:
        return None
    return _load(file, stamp)


@lru_cache(maxsize=256)
def _load(file: Path, stamp: int) -> Table | None:
    try:
        content = json.loads(file.read_text())
        layers: dict[str, dict[int, dict[str, Any]]] = {}
        for key, raw in content["entries"].items():
            batch, _, layer_key = key.partition(" ")
            raw["ms"] = float(raw["ms"])
            layers.setdefault(layer_key, {})[int(batch.removeprefix("n"))] = raw
        return Table(content["header"], layers)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("table %s cannot be read (%s: %s); it is left out", file, type(error).__name__, error)
        return None


def write(
    root: Path, arch: str, candidate: str, header: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]]
) -> Path:
    """Merge `entries` (problem.key → {"config", "ms", "peers"}) into the candidate's table under `root`,
    replacing those with the same key. Atomic, and safe beside other writers."""
    kind = header.get("kind", "measured")
    file = path(root, arch, candidate, kind)
    file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(file.with_name(f".{file.name}.lock")):
        before = load(file)
        merged = {**(before.entries() if before else {}), **entries}
        content = {
            "header": {"candidate": candidate, "kind": kind, **header},
            "entries": {key: dict(merged[key]) for key in sorted(merged, key=_order)},
        }
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        try:
            with os.fdopen(handle, "w") as stream:
                stream.write(text)
            os.chmod(temporary, 0o644)
            os.replace(temporary, file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    return file


def _order(key: str) -> tuple[str, int]:
    batch, _, layer_key = key.partition(" ")
    return layer_key, int(batch.removeprefix("n"))


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    with open(file, "a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
