"""`python -m benchmarks`: run, compare two runs, bring the README up to date."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import results, summary
from benchmarks.compare import comparison, peer_deviations
from benchmarks.levels import LEVELS
from benchmarks.scope import scope
from benchmarks.worker import Bench, Work
from fastres.bench.environment import Environment, environment
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
    start = time.monotonic()
    size = "smoke" if smoke else "quick" if quick else "full"
    # A smoke run times nothing of worth; on busy cores one thread is many times faster than two.
    num_threads = 1 if smoke and num_threads is None else num_threads
    try:
        covered = scope(size, device, dtype, batch, model, seconds, minutes)
        bench = Bench(Work(covered, _split(level) or LEVELS, select=_split(only), threads=num_threads))
    except (ValueError, ImportError) as error:
        raise typer.BadParameter(str(error)) from error
    with threads(num_threads):
        machine = environment(covered.device)
    show = console()
    for line in machine.lines():
        show.print(line)
    path = None if out is None else out / f"{machine.slug}-{machine.date[:10]}.csv"
    rows = _measure_all(bench, path, machine, start)
    for shown in (summary.networks(rows), summary.levels(rows)):
        if shown.row_count:
            show.print(shown)
    for line in summary.troubles(rows):
        show.print(line, markup=False)
    if path is not None:
        show.print(f"wrote {path} ({path.stat().st_size / 2**20:.1f} MiB)")
        from benchmarks.plot import plot

        for chart in plot(results.read(path), out):
            show.print(f"wrote {chart}")
    if any(row.status in ("wrong", "failed") for row in rows if row.provider.startswith("fastres")):
        raise typer.Exit(1)


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",")) if text else ()


def _measure_all(bench: Bench, path: Path | None, machine: Environment, start: float) -> list[results.Row]:
    """The rows of every case; each is in the file at `path` as soon as it is there."""
    covered = bench.work.scope
    deadline = None if covered.minutes is None else start + 60 * covered.minutes
    rows: list[results.Row] = []
    spent: dict[str, float] = {}
    file = contextlib.nullcontext(lambda rows: None) if path is None else results.writing(path, machine)
    with _own_compiler_cache(), file as append, bench, progress() as bar:
        task = bar.add_task("start", total=sum(map(len, bench.entries)))
        for i, case in enumerate(bench.cases):
            began = time.monotonic()
            at = f"{case.level}: {case.name}, {dtype_name(case.dtype)}, batch {case.batch}"
            measured = bench.measure(
                i,
                deadline=deadline,
                on_step=lambda step, at=at: bar.update(task, description=f"{at}, {step}"),
            )
            bar.update(task, advance=len(measured))
            append(measured)
            rows += measured
            spent[case.level] = spent.get(case.level, 0.0) + time.monotonic() - began
    spent["all"] = time.monotonic() - start
    print(f"{len(rows)} rows; seconds:", *(f"{k} {v:.0f}" for k, v in spent.items()), file=sys.stderr)
    return rows


@contextlib.contextmanager
def _own_compiler_cache() -> Iterator[None]:
    """A compiler's first call is measured: nothing may be left in its cache from an earlier run."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(prefix="benchmarks-inductor-", ignore_cleanup_errors=True) as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            del os.environ[name]
            if before is not None:
                os.environ[name] = before


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
    covered = scope("full", "cuda", "bf16,fp16,fp32", "1,32,256", "resnet50", seconds=0.4, minutes=7.5)
    wanted = frozenset((row.level, row.batch, row.dtype, row.provider) for row in before.rows)
    select = tuple(sorted({row.provider for row in before.rows}))
    machine = environment(covered.device)
    path = out / f"{machine.slug}-{machine.date[:10]}-peers.csv"
    start = time.monotonic()
    _measure_all(Bench(Work(covered, ("model", "training"), select, wanted)), path, machine, start)
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
