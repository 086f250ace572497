"""Two runs side by side: ratios with their noise."""

from __future__ import annotations

from fnmatch import fnmatch

from rich.table import Table

from benchmarks.results import Results, Row
from fastres.bench.table import figure, table


def comparison(
    before: Results, after: Results, provider: str = "*", threshold: float = 0.03
) -> tuple[Table, list[Row]]:
    """The table of every row that both have (or that `after` lost), and the rows that became slower.

    A row is slower if its median rose by more than `threshold` and by more than both runs' noise: the new p20
    above the old p80. A row that had a time and has none now counts as slower.

    Raises:
        ValueError: if no row stands in both, or the devices differ.
    """
    devices = [run.environment["device"] for run in (before, after)]
    if devices[0] != devices[1]:
        raise ValueError(f"the runs are of different devices: {devices[0]!r} and {devices[1]!r}")
    new = {row.key: row for row in after.rows}
    pairs = [
        (row, new[row.key])
        for row in before.rows
        if row.key in new and row.status == "ok" and fnmatch(row.provider, provider)
    ]
    if not pairs:
        raise ValueError(f"no row of {provider!r} stands in both files")
    slower, lines = [], []
    for old, row in pairs:
        verdict = _verdict(old, row, threshold)
        if verdict in ("slower", "lost"):
            slower.append(row)
        ratio = None if row.median_ms is None else row.median_ms / old.median_ms
        spread = "–" if ratio is None else f"{row.p20_ms / _p80(old):.2f} to {row.p80_ms / _p20(old):.2f}"
        lines.append(
            [
                row.level,
                row.name,
                row.dtype,
                row.batch,
                row.provider,
                figure(old.median_ms),
                figure(row.median_ms),
                figure(ratio),
                spread,
                verdict if row.status == "ok" else f"{verdict}: {row.reason}",
            ]
        )
    columns = (
        "level",
        "name",
        "dtype",
        ">batch",
        "provider",
        ">before ms",
        ">after ms",
        ">ratio",
        ">noise",
        "verdict",
    )
    caption = f"{len(pairs)} rows; slower: {len(slower)}"
    return table("after / before, above 1 is slower", columns, lines, caption), slower


def _p20(row: Row) -> float:
    return row.median_ms if row.p20_ms is None else row.p20_ms


def _p80(row: Row) -> float:
    return row.median_ms if row.p80_ms is None else row.p80_ms


def _verdict(old: Row, new: Row, threshold: float) -> str:
    if new.status == "skipped":
        return "not run"
    if new.status != "ok":
        return "lost"
    if new.median_ms > old.median_ms * (1 + threshold) and new.p20_ms > _p80(old):
        return "slower"
    if new.median_ms < old.median_ms / (1 + threshold) and new.p80_ms < _p20(old):
        return "faster"
    return "same"


def peer_deviations(recorded: Results, measured: Results, allowed: float = 0.10) -> tuple[Table, list[Row]]:
    """Recorded rows against measured ones, and the measured rows that are off by more than `allowed`, either
    way (none on another device: there is nothing to reproduce there)."""
    new = {row.key: row for row in measured.rows}
    same_device = recorded.environment["device"] == measured.environment["device"]
    off, lines = [], []
    for old in recorded.rows:
        row = new.get(old.key)
        ratio = None if row is None or row.median_ms is None else row.median_ms / old.median_ms
        if same_device and row is not None and (ratio is None or abs(ratio - 1) > allowed):
            off.append(row)
        reason = "not run" if row is None else row.reason
        cells = [
            figure(old.median_ms),
            "–" if ratio is None else figure(row.median_ms),
            figure(ratio),
            reason,
        ]
        lines.append([old.level, old.dtype, old.batch, old.provider, *cells])
    columns = ("level", "dtype", ">batch", "provider", ">recorded ms", ">measured ms", ">ratio", "why none")
    title = f"recorded on {recorded.environment['device']}, measured on {measured.environment['device']}"
    return table(title, columns, lines, f"off by more than {allowed:.0%}: {len(off)}"), off
