"""The short table that a run ends with."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from benchmarks.providers import BASELINE
from benchmarks.results import Row
from fastres.bench.table import figure, table


def networks(rows: Sequence[Row]) -> Table:
    """Every provider at every network, dtype and batch."""
    shown = []
    for row in rows:
        if row.level in ("model", "training") and row.status != "skipped":
            shown.append(
                [
                    row.name,
                    row.dtype,
                    row.batch,
                    row.provider,
                    figure(row.median_ms) if row.status == "ok" else row.status,
                    figure(row.images_s),
                    "–" if row.speedup is None else f"{row.speedup:.2f}x",
                    figure(row.latency_p99_ms),
                    figure(row.first_call_s, 2),
                    "–" if row.roofline is None else f"{row.roofline:.0%}",
                    "–" if row.error is None else f"{row.error:.1e}",
                ]
            )
    columns = (
        "network",
        "dtype",
        ">batch",
        "provider",
        ">ms",
        ">images/s",
        ">speed-up",
        ">p99 ms",
        ">first s",
        ">roofline",
        ">error",
    )
    return table("Networks", columns, shown, f"speed-up: over {BASELINE}, pair by pair")


def levels(rows: Sequence[Row]) -> Table:
    """For the other levels: each provider's mean speed-up, worst error, and how often it failed."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.level not in ("model", "training"):
            groups.setdefault((row.level, row.dtype, row.provider), []).append(row)
    shown = []
    for (level, dtype, provider), group in groups.items():
        ok = [row for row in group if row.status == "ok"]
        if not ok and all(row.status == "skipped" for row in group):
            continue
        bad = len([row for row in group if row.status in ("wrong", "failed")])
        roofs = [row.roofline for row in ok if row.roofline is not None]
        shown.append(
            [
                level,
                dtype,
                provider,
                f"{len(ok)} of {len(group)}",
                bad or "–",
                _speedups(ok),
                f"{sum(roofs) / len(roofs):.0%}" if roofs else "–",
                f"{max(row.error for row in ok):.1e}" if ok else "–",
            ]
        )
    columns = (
        "level",
        "dtype",
        "provider",
        ">measured",
        ">wrong or failed",
        ">speed-up (geometric mean, worst to best)",
        ">roofline (mean)",
        ">worst error",
    )
    return table("Levels", columns, shown)


def troubles(rows: Sequence[Row]) -> list[str]:
    """One line for every wrong or failed row, and one for every reason to skip."""
    lines = [
        f"{row.status}: {row.provider} at {row.name}, {row.dtype}, batch {row.batch}: {row.reason}"
        for row in rows
        if row.status in ("wrong", "failed")
    ]
    skipped: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.status == "skipped":
            skipped[row.provider, row.reason] = skipped.get((row.provider, row.reason), 0) + 1
    return lines + [f"skipped {n}x: {provider}: {reason}" for (provider, reason), n in skipped.items()]


def _speedups(rows: Sequence[Row]) -> str:
    found = [row.speedup for row in rows if row.speedup]
    if not found:
        return "–"
    mean = math.exp(sum(math.log(s) for s in found) / len(found))
    return f"{mean:.2f}x" + (f" ({min(found):.2f} to {max(found):.2f})" if len(found) > 1 else "")
