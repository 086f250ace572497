"""How wrong is an answer? The oracle is the same model in fp64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# A peer may round in other places than eager PyTorch does (after folding, between layers): up to this many
# times eager's own error is right, more is wrong. It refuses wrong results; tests/ hold fastres to the
# tighter bound.
ALLOWED_OVER_EAGER = 3.0


@dataclass(frozen=True)
class Errors:
    """Of an output against the fp64 oracle.

    Attributes:
        relative: the worst image's ||out - ref|| / ||ref||.
        absolute: the largest |out - ref|.
        argmax: share of images whose largest output stands in the same place; None unless outputs are [N, K].
    """

    relative: float
    absolute: float
    argmax: float | None

    def __str__(self) -> str:
        return f"{self.relative:.1e}" + ("" if self.argmax is None else f", argmax {self.argmax:.0%}")


def oracle(model: nn.Module, *inputs: Tensor, chunk: int = 32) -> Any:
    """`model(*inputs)` in fp64 on the inputs' device, on a copy, `chunk` images at a time.

    Inputs are taken as they are, rounding to their dtype included. Outputs come as `flatten`ed tensors,
    joined along the batch.
    """
    wide = copy.deepcopy(model).double().eval()
    n = inputs[0].shape[0]
    parts = []
    with torch.no_grad():
        for start in range(0, max(n, 1), chunk):
            parts.append(flatten(wide(*(x[start : start + chunk].double() for x in inputs))))
    return [torch.cat(same) for same in zip(*parts, strict=True)]


def flatten(outputs: Any) -> list[Tensor]:
    """The tensors in an output: a tensor, or tuples, lists and dicts of them."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    if isinstance(outputs, (tuple, list)):
        return [tensor for item in outputs for tensor in flatten(item)]
    raise TypeError(
        f"outputs: got {type(outputs).__name__}, takes tensors and tuples, lists or dicts of them"
    )


def errors(outputs: Any, reference: Tensor | Sequence[Tensor]) -> Errors:
    """The worst of all output tensors against `reference` (fp64, as `oracle` gives it).

    Raises:
        ValueError: where the number of tensors or a shape differs.
    """
    got = flatten(outputs)
    reference = flatten(list(reference) if not isinstance(reference, Tensor) else reference)
    if [tuple(t.shape) for t in got] != [tuple(t.shape) for t in reference]:
        raise ValueError(
            f"outputs: got shapes {[tuple(t.shape) for t in got]}, "
            f"the reference has {[tuple(t.shape) for t in reference]}"
        )
    worst = [_errors(out, ref) for out, ref in zip(got, reference, strict=True)]
    argmax = [e.argmax for e in worst if e.argmax is not None]
    return Errors(
        max(e.relative for e in worst),
        max(e.absolute for e in worst),
        min(argmax) if argmax else None,
    )


def _errors(out: Tensor, ref: Tensor) -> Errors:
    if ref.numel() == 0:
        return Errors(0.0, 0.0, None)
    out, ref = out.detach().to(ref.device).double(), ref.detach()
    images = ref.shape[0] if ref.dim() > 1 else 1
    difference = (out - ref).reshape(images, -1)
    norm = ref.reshape(images, -1).norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    relative = (difference.norm(dim=1) / norm).max().item()
    argmax = None
    if ref.dim() == 2 and ref.shape[1] > 1:
        argmax = (out.argmax(1) == ref.argmax(1)).double().mean().item()
    if not relative == relative:  # NaN: max() and comparisons with it would hide it
        relative = float("inf")
    return Errors(relative, difference.abs().max().item(), argmax)


def allowed(eager: Errors, dtype: torch.dtype) -> float:
    """The relative error from which on an answer counts as wrong, given eager's own in the same dtype."""
    return max(ALLOWED_OVER_EAGER * eager.relative, 16 * torch.finfo(dtype).eps)
