"""`python -m benchmarks`: run, compare two runs, bring the README up to date."""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import engine, results, summary
from benchmarks.case import Case
from benchmarks.compare import comparison, peer_deviations
from benchmarks.levels import LEVELS, cases
from benchmarks.providers import providers
from benchmarks.providers.base import Provider
from benchmarks.scope import Scope, scope
from fastres.bench.environment import environment
from fastres.bench.table import console, progress
from fastres.bench.timing import threads
from fastres.plan.problem import dtype_name

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=False)
RESULTS = Path(__file__).parent / "results"
RECORDED = RESULTS / "recorded" / "h100-80gb-hbm3-2026-11-23-peers.csv"


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    level: Annotated[str, typer.Option(help=f"Some of {','.join(LEVELS)}. Default: all.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="The whole picture in minutes.")] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Does it work? Under a minute, tiny images.")
    ] = False,
    only: Annotated[
        str, typer.Option("--providers", help="Patterns such as 'eager*,fastres'. Default: all.")
    ] = "",
    batch: Annotated[str, typer.Option(help="Batch sizes, e.g. 1,32. Default: each level's own.")] = "",
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16. Default: by device.")] = "",
    model: Annotated[str, typer.Option(help="Networks, e.g. resnet50,timm:resnet50d.")] = "",
    device: Annotated[str, typer.Option(help="cuda, cpu. Default: a GPU if there is one.")] = "",
    num_threads: Annotated[int | None, typer.Option("--threads", help="CPU threads.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Timing per provider and case.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="What is not begun by then is left out, and says so.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the CSV and the charts.")] = None,
) -> None:
    """Measure fastres against its peers, each verified against fp64 first."""
    if context.invoked_subcommand is not None:
        return
    size = "smoke" if smoke else "quick" if quick else "full"
    # A smoke run times nothing of worth; on busy cores one thread is many times faster than two.
    num_threads = 1 if smoke and num_threads is None else num_threads
    try:
        covered = scope(size, device, dtype, batch, model, seconds, minutes)
        names = [name.strip() for name in level.split(",")] if level else list(LEVELS)
        chosen = providers([name.strip() for name in only.split(",")] if only else ())
        listed = [case for name in names for case in cases(name, covered)]
    except (ValueError, ImportError) as error:
        raise typer.BadParameter(str(error)) from error
    with threads(num_threads):
        machine = environment(covered.device)
        show = console()
        for line in machine.lines():
            show.print(line)
        rows = _measure_all(listed, chosen, covered)
    show.print(summary.networks(rows))
    show.print(summary.levels(rows))
    for line in summary.troubles(rows):
        show.print(line, markup=False)
    if out is not None:
        path = out / f"{machine.slug}-{machine.date[:10]}.csv"
        results.write(path, rows, machine)
        show.print(f"wrote {path} ({path.stat().st_size / 2**20:.1f} MiB)")
        from benchmarks.plot import plot

        for chart in plot(results.read(path), out):
            show.print(f"wrote {chart}")
    if any(row.status in ("wrong", "failed") for row in rows if row.provider.startswith("fastres")):
        raise typer.Exit(1)


def _measure_all(listed: list[Case], chosen: list[Provider], covered: Scope) -> list[results.Row]:
    if covered.cuda:
        torch.backends.cudnn.benchmark = True
    # A compiler's first call is measured: nothing may be left in its cache from an earlier run.
    cache = tempfile.TemporaryDirectory(prefix="benchmarks-inductor-")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache.name)
    start = time.monotonic()
    deadline = None if covered.minutes is None else start + 60 * covered.minutes
    rows: list[results.Row] = []
    spent: dict[str, float] = {}
    with cache, progress() as bar:
        total = sum(len(engine.entries(case, chosen, covered)) for case in listed)
        task = bar.add_task("start", total=total)
        for case in listed:
            began = time.monotonic()
            at = f"{case.level}: {case.name}, batch {case.batch}"
            rows += engine.measure(
                case,
                chosen,
                covered,
                deadline=deadline,
                on_entry=lambda name, at=at: bar.update(task, advance=1, description=f"{at}, {name}"),
            )
            spent[case.level] = spent.get(case.level, 0.0) + time.monotonic() - began
    spent["all"] = time.monotonic() - start
    print(f"{len(rows)} rows; seconds:", *(f"{k} {v:.0f}" for k, v in spent.items()), file=sys.stderr)
    return rows


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="A results file.")],
    after: Annotated[Path, typer.Argument(help="A results file.")],
    provider: Annotated[str, typer.Option(help="Rows of providers that match this pattern.")] = "fastres*",
    threshold: Annotated[float, typer.Option(help="What counts as slower beyond the noise.")] = 0.03,
) -> None:
    """Ratios of two runs with their noise; exit code 1 if something became slower beyond it."""
    try:
        shown, slower = comparison(results.read(before), results.read(after), provider, threshold)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    console().print(shown)
    if slower:
        raise typer.Exit(1)


@app.command()
def peers(
    out: Annotated[Path, typer.Option(help="Folder for the CSV and the charts.")],
    recorded: Annotated[Path, typer.Option(help="What it is compared with.")] = RECORDED,
) -> None:
    """Measure the peers' recorded rows again (ResNet-50 on a GPU); exit 1 if one is off by 10 %."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("the recorded rows are a GPU's, and none is visible here")
    before = results.read(recorded)
    covered = dataclasses.replace(
        scope("full", "cuda", "bf16,fp16,fp32", "1,32,256", "resnet50", seconds=0.4), minutes=None
    )
    wanted = {(row.level, row.batch, row.dtype) for row in before.rows}
    listed = [
        case
        for level in ("model", "training")
        for case in cases(level, covered)
        if (level, case.batch, dtype_name(case.dtype)) in wanted
    ]
    machine = environment(covered.device)
    rows = _measure_all(listed, providers(sorted({row.provider for row in before.rows})), covered)
    path = out / f"{machine.slug}-{machine.date[:10]}-peers.csv"
    results.write(path, rows, machine)
    shown, off = peer_deviations(before, results.read(path))
    console().print(shown)
    print(f"wrote {path}")
    if off:
        raise typer.Exit(1)


@app.command()
def readme(
    path: Annotated[Path, typer.Argument(help="The file with the markers.")] = RESULTS.parents[1]
    / "README.md",
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit 1 if it is out of date.")
    ] = False,
) -> None:
    """Write README's tables and charts anew from benchmarks/results/*.csv."""
    from benchmarks.readme import update

    changed = update(path, RESULTS, write=not check)
    print("out of date" if changed and check else "written" if changed else "up to date")
    if changed and check:
        raise typer.Exit(1)
