"""`fastres tune`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fastres.plan.problem import Problem, Target
    from fastres.tuning.tune import Result


def tune(
    model: Annotated[str, typer.Option(help="torchvision name, timm:NAME, or a fastres name")] = "resnet50",
    batch: Annotated[str, typer.Option(help="batch sizes, as in 1,32,256")] = "256",
    size: Annotated[int, typer.Option(min=1, help="height and width of the images")] = 224,
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32; default: bf16 on a GPU, else fp32")] = "",
    candidates: Annotated[
        str, typer.Option(help="names or families, as in hopper,triton.dual; default: all")
    ] = "",
    device: Annotated[str, typer.Option(help="cuda or cpu; default: cuda where there is one")] = "",
    again: Annotated[bool, typer.Option(help="measure also what the tables have already")] = False,
    thorough: Annotated[bool, typer.Option(help="every configuration, of slow kernels too")] = False,
    minutes: Annotated[
        float | None,
        typer.Option(min=0, help="begin nothing new after so long; what matters most comes first"),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=0, help="processes that compile; 0: do all work in this one, unprotected"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="folder for copies of the tables, and trials.csv of all that was timed"),
    ] = None,
) -> None:
    """Time the kernels' configurations on a network's layers; plans then choose by these times.

    On a GPU a ResNet-50 at one batch size takes some 1,300 trials; --minutes 5 leaves out the least promising.
    """
    import torch

    from fastres import backends
    from fastres.bench.models import load_model
    from fastres.plan.candidate import REGISTRY
    from fastres.plan.problem import dtype_from_name
    from fastres.plan.target import detect
    from fastres.tuning import table
    from fastres.tuning.tune import NOT_REACHED, problems_of
    from fastres.tuning.tune import tune as run

    backends.load()
    names = [name.strip() for name in candidates.split(",") if name.strip()]
    known = {candidate.backend for candidate in REGISTRY.candidates.values()} | set(REGISTRY.candidates)
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"candidates: got {', '.join(unknown)}, takes {', '.join(sorted(known))}")
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        compute = dtype_from_name(dtype or ("bf16" if where.type == "cuda" else "fp32"))
        batches = [int(n) for n in batch.split(",")]
        if min(batches) < 1:
            raise ValueError(f"batch: got {batch!r}, takes sizes of at least 1")
        network = load_model(model).eval()
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from error
    # As engines plan: fp32 convolutions on a GPU may use TF32 where PyTorch's own would.
    loose = where.type == "cuda" and compute == torch.float32 and torch.backends.cudnn.allow_tf32
    flags = ("tf32",) if loose else ()

    def show(result: Result) -> None:
        if result.reason not in ("", NOT_REACHED):
            typer.echo(f"{result.candidate} on {result.problem}: {result.reason}")

    problems: dict[Problem, int] = {}
    for n in batches:
        problems |= problems_of(network, (n, 3, size, size), compute, flags)
    target = detect(where)
    done = run(
        problems,
        target,
        where,
        candidates=names,
        again=again,
        thorough=thorough,
        limit_s=float("inf") if minutes is None else 60 * minutes,
        jobs=jobs,
        log_to=None if out is None else out / "trials.csv",
        on_result=show,
        on_progress=typer.echo,
    )
    for line in summary(done, target):
        typer.echo(line)
    fit = sum(not result.reason for result in done)
    late = sum(result.reason == NOT_REACHED for result in done)
    left = f", {late} not reached" if late else ""
    typer.echo(f"{fit} measured, {len(done) - fit - late} failed{left}; tables in {table.user_dir()}")
    if out is not None and (table.user_dir() / target.arch).is_dir():
        shutil.copytree(table.user_dir() / target.arch, out / target.arch, dirs_exist_ok=True)


def summary(results: list[Result], target: Target) -> list[str]:
    """A line for every problem: its fastest kernel, milliseconds, share of the floor, PyTorch's own call."""
    by_problem: dict[Problem, list[Result]] = {}
    for result in results:
        if not result.reason:
            by_problem.setdefault(result.problem, []).append(result)
    lines = []
    for problem, found in by_problem.items():
        best = min(found, key=lambda result: result.ms)
        floor = target.floor_ms(problem)
        share = f"{100 * floor / best.ms:3.0f} %" if floor else "     "
        own = next((f"{r.ms:8.4f}" for r in found if r.candidate.split(".")[0] in ("cudnn", "onednn")), "")
        lines.append(f"{best.ms:8.4f} {share} {own:8s} {best.candidate:22s} {problem} [{best.config or ''}]")
    return ["      ms floor  PyTorch fastest                problem [config]", *lines] if lines else []
