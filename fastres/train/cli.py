"""`fastres train`: a ResNet from scratch or from trained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..bench.table import console, progress
from .distributed import Processes, join, leave
from .loop import Interrupted, Progress, Result
from .loop import train as run
from .recipe import MODELS, Recipe

_DEFAULT = Recipe()


def train(
    data: Annotated[
        str, typer.Option(help="digits, synthetic, or a folder with train/CLASS/* and val/CLASS/*.")
    ] = _DEFAULT.data,
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = _DEFAULT.model,
    epochs: Annotated[int, typer.Option(help="Passes over the training set.")] = _DEFAULT.epochs,
    batch: Annotated[
        int, typer.Option(help="Images of an optimizer step, over all processes.")
    ] = _DEFAULT.batch,
    accumulate: Annotated[
        int, typer.Option(help="Parts of a batch that are computed one after another.")
    ] = _DEFAULT.accumulate,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate. Default: 0.2 x batch / 256.")
    ] = _DEFAULT.lr,
    warmup: Annotated[
        float, typer.Option(help="Epochs of linear warm-up; a cosine follows.")
    ] = _DEFAULT.warmup,
    momentum: Annotated[float, typer.Option(help="Nesterov momentum.")] = _DEFAULT.momentum,
    weight_decay: Annotated[float, typer.Option(help="Not for BN and biases.")] = _DEFAULT.weight_decay,
    label_smoothing: Annotated[
        float, typer.Option(help="Share spread over all classes.")
    ] = _DEFAULT.label_smoothing,
    precision: Annotated[
        str, typer.Option(help="fp32, bf16, fp16, or auto: bf16 on a GPU, fp32 on a CPU.")
    ] = _DEFAULT.precision,
    size: Annotated[
        int | None, typer.Option(help="Height and width of images. Default: digits 32, else 224.")
    ] = _DEFAULT.size,
    finetune: Annotated[
        Path | None, typer.Option(help="Trained weights to start from; the classifier is made anew.")
    ] = None,
    freeze: Annotated[
        int | None, typer.Option(help="Last frozen stage: 0 the stem, 1 also layer1, and so on.")
    ] = _DEFAULT.freeze,
    frozen_bn: Annotated[
        bool, typer.Option("--frozen-bn", help="Keep all BN statistics as they are.")
    ] = _DEFAULT.frozen_bn,
    sync_bn: Annotated[
        bool, typer.Option("--sync-bn", help="BN statistics over all GPUs.")
    ] = _DEFAULT.sync_bn,
    seed: Annotated[int, typer.Option(help="Of weights, order and augmentation.")] = _DEFAULT.seed,
    workers: Annotated[int, typer.Option(help="Processes that load images.")] = _DEFAULT.workers,
    device: Annotated[str, typer.Option(help="cuda, cuda:1, cpu. Default: a GPU if there is one.")] = "",
    out: Annotated[
        Path | None, typer.Option(help="Folder for checkpoint.pt, model.pt, log.csv, curves.png.")
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints. Default: an epoch.")
    ] = _DEFAULT.checkpoint_every,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
) -> None:
    """Train a ResNet: SGD with Nesterov momentum, warm-up and cosine, label smoothing.

    Several GPUs: torchrun --nproc-per-node=8 -m fastres.cli train ... An interrupted run (Ctrl-C) that has a
        folder
    goes on with --resume, and ends with the same weights as an uninterrupted one.
    """
    processes = None
    try:
        recipe = Recipe(
            data=data,
            model=model,
            epochs=epochs,
            batch=batch,
            accumulate=accumulate,
            lr=lr,
            warmup=warmup,
            momentum=momentum,
            weight_decay=weight_decay,
            label_smoothing=label_smoothing,
            precision=precision,
            size=size,
            # A fine-tuned network keeps its residual branches.
            zero_init_residual=finetune is None,
            finetune=None if finetune is None else str(finetune),
            freeze=freeze,
            frozen_bn=frozen_bn,
            sync_bn=sync_bn,
            seed=seed,
            workers=workers,
            out=None if out is None else str(out),
            checkpoint_every=checkpoint_every,
        )
        processes = join(device or None)
        result = _with_progress(recipe, resume, device or None, processes)
    except (ValueError, ImportError) as error:
        raise typer.BadParameter(str(error)) from error
    except Interrupted as stopped:
        again = f"; go on with --resume --out {out}" if out is not None else ""
        typer.echo(f"{stopped}{again}", err=True)
        raise typer.Exit(130) from None
    finally:
        if processes is not None:
            leave(processes)
    if processes.first:
        _report(result, recipe)


def _with_progress(recipe: Recipe, resume: bool, device: str | None, processes: Processes) -> Result:
    if not processes.first:
        return run(recipe, resume=resume, device=device)
    show = console()
    show.print(f"{recipe.model} on {recipe.data}: {recipe.epochs} epochs, batch {recipe.batch}")
    with progress() as bar:
        task, done = bar.add_task("", total=None), 0

        def on_step(at: Progress) -> None:
            nonlocal done
            first = done == 0
            done = at.epoch * at.steps + at.step
            if first:
                # A resumed run starts in the middle: the rate must not count what was done before.
                bar.reset(task, total=recipe.epochs * at.steps, completed=done)
            bar.update(task, completed=done, description=f"epoch {at.epoch + 1}/{recipe.epochs}")
            if at.row is not None:
                show.print(_line(at.row, recipe))

        return run(recipe, resume=resume, device=device, on_step=on_step)


def _line(row: dict[str, float], recipe: Recipe) -> str:
    return (
        f"epoch {row['epoch']:3d}/{recipe.epochs}  lr {row['lr']:.4f}  "
        f"train loss {row['train_loss']:.4f} acc {row['train_accuracy']:.2%}  "
        f"test loss {row['test_loss']:.4f} acc {row['test_accuracy']:.2%}  "
        f"{row['images_per_s']:,.0f} images/s"
    )


def _report(result: Result, recipe: Recipe) -> None:
    best = max(row["test_accuracy"] for row in result.history)
    typer.echo(f"test accuracy {result.accuracy:.2%} (best {best:.2%})")
    if recipe.out is not None:
        typer.echo(f"in {recipe.out}: checkpoint.pt, model.pt, log.csv, curves.png")
