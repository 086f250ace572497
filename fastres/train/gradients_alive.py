"""Do gradients reach the first layer? Plain and residual networks of growing depth, trained side by side.

    python -m fastres.train.gradients_alive --out DIR

He et al. 2015 (arXiv:1512.03385) found that plain networks train worse the deeper they are, and residual
ones do not. The derivative of a residual block is the identity plus that of its branch, so what arrives at
the end reaches the start. With batch normalisation gradients do not vanish in plain networks, they explode
towards the input by a factor a layer (Yang et al. 2019, arXiv:1902.08129): the first layers then take steps
that have nothing to do with the loss. Recorded is, for every block, the norm of the loss's gradient with
respect to the block's output.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from ..bench.table import console, progress, table
from ..nn import BasicBlock, ConvBNAct
from . import data as datasets

KINDS = ("plain", "residual")


@dataclass(frozen=True)
class Study:
    """One network.

    norms[s][b]: norm of d(loss)/d(output of block b) in training step s; losses[s]: its loss.
    """

    kind: str
    blocks: int
    norms: tuple[tuple[float, ...], ...]
    losses: tuple[float, ...]

    @property
    def spread(self) -> float:
        """Gradient norm at the first block over that at the last, before training: 1 is alive."""
        return self.norms[0][0] / self.norms[0][-1]


def network(kind: str, blocks: int, width: int, classes: int) -> nn.Sequential:
    """Stem, `blocks` blocks of two 3x3 convolutions each, pooling and classifier."""
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")

    def block() -> nn.Module:
        if kind == "residual":
            return BasicBlock(width, width)
        return nn.Sequential(ConvBNAct(width, width), ConvBNAct(width, width))

    made = nn.Sequential(
        ConvBNAct(3, width),
        *(block() for _ in range(blocks)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, classes),
    )
    for module in made.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return made


def study(kind: str, blocks: int, images: Tensor, labels: Tensor, *, width: int = 16, seed: int = 0) -> Study:
    """Trains one network and records what reaches its blocks.

    Args:
        kind: "plain" or "residual".
        blocks: of two convolutions each.
        images: [steps, N, 3, H, W], one batch a step; labels: [steps, N].
        width: channels. seed: of the weights.
    """
    torch.manual_seed(seed)
    model = network(kind, blocks, width, int(labels.max()) + 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    norms, losses = [], []
    for x, target in zip(images, labels, strict=True):
        outputs = []
        for module in model[: blocks + 1]:
            x = module(x)
            outputs.append(x)
            x.retain_grad()
        loss = F.cross_entropy(model[blocks + 1 :](x), target)
        optimizer.zero_grad()
        loss.backward()
        norms.append(tuple(t.grad.norm().item() for t in outputs[1:]))
        losses.append(loss.item())
        optimizer.step()
    return Study(kind, blocks, tuple(norms), tuple(losses))


def batches(steps: int, batch: int, size: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Batches of digits for `study`, normalised."""
    digits = datasets.digits(size)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(digits.train), (steps, batch), generator=generator)
    images, labels = digits.train.images.tensors
    mean, std = digits.mean[0], digits.std[0]
    return (images[chosen].float() / 255 - mean) / std, labels[chosen]


def write(out: Path, studies: Sequence[Study]) -> list[Path]:
    """gradients_alive.csv (a row per network, step and block) and gradients_alive.png, in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    rows = out / "gradients_alive.csv"
    with rows.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["network", "blocks", "step", "loss", "block", "gradient_norm"])
        for s in studies:
            for step, (loss, norms) in enumerate(zip(s.losses, s.norms, strict=True)):
                writer.writerows(
                    [s.kind, s.blocks, step, loss, b, norm] for b, norm in enumerate(norms, start=1)
                )
    return [rows, draw(out / "gradients_alive.png", studies)]


def draw(path: Path, studies: Sequence[Study]) -> Path:
    """Left: gradient norms over the blocks before training. Right: the loss while training."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the chart needs matplotlib: pip install 'fastres[train]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9.5, 6.4), sharey="row", layout="constrained")
    depths = sorted({s.blocks for s in studies})
    shades = plt.colormaps["viridis"]
    for column, kind in enumerate(KINDS):
        above, below = axes[0][column], axes[1][column]
        for s in (s for s in studies if s.kind == kind):
            colour = shades(0.9 * depths.index(s.blocks) / max(len(depths) - 1, 1))
            relative = [norm / s.norms[0][-1] for norm in s.norms[0]]
            above.plot(range(1, s.blocks + 1), relative, color=colour, marker=".", label=f"{s.blocks} blocks")
            below.plot(_smooth(s.losses), color=colour, label=f"{s.blocks} blocks")
        above.set_yscale("log")
        above.set_xscale("log", base=2)
        above.set_xticks(depths, depths)
        above.axhline(1, color="#999999", linewidth=0.8)
        above.set_title(f"{kind} networks")
        above.set_xlabel("block, counted from the input")
        below.set_xlabel("training step")
        for axis in (above, below):
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("gradient norm at the block's output\nbefore training, last block = 1")
    axes[1][0].set_ylabel("cross-entropy (mean of 5 steps)")
    axes[0][1].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _smooth(values: Sequence[float], window: int = 5) -> list[float]:
    return [sum(values[max(i - window + 1, 0) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def main(
    blocks: Annotated[str, typer.Option(help="Depths, in blocks of two convolutions.")] = "2,4,8,16,32",
    steps: Annotated[int, typer.Option(help="Training steps.")] = 80,
    batch: Annotated[int, typer.Option(help="Images a step.")] = 64,
    out: Annotated[Path | None, typer.Option(help="Folder for a CSV and a chart.")] = None,
) -> None:
    """Train plain and residual networks of growing depth on digits; record the gradients of every block."""
    depths = [int(b) for b in blocks.split(",")]
    images, labels = batches(steps, batch)
    made = []
    with progress() as bar:
        for depth in bar.track(depths, description="depths"):
            made += [study(kind, depth, images, labels) for kind in KINDS]
    cells = [[s.kind, s.blocks, f"{s.spread:.3g}", f"{_smooth(s.losses)[-1]:.3f}"] for s in made]
    console().print(table("Gradients", ["network", ">blocks", ">first/last", ">loss after training"], cells))
    for path in write(out, made) if out is not None else ():
        typer.echo(str(path))


if __name__ == "__main__":
    typer.run(main)
