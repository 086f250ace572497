"""README's tables and charts, generated from benchmarks/results/*.csv between markers.

    <!-- benchmarks:begin --> … <!-- benchmarks:end -->

Nothing between the markers is typed by hand; `python -m benchmarks readme` writes it anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks import results
from benchmarks.plot import save, speedups
from benchmarks.providers import BASELINE
from benchmarks.providers.ours import BACKENDS
from benchmarks.results import Results, Row
from fastres.bench.table import figure

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
CHARTS, RECORDED = "charts", "recorded"
# A backend alone tells developers which kernels to work on: it stays in the files.
_ALONE = frozenset(f"fastres {name}" for name in BACKENDS)


def update(path: Path, folder: Path, *, write: bool = True) -> bool:
    """Bring the part between the markers of `path` up to date with every device's newest results in `folder`,
    and with the recordings in `folder`/recorded, which stand apart.

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
    newest: dict[tuple[str, str], Results] = {}
    for run in _runs(folder):
        if not run.path.stem.endswith("-peers"):
            newest[run.environment["device"], run.environment["threads"]] = run
    parts = []
    if not newest:
        parts += [
            "No results have been committed yet: `python -m benchmarks --quick --out benchmarks/results`.",
            "",
        ]
    # GPUs first: they alone have a driver
    for run in sorted(newest.values(), key=lambda r: not r.environment["driver"]):
        run.rows = [row for row in run.rows if row.provider not in _ALONE]
        parts += [f"**{run.environment['device']}** ({_facts(run)}; {_link(run.path, root)})", ""]
        parts += _tables(run)
        chart = folder / CHARTS / f"{run.path.stem}-speedup.svg"
        if draw and (drawn := speedups(run)) is not None:
            save(drawn, chart)
        if chart.exists():
            parts += [f"![Speed-up over {BASELINE}]({chart.relative_to(root).as_posix()})", ""]
    for run in _runs(folder / RECORDED):
        parts += [
            f"**Recorded, not measured by this suite: other software alone**, {run.environment['device']} "
            f"({_facts(run)}; {_link(run.path, root)}). fastres is not among these rows; "
            "`python -m benchmarks peers` measures them again and compares.",
            "",
        ]
        parts += _tables(run)
    return "\n".join(parts).rstrip()


def _runs(folder: Path) -> list[Results]:
    """The files of `folder` that have rows, oldest first."""
    runs = [results.read(file) for file in sorted(folder.glob("*.csv"))]
    return sorted((run for run in runs if run.rows), key=lambda run: run.environment["date"])


def _facts(run: Results) -> str:
    env = run.environment
    facts = [f"torch {env['torch']}"]
    if env["threads"]:
        facts.insert(0, f"{env['threads']} threads")
    if env["cudnn"]:
        facts += [f"cuDNN {env['cudnn']}", f"Triton {env['triton']}"]
    if env["driver"]:
        facts += [f"driver {env['driver']}", f"{env['power']} W, SM at {env['clock_sm']} MHz"]
    facts.append(env["date"][:10])
    if env["commit"]:
        facts.append(f"commit {env['commit']}")
    return ", ".join(facts)


def _link(path: Path, root: Path) -> str:
    return f"[{path.name}]({path.relative_to(root).as_posix()})"


def _tables(run: Results) -> list[str]:
    lines = []
    for level, title in (("model", "Inference"), ("training", "Training step")):
        rows = [row for row in run.rows if row.level == level and row.status == "ok"]
        for name in dict.fromkeys(row.name for row in rows):
            lines += _table(f"{title}, {name.removesuffix(' step')}", [r for r in rows if r.name == name])
    return lines


def _table(title: str, rows: Sequence[Row]) -> list[str]:
    """Providers down, settings across: images/s, the most of a setting in bold, and the speed-up."""
    settings = sorted({(row.dtype, row.batch) for row in rows}, key=lambda s: (s[0] != "fp32", s))
    cells = {(row.provider, row.dtype, row.batch): row for row in rows}
    rates = {s: [row.images_s for row in rows if (row.dtype, row.batch) == s] for s in settings}
    best = {s: max(found) if len(found) > 1 else None for s, found in rates.items()}
    lines = [
        f"| {title}, images/s | " + " | ".join(f"{dtype}, batch {batch}" for dtype, batch in settings) + " |",
        "|---" + "|---:" * len(settings) + "|",
    ]
    for provider in dict.fromkeys(row.provider for row in rows):
        shown = [_cell(cells.get((provider, *setting)), best[setting]) for setting in settings]
        name = f"**{provider}**" if provider == "fastres" else provider
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return [*lines, ""]


def _cell(row: Row | None, best: float | None) -> str:
    if row is None:
        return "–"
    rate = figure(row.images_s)
    if row.images_s == best:
        rate = f"**{rate}**"
    return rate if row.speedup is None or row.provider == BASELINE else f"{rate} ({row.speedup:.2f}x)"
