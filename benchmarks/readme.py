"""README's tables and charts, generated from benchmarks/results/*.csv between markers.

    <!-- benchmarks:begin --> … <!-- benchmarks:end -->

Nothing between the markers is typed by hand; `python -m benchmarks readme` writes it anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks import results
from benchmarks.plot import plot
from benchmarks.providers import BASELINE
from benchmarks.results import Results, Row
from fastres.bench.table import figure

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
CHARTS = "charts"


def update(path: Path, folder: Path, *, write: bool = True) -> bool:
    """Bring the part between the markers of `path` up to date with every device's newest results in `folder`.

    Args:
        write: False: only tell.

    Returns:
        Whether the text differs (differed).

    Raises:
        ValueError: if the markers are missing.
    """
    text = path.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path}: the markers {BEGIN} and {END} are missing")
    made = f"{before}{BEGIN}\n{section(folder, path.parent, draw=write)}\n{END}{after}"
    if write and made != text:
        path.write_text(made)
    return made != text


def section(folder: Path, root: Path, *, draw: bool = False) -> str:
    """The text between the markers. Charts go to `folder`/charts, as SVG."""
    newest: dict[str, Results] = {}
    for file in sorted(folder.glob("*.csv"), key=lambda file: (file.stem[-10:], file.stem)):
        run = results.read(file)
        if run.rows:
            newest[run.environment["device"]] = run
    if not newest:
        return "No results have been committed yet: `python -m benchmarks --quick --out benchmarks/results`."
    parts = []
    for run in sorted(newest.values(), key=lambda r: not r.environment["driver"]):
        parts += _device(run, root)
        charts = folder / CHARTS
        if draw:
            plot(run, charts, ("svg",))
        shown = charts / f"{run.path.stem}-speedup.svg"
        if shown.exists():
            parts.append(f"![Speed-up over {BASELINE}]({shown.relative_to(root).as_posix()})\n")
    return "\n".join(parts).rstrip()


def _device(run: Results, root: Path) -> list[str]:
    env = run.environment
    facts = [f"torch {env['torch']}"]
    if env["threads"]:
        facts.insert(0, f"{env['threads']} threads")
    if env["driver"]:
        facts += [f"cuDNN {env['cudnn']}", f"Triton {env['triton']}", f"driver {env['driver']}"]
        facts.append(f"{env['power']} W, SM at {env['clock_sm']} MHz")
    facts += [env["date"][:10], f"commit {env['commit'] or 'unknown'}"]
    source = run.path.relative_to(root).as_posix() if run.path.is_relative_to(root) else run.path.name
    lines = [f"**{env['device']}** ({', '.join(facts)}; [{run.path.name}]({source}))", ""]
    for level, title in (("model", "Inference"), ("training", "Training step")):
        rows = [row for row in run.rows if row.level == level and row.status == "ok"]
        for name in dict.fromkeys(row.name for row in rows):
            lines += _table(f"{title}, {name}", [row for row in rows if row.name == name])
    return lines


def _table(title: str, rows: Sequence[Row]) -> list[str]:
    """Providers down, settings across: images/s and the speed-up."""
    settings = sorted({(row.dtype, row.batch) for row in rows}, key=lambda s: (s[0] != "fp32", s))
    cells = {(row.provider, row.dtype, row.batch): row for row in rows}
    lines = [
        f"| {title}, images/s | " + " | ".join(f"{dtype}, batch {batch}" for dtype, batch in settings) + " |",
        "|---" + "|---:" * len(settings) + "|",
    ]
    for provider in dict.fromkeys(row.provider for row in rows):
        shown = [_cell(cells.get((provider, *setting))) for setting in settings]
        name = f"**{provider}**" if provider == "fastres" else provider
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return [*lines, ""]


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    speedup = "" if row.speedup is None or row.provider == BASELINE else f" ({row.speedup:.2f}x)"
    return figure(row.images_s) + speedup
