"""`fastres bench`: eager PyTorch against fastres on photographs, on this machine, now."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated

import torch
import typer

from fastres.bench import compare_models
from fastres.bench.calibrate import calibrate_bn
from fastres.bench.compare_models import BASELINE, PROVIDERS, Result
from fastres.bench.environment import Environment, environment
from fastres.bench.models import load_model
from fastres.bench.photographs import photographs
from fastres.bench.table import console, figure, progress, table
from fastres.bench.timing import threads
from fastres.plan.problem import dtype_from_name, dtype_name

CALIBRATION_IMAGES = 32


def bench(
    model: Annotated[str, typer.Option(help="torchvision's name, timm:NAME or fastres:NAME.")] = "resnet50",
    batch: Annotated[
        str, typer.Option(help="Batch sizes, e.g. 1,8. Default: 1,8 on a CPU, 1,32,256 on a GPU.")
    ] = "",
    dtype: Annotated[
        str, typer.Option(help="fp32, bf16, fp16. Default: fp32,bf16 on a CPU, bf16,fp16 on a GPU.")
    ] = "",
    device: Annotated[str, typer.Option(help="cuda, cuda:1, cpu. Default: a GPU if there is one.")] = "",
    images: Annotated[
        Path | None, typer.Option(help="A folder of photographs. Default: scikit-image's.")
    ] = None,
    size: Annotated[int, typer.Option(help="Height and width of the input in pixels.")] = 224,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A state_dict to load. Default: random weights, BN calibrated.")
    ] = None,
    backend: Annotated[str, typer.Option(help="What fastres may use: auto, or one backend.")] = "auto",
    num_threads: Annotated[
        int | None, typer.Option("--threads", help="CPU threads. Default: PyTorch's.")
    ] = None,
    budget: Annotated[float, typer.Option(help="Seconds of timing per batch size and dtype.")] = 12.0,
    out: Annotated[Path | None, typer.Option(help="A folder for a CSV and a chart (PNG).")] = None,
) -> None:
    """Measure a model: eager PyTorch (NCHW and channels_last) against fastres.

    Everybody is checked against the model in fp64 first, on photographs; who is wrong gets no time.
    """
    show = console()
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        cuda = where.type == "cuda"
        batches = _batches(batch or ("1,32,256" if cuda else "1,8"))
        dtypes = [dtype_from_name(d.strip()) for d in (dtype or _default_dtypes(cuda)).split(",")]
        if any(not d.is_floating_point for d in dtypes):
            raise ValueError(f"dtype: got {dtype!r}, takes fp32, bf16, fp16 or fp64")
        if size < 1:
            raise ValueError(f"size: got {size}, takes a positive number of pixels")
        net = load_model(model, checkpoint=checkpoint).to(where)
        calibration = photographs(max(*batches, CALIBRATION_IMAGES), size=size, folder=images).to(where)
    except (ValueError, ImportError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from error
    if cuda:
        torch.backends.cudnn.benchmark = True
    results: list[Result] = []
    with threads(num_threads):
        machine = environment(where)
        for line in machine.lines():
            show.print(line)
        if checkpoint is None:
            calibrate_bn(net, calibration[:CALIBRATION_IMAGES])
        with progress() as bar:
            steps = 2 * len(PROVIDERS) + 2
            task = bar.add_task(model, total=len(dtypes) * len(batches) * steps)
            done = 0
            for d in dtypes:
                for n in batches:
                    where_at = f"{model}, {dtype_name(d)}, batch {n}"
                    results += compare_models.compare(
                        net,
                        calibration[:n],
                        dtype=d,
                        backend=backend,
                        budget_s=budget,
                        on_step=lambda step, at=where_at: bar.update(
                            task, advance=1, description=f"{at}: {step}"
                        ),
                    )
                    done += steps
                    bar.update(task, completed=done)
    title = f"{model}, {size}x{size}, median of interleaved rounds"
    show.print(table(title, _COLUMNS, [_cells(r) for r in results], _CAPTION))
    for r in results:
        if r.failure:
            show.print(f"{r.provider}, {dtype_name(r.dtype)}, batch {r.batch}: {r.failure}", markup=False)
    if out is not None:
        for path in write(out, model, size, machine, results):
            show.print(f"wrote {path}")
    if any(r.failure for r in results if r.provider == "fastres"):
        raise typer.Exit(1)


_COLUMNS = (
    "dtype",
    ">batch",
    "provider",
    ">ms",
    ">p20 to p80",
    ">images/s",
    ">speed-up",
    ">p99 ms",
    ">first call s",
    ">error",
    ">same class",
)
_CAPTION = (
    f"speed-up: over {BASELINE}; error: worst image's ||y - ref|| / ||ref|| against the model in fp64; "
    "same class: argmax as fp64's; p99: of single calls, each waited for"
)


def _cells(r: Result) -> list[str]:
    setting = [dtype_name(r.dtype), str(r.batch), r.provider]
    error = "–" if r.errors is None else f"{r.errors.relative:.1e}"
    argmax = "–" if r.errors is None or r.errors.argmax is None else f"{r.errors.argmax:.0%}"
    if r.timing is None:
        return [*setting, "none", *["–"] * 5, error, argmax]
    return [
        *setting,
        figure(r.timing.median),
        f"{figure(r.timing.p20)} to {figure(r.timing.p80)}",
        figure(r.images_per_s),
        "–" if r.speedup is None else f"{r.speedup.median:.2f}x",
        figure(r.latency.percentile(0.99)),
        figure(r.first_call_s, 2),
        error,
        argmax,
    ]


def write(out: Path, model: str, size: int, machine: Environment, results: list[Result]) -> list[Path]:
    """Write a CSV and a chart of `results` into `out`; the paths written."""
    out.mkdir(parents=True, exist_ok=True)
    stem = f"{model.replace(':', '-')}-{machine.slug}"
    rows = [_row(r, model, size) | machine.as_dict() for r in results]
    path = out / f"{stem}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    from fastres.bench.chart import speed_chart

    title = f"{model}, {size}x{size}\n{machine.device}, torch {machine.torch}"
    return [path, speed_chart(out / f"{stem}.png", results, title)]


def _row(r: Result, model: str, size: int) -> dict[str, object]:
    timing, error = r.timing, r.errors
    return {
        "model": model,
        "size": size,
        "dtype": dtype_name(r.dtype),
        "batch": r.batch,
        "provider": r.provider,
        "median_ms": "" if timing is None else f"{timing.median:.6g}",
        "p20_ms": "" if timing is None else f"{timing.p20:.6g}",
        "p80_ms": "" if timing is None else f"{timing.p80:.6g}",
        "rounds": "" if timing is None else timing.n,
        "images_per_s": "" if timing is None else f"{r.images_per_s:.6g}",
        "speedup": "" if r.speedup is None else f"{r.speedup.median:.4g}",
        "latency_p50_ms": "" if r.latency is None else f"{r.latency.median:.6g}",
        "latency_p99_ms": "" if r.latency is None else f"{r.latency.percentile(0.99):.6g}",
        "first_call_s": "" if r.first_call_s is None else f"{r.first_call_s:.3g}",
        "error": "" if error is None else f"{error.relative:.3g}",
        "max_abs_error": "" if error is None else f"{error.absolute:.3g}",
        "argmax_agreement": "" if error is None or error.argmax is None else f"{error.argmax:.4g}",
        "failure": r.failure,
    }


def _batches(text: str) -> list[int]:
    try:
        batches = [int(part) for part in text.split(",")]
    except ValueError:
        batches = [0]
    if min(batches) < 1:
        raise ValueError(f"batch: got {text!r}, takes positive numbers, e.g. 1,8")
    return batches


def _default_dtypes(cuda: bool) -> str:
    if cuda:
        return "bf16,fp16"
    # Without these instructions bf16 is emulated and slower than fp32 for everybody.
    fast = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    names = ("avx512_bf16", "amx_bf16", "amx_tile", "bf16")
    return "fp32,bf16" if any(fast.get(name) for name in names) else "fp32"
