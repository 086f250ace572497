"""The training loop."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import checkpoint, data, finetune
from .distributed import Processes, join
from .recipe import Recipe

# Several processes agree about an interruption only so often: it makes the host wait for the device.
_AGREE_EVERY = 16


class Interrupted(Exception):
    """The run was asked to stop; its checkpoint, if it has a folder, continues it."""


@dataclass(frozen=True)
class Result:
    """history: one dict an epoch (epoch, lr, train_loss, train_accuracy, test_loss, test_accuracy,
    images_per_s,
    seconds). model: trained, in eval mode. classes: names."""

    history: tuple[dict[str, float], ...]
    model: nn.Module
    classes: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        """On the test set, after the last epoch."""
        return self.history[-1]["test_accuracy"]


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    device: str | None = None,
    model: nn.Module | None = None,
    on_step: Callable[[Progress], None] | None = None,
) -> Result:
    """Trains as the recipe says.

    Args:
        recipe: what to do.
        resume: go on from the checkpoint in `recipe.out`.
        device: see `fastres.train.distributed.join`.
        model: trained instead of the recipe's (its classifier must fit the data).
        on_step: called after every optimizer step.

    Raises:
        ValueError: recipe, data and checkpoint do not fit each other.
        Interrupted: SIGINT or SIGTERM came; the checkpoint is written.
    """
    return _Run(recipe, join(device), model, on_step).run(resume)


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a step; `row` is the epoch's result once it is complete."""

    epoch: int
    step: int
    steps: int
    images: int
    row: dict[str, float] | None = None


