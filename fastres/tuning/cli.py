"""`fastres tune`."""

from __future__ import annotations

from typing import Annotated

import typer


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
    jobs: Annotated[
        int | None, typer.Option(min=0, help="processes that compile; 0: compile in this one")
    ] = None,
) -> None:
    """Time every configuration of every kernel on a network's layers; plans then choose by these times."""
    import torch

    from fastres import backends
    from fastres.bench.models import load_model
    from fastres.plan.candidate import REGISTRY
    from fastres.plan.problem import dtype_from_name
    from fastres.plan.target import detect
    from fastres.tuning import table
    from fastres.tuning.tune import Result, problems_of
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
        what = (
            f"{result.ms:9.4f} ms  {result.config or ''}" if not result.reason else f"fails: {result.reason}"
        )
        typer.echo(f"{result.problem.key}\n  {result.candidate:28s} {what}")

    done = []
    for n in batches:
        problems = problems_of(network, (n, 3, size, size), compute, flags)
        done += run(problems, detect(where), where, candidates=names, again=again, jobs=jobs, on_result=show)
    fit = sum(not result.reason for result in done)
    typer.echo(f"{fit} measured, {len(done) - fit} failed; tables in {table.user_dir()}")
