"""Models by name: torchvision's, timm's and fastres's."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn


def load_model(name: str, *, checkpoint: str | Path | None = None) -> nn.Module:
    """A model in eval mode with random weights (seed 0), or those of `checkpoint`.

    Args:
        name: "resnet50" (torchvision, else fastres), or with its origin: "torchvision:resnet50",
            "timm:resnet50d", "fastres:resnet11".
        checkpoint: a file with a state_dict, as `torch.save` writes it.

    Raises:
        ValueError: for a name that nobody knows.
        ImportError: where the library that has it is missing.
    """
    origin, _, bare = name.rpartition(":")
    if origin not in ("", "torchvision", "timm", "fastres"):
        raise ValueError(f"model: got {name!r}, takes NAME, torchvision:NAME, timm:NAME or fastres:NAME")
    torch.manual_seed(0)
    makers = {"torchvision": _torchvision, "timm": _timm, "fastres": _fastres}
    model, missing = None, []
    for source in (origin,) if origin else ("torchvision", "fastres"):
        try:
            model = makers[source](bare)
        except ImportError as error:
            missing.append(f"{source} is not installed ({error}): pip install 'fastres[models]'")
        if model is not None:
            break
    if model is None:
        if missing:
            raise ImportError("; ".join(missing))
        raise ValueError(f"model: {name!r} is known to nobody; timm's are written timm:{bare}")
    if checkpoint is not None:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(state.get("state_dict", state))
    return model.eval()


def _torchvision(name: str) -> nn.Module | None:
    from torchvision import models

    return models.get_model(name, weights=None) if name in models.list_models() else None


def _timm(name: str) -> nn.Module | None:
    import timm

    return timm.create_model(name, pretrained=False) if timm.is_model(name) else None


def _fastres(name: str) -> nn.Module | None:
    import fastres

    # the factories are named after their networks: resnet50, resnext50_32x4d, wide_resnet50_2, resnet11
    known = "resne" in name and name.islower() and name in dir(fastres)
    return getattr(fastres, name)() if known else None
