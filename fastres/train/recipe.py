"""Everything that decides the result of a training run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from .. import nn as models

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
MODELS = tuple(name for name in models.__all__ if name[0].islower())
# These may differ between the parts of an interrupted run: they change no number.
_FREE = ("out", "workers", "checkpoint_every")


@dataclass(frozen=True)
class Recipe:
    """A training run. The same recipe on the same kind of device gives the same weights, interrupted or not.

    Attributes:
        data: "digits", "synthetic", or a folder with train/CLASS/* and val/CLASS/*.
        model: a factory of `fastres.nn`.
        epochs: passes over the training set.
        batch: images of an optimizer step, over all processes and accumulated parts.
        accumulate: parts that a process computes one after another for one step.
        lr: peak learning rate; None: 0.2 x batch / 256 (Goyal et al. 2017, arXiv:1706.02677, doubled for the
            Nesterov steps and short runs that this recipe is made for).
        warmup: epochs of linear warm-up, then a cosine to zero.
        momentum, weight_decay: of SGD with Nesterov momentum; vectors (BN, biases) do not decay.
        label_smoothing: share of the target spread over all classes.
        precision: "fp32", "bf16" or "fp16" (autocast), "auto": bf16 on a GPU, fp32 on a CPU.
        channels_last: memory format of weights and images.
        size: height and width of the images; None: 32 for digits, else 224.
        zero_init_residual: start blocks as identities.
        finetune: a checkpoint or state_dict to start from; the classifier is made anew.
        freeze: None, or the last frozen stage: 0 is the stem alone, 2 the stem, layer1 and layer2.
        frozen_bn: keep all BN statistics as they are.
        sync_bn: batch statistics over all processes (GPUs only, as PyTorch's DDP demands).
        seed: of weights, order and augmentation.
        workers: processes that load images.
        out: folder for checkpoint.pt, model.pt, log.csv and curves.png; None: nothing is written.
        checkpoint_every: also write a checkpoint every so many steps; None: after every epoch.
    """

    data: str = "digits"
    model: str = "resnet18"
    epochs: int = 15
    batch: int = 64
    accumulate: int = 1
    lr: float | None = None
    warmup: float = 2.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    precision: str = "auto"
    channels_last: bool = True
    size: int | None = None
    zero_init_residual: bool = True
    finetune: str | None = None
    freeze: int | None = None
    frozen_bn: bool = False
    sync_bn: bool = False
    seed: int = 0
    workers: int = 0
    out: str | None = None
    checkpoint_every: int | None = None

    def __post_init__(self):
        if self.model not in MODELS:
            raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {self.model!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        for name in ("epochs", "batch", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.size is not None and self.size < 1:
            raise ValueError(f"size: expected at least 1 pixel, got {self.size}")
        if self.freeze is not None and not 0 <= self.freeze <= 4:
            raise ValueError(f"freeze: expected None or 0 to 4, got {self.freeze}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: expected 0 up to 1, got {self.label_smoothing}")
        if self.finetune is not None and not Path(self.finetune).is_file():
            raise ValueError(f"finetune: expected a file, got {self.finetune!r}")

    @property
    def peak_lr(self) -> float:
        return 0.2 * self.batch / 256 if self.lr is None else self.lr

    def make_model(self, classes: int) -> nn.Module:
        return getattr(models, self.model)(num_classes=classes, zero_init_residual=self.zero_init_residual)

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """Of the step with this number, from 0: linear to the peak, then half a cosine to zero."""
        warm, total = round(self.warmup * steps_per_epoch), self.epochs * steps_per_epoch
        if step < warm:
            return self.peak_lr * (step + 1) / warm
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def differences(self, other: dict[str, Any]) -> list[str]:
        """What keeps a checkpoint of the recipe `other` from being continued with this one."""
        mine = self.as_dict()
        names = [f.name for f in fields(self) if f.name not in _FREE]
        return [f"{n}: {other.get(n)!r} there, {mine[n]!r} here" for n in names if other.get(n) != mine[n]]
