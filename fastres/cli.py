"""The `fastres` command."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from fastres.bench.cli import bench
from fastres.train.cli import train
from fastres.tuning.cli import tune

app = typer.Typer(
    help="The fastest way to run a ResNet from PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
for _command in (bench, tune, train):
    app.command()(_command)


@app.command()
def info() -> None:
    """The device, the versions, which backends can run here, or why not, and which kernels failed their proof."""
    import platform

    import torch

    import fastres
    from fastres import backends, env
    from fastres.plan.candidate import REGISTRY
    from fastres.plan.target import detect, triton_version
    from fastres.proof.record import Record

    typer.echo(
        f"fastres {fastres.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    )
    triton = triton_version()
    typer.echo(f"triton {'.'.join(map(str, triton)) if triton else 'not installed'}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = detect(device)
    units = "SMs" if target.kind == "cuda" else "threads"
    typer.echo(f"device: {target.name or target.arch} ({target.arch}, {target.sms} {units})")
    missing = backends.load()
    typer.echo("backends:")
    for family in backends.FAMILIES:
        candidates = [c for c in REGISTRY.candidates.values() if c.backend == family]
        reason = missing.get(family) or _why_not(candidates, target)
        typer.echo(f"  {family:10s} {'not here: ' + reason if reason else 'ready'}")
        for candidate in candidates if not reason else ():
            typer.echo(f"    {candidate.name:28s} {candidate.source}")
    kept = Record.of(device)
    if target.kind == "cuda" or kept.known:
        faults = {key: fault for key, fault in kept.known.items() if fault}
        typer.echo(f"proofs: {len(kept.known)} kernel calls tried, {len(faults)} left out ({kept.path})")
        for key, fault in faults.items():
            typer.echo(f"  {key}: {fault}")
    typer.echo("environment:")
    for name, meaning in env.VARIABLES.items():
        typer.echo(f"  {name:20s} {os.environ.get(name, '-'):12s} {meaning}")


def _why_not(candidates: list, target) -> str | None:
    """Why none of a family's candidates takes a problem that it is made for; None if one does."""
    from fastres.plan.examples import example_problems

    if not candidates:
        return "it has no kernels"
    reasons: list[str] = []
    for candidate in candidates:
        for problem in example_problems(candidate.pattern, target):
            reason = candidate.accepts(problem, target)
            if reason is None:
                return None
            reasons.append(reason)
    return reasons[0] if reasons else "no example problem"


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="torchvision name, timm:NAME, or a fastres name")] = "resnet50",
    arch: Annotated[
        str, typer.Option(help="cpu, sm80 (A100), sm90 (H100) or sm100 (B200): no such device is needed")
    ] = "sm90",
    batch: Annotated[int, typer.Option(min=1)] = 256,
    size: Annotated[int, typer.Option(min=1, help="height and width of the images")] = 224,
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32")] = "bf16",
    backend: Annotated[str, typer.Option(help="auto, or one family of kernels")] = "auto",
    why: Annotated[
        str, typer.Option(help="a layer's name: what else could have run there, and why it does not")
    ] = "",
) -> None:
    """The cover that the planner chooses for a device on paper, and its predicted time."""
    import torch

    from fastres import backends
    from fastres.bench.models import load_model
    from fastres.graph.capture import capture
    from fastres.plan.planner import NoCandidate, make_plan
    from fastres.plan.problem import dtype_from_name
    from fastres.plan.specs import Info, Unplannable, propagate
    from fastres.plan.target import on_paper
    from fastres.report import of_plan

    missing = backends.load()
    try:
        target, compute = on_paper(arch), dtype_from_name(dtype)
        graph = capture(load_model(model).eval())
        x = Info((batch, 3, size, size), compute, torch.device("cpu"))
        narrow = compute in (torch.bfloat16, torch.float16)
        wanted = None if backend == "auto" else (backend,)
        made = make_plan(graph, propagate(graph, (x,), compute, narrow), compute, target, backends=wanted)
    except (NoCandidate, Unplannable, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    report = of_plan(made, name=model)
    report.notes += [f"{family} {reason}" for family, reason in missing.items()]
    report.notes.append(f"that is {1e3 * batch / made.predicted_ms:,.0f} images/s, if the predictions hold")
    typer.echo(report.why(why) if why else str(report))


if __name__ == "__main__":
    sys.exit(app())
