"""Starting from trained weights: load all but the classifier, freeze stages, keep BN statistics."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn


def load_backbone(model: nn.Module, path: str | Path) -> list[str]:
    """Loads everything but the classifier `fc` into `model`.

    Args:
        path: a checkpoint of `fastres train`, a state_dict, or a dict with one under "state_dict" or "model".

    Returns:
        Keys that were in the file and are not used: those of its classifier.

    Raises:
        ValueError: keys or shapes of anything else differ.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in ("model", "state_dict"):
        state = state.get(wrapper, state)
    state = {key.removeprefix("module."): value for key, value in state.items()}
    head = [key for key in state if key.startswith("fc.")]
    body = {key: value for key, value in state.items() if key not in head}
    own = model.state_dict()
    wanted = {key for key in own if not key.startswith("fc.")}
    problems = [f"{key} is missing" for key in sorted(wanted - body.keys())]
    problems += [f"{key} is unknown" for key in sorted(body.keys() - wanted)]
    problems += [
        f"{key} is {tuple(body[key].shape)}, expected {tuple(own[key].shape)}"
        for key in sorted(wanted & body.keys())
        if body[key].shape != own[key].shape
    ]
    if problems:
        raise ValueError(f"finetune: {path} does not fit the model: {'; '.join(problems[:5])}")
    model.load_state_dict(body, strict=False)
    return head


def frozen_parts(model: nn.Module, stage: int | None) -> list[nn.Module]:
    """The stem (stage 0) and the stages up to `stage`; none for None."""
    if stage is None:
        return []
    stages = [getattr(model, f"layer{i}") for i in range(1, stage + 1) if hasattr(model, f"layer{i}")]
    return [model.conv1, model.bn1, *stages]


def freeze(model: nn.Module, stage: int | None) -> None:
    """No gradients for the frozen parts."""
    for part in frozen_parts(model, stage):
        part.requires_grad_(False)


def train_mode(model: nn.Module, stage: int | None, frozen_bn: bool) -> None:
    """`model.train()`, except that frozen parts, and with `frozen_bn` every BN, keep their statistics."""
    model.train()
    for part in frozen_parts(model, stage):
        part.eval()
    if frozen_bn:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