class _Run:
    def __init__(
        self,
        recipe: Recipe,
        processes: Processes,
        model: nn.Module | None,
        on_step: Callable[[Progress], None] | None,
    ):
        self.recipe, self.processes = recipe, processes
        self.on_step = on_step or (lambda progress: None)
        self.data = data.load(recipe)
        self.loader = data.TrainLoader(self.data, recipe, processes)
        self.test = data.test_loader(self.data, recipe, processes)
        self.device = processes.device
        self.autocast = self._autocast_dtype()
        self.model = self._prepare(model)
        self.optimizer = self._make_optimizer()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast == torch.float16)
        self.network = self._distribute()
        shape = (1, 3, 1, 1)
        self.mean = torch.tensor(self.data.mean, device=self.device).view(shape) * 255
        self.std = torch.tensor(self.data.std, device=self.device).view(shape) * 255
        self.history: list[dict[str, float]] = []
        self.epoch = self.step = 0
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, right, images

    def _autocast_dtype(self) -> torch.dtype | None:
        precision = self.recipe.precision
        if precision == "auto":
            precision = "bf16" if self.device.type == "cuda" else "fp32"
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    def _prepare(self, model: nn.Module | None) -> nn.Module:
        torch.manual_seed(self.recipe.seed)
        if model is None:
            model = self.recipe.make_model(len(self.data.classes))
        if self.recipe.finetune is not None:
            finetune.load_backbone(model, self.recipe.finetune)
        finetune.freeze(model, self.recipe.freeze)
        if self.recipe.sync_bn:
            if self.device.type != "cuda":
                raise ValueError(f"sync_bn: PyTorch's DDP takes it on GPUs only, this is {self.device}")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        memory_format = torch.channels_last if self.recipe.channels_last else torch.contiguous_format
        return model.to(self.device, memory_format=memory_format)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": self.recipe.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.SGD(
            groups, lr=self.recipe.peak_lr, momentum=self.recipe.momentum, nesterov=True, fused=True
        )

    def _distribute(self) -> nn.Module:
        if self.processes.count == 1:
            return self.model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(self.model, device_ids=ids, gradient_as_bucket_view=True)

    # --- the run

    def run(self, resume: bool) -> Result:
        if resume:
            self._resume()
        with _until_asked_to_stop() as asked:
            while self.epoch < self.recipe.epochs:
                self._epoch(asked)
        if self._folder is not None and self.processes.first:
            state = {key: t.cpu().contiguous() for key, t in self.model.state_dict().items()}
            torch.save(state, self._folder / "model.pt")
        return Result(tuple(self.history), self.model.eval(), self.data.classes)

    def _epoch(self, asked: threading.Event) -> None:
        finetune.train_mode(self.model, self.recipe.freeze, self.recipe.frozen_bn)
        batches = self.loader.epoch(self.epoch, self.step)
        began, images = time.perf_counter(), 0
        while self.step < self.loader.steps:
            self._optimizer_step(batches)
            self.step += 1
            images += self.recipe.batch
            if self.step < self.loader.steps:
                self.on_step(Progress(self.epoch, self.step, self.loader.steps, images))
                self._keep(asked)
        loss, right, seen = self.processes.sum(self.sums).tolist()
        seconds = time.perf_counter() - began
        test_loss, test_accuracy = self._evaluate()
        row = {
            "epoch": self.epoch + 1,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": loss / seen,
            "train_accuracy": right / seen,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "images_per_s": images / seconds,
            "seconds": seconds,
        }
        self.history.append(row)
        self.on_step(Progress(self.epoch, self.step, self.loader.steps, images, row))
        self.epoch, self.step = self.epoch + 1, 0
        self.sums.zero_()
        self._save()
        if self.epoch < self.recipe.epochs and self._agree(asked):
            raise Interrupted(f"stopped after epoch {self.epoch}")

    def _optimizer_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        number = self.epoch * self.loader.steps + self.step
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(number, self.loader.steps)
        self.optimizer.zero_grad(set_to_none=True)
        for part in range(self.recipe.accumulate):
            last = part == self.recipe.accumulate - 1
            # Gradients are exchanged once, with the last part.
            quiet = self.processes.count > 1 and not last
            with self.network.no_sync() if quiet else contextlib.nullcontext():
                x, target = self._to_device(*next(batches))
                with self._precision():
                    out = self.network(x)
                    loss = F.cross_entropy(out.float(), target, label_smoothing=self.recipe.label_smoothing)
                self.scaler.scale(loss / self.recipe.accumulate).backward()
            with torch.no_grad():
                right = (out.argmax(1) == target).sum()
                seen = torch.full_like(loss, len(target))
                self.sums += torch.stack([loss.detach() * len(target), right, seen])
        self.scaler.step(self.optimizer)
        self.scaler.update()

    @torch.no_grad()
    def _evaluate(self) -> tuple[float, float]:
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for images, labels in self.test:
            x, target = self._to_device(images, labels)
            with self._precision():
                out = self.model(x).float()
            right = (out.argmax(1) == target).sum()
            loss = F.cross_entropy(out, target, reduction="sum")
            sums += torch.stack([loss, right, torch.full_like(loss, len(target))])
        loss, right, seen = self.processes.sum(sums).tolist()
        return loss / seen, right / seen

    def _to_device(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        # Bytes cross the bus, floats are made where they are used.
        x = images.to(self.device, non_blocking=True)
        if self.recipe.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return x.float().sub_(self.mean).div_(self.std), labels.to(self.device, non_blocking=True)

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    # --- interruption

    @property
    def _folder(self) -> Path | None:
        return None if self.recipe.out is None else Path(self.recipe.out)

    def _keep(self, asked: threading.Event) -> None:
        """In the middle of an epoch: a checkpoint if it is time for one, or if somebody asked to stop."""
        every = self.recipe.checkpoint_every
        stop = self._agree(asked) if self.processes.count == 1 or self.step % _AGREE_EVERY == 0 else False
        if stop or (every is not None and self.step % every == 0):
            self._save()
        if stop:
            raise Interrupted(f"stopped in epoch {self.epoch + 1} after step {self.step}")

    def _agree(self, asked: threading.Event) -> bool:
        if self.processes.count == 1:
            return asked.is_set()
        return bool(self.processes.sum(torch.tensor(float(asked.is_set()), device=self.device)) > 0)

    def _save(self) -> None:
        if self._folder is None:
            return
        # A process's own share of the sums: summed here, the first process goes on with all of it.
        sums = self.processes.sum(self.sums.clone())
        if self.processes.first:
            state = {
                "recipe": self.recipe.as_dict(),
                "classes": list(self.data.classes),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "epoch": self.epoch,
                "step": self.step,
                "sums": sums,
                "history": self.history,
            }
            checkpoint.save(self._folder / "checkpoint.pt", state)
            if self.history:
                checkpoint.write_log(self._folder / "log.csv", self.history)
                title = f"{self.recipe.model} on {Path(self.recipe.data).name}"
                checkpoint.draw_curves(self._folder / "curves.png", self.history, title)
        self.processes.wait()

    def _resume(self) -> None:
        if self._folder is None:
            raise ValueError("resume: the recipe names no folder (out)")
        state: dict[str, Any] = checkpoint.load(self._folder / "checkpoint.pt")
        if differences := self.recipe.differences(state["recipe"]):
            raise ValueError(f"resume: the checkpoint is of another recipe: {'; '.join(differences)}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.history = state["epoch"], state["step"], list(state["history"])
        if self.processes.first:
            self.sums.copy_(state["sums"])


@contextlib.contextmanager
def _until_asked_to_stop() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second signal acts as usual."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def ask(number, frame):
        asked.set()
        signal.signal(number, before[number])

    for s in before:
        signal.signal(s, ask)
    try:
        yield asked
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
