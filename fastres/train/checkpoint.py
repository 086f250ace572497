"""The files of a run: checkpoint, log, curves."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

FORMAT = 1


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint so that a crash leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save({"format": FORMAT} | state, part)
    os.replace(part, path)


def load(path: Path) -> dict[str, Any]:
    """A checkpoint, on the CPU. ValueError if there is none, or it is of another format."""
    if not path.is_file():
        raise ValueError(f"resume: there is no checkpoint {path}")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state.get("format") != FORMAT:
        raise ValueError(f"resume: {path} has format {state.get('format')}, expected {FORMAT}")
    return state


def write_log(path: Path, history: Sequence[dict[str, float]]) -> None:
    """One row an epoch; written whole, so that an interrupted epoch leaves no row twice."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, history[0].keys())
        writer.writeheader()
        writer.writerows(history)


def draw_curves(path: Path, history: Sequence[dict[str, float]], title: str) -> bool:
    """Loss and error over epochs as a PNG. False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    epochs = [row["epoch"] for row in history]
    figure, (losses, errors) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, colour in (("train", "#56B4E9"), ("test", "#D55E00")):
        losses.plot(epochs, [row[f"{name}_loss"] for row in history], color=colour, marker=".", label=name)
        wrong = [100 * (1 - row[f"{name}_accuracy"]) for row in history]
        errors.plot(epochs, wrong, color=colour, marker=".", label=name)
    losses.set_ylabel("cross-entropy (train: smoothed labels)")
    errors.set_ylabel("wrong, %")
    errors.set_yscale("symlog", linthresh=1)
    errors.set_ylim(bottom=0)
    errors.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    best = max(history, key=lambda row: row["test_accuracy"])
    losses.set_title(title, fontsize=10)
    errors.set_title(f"best test accuracy {best['test_accuracy']:.2%}, epoch {best['epoch']}", fontsize=10)
    for axis in (losses, errors):
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
