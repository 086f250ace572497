"""add_relu: max(a + b, 0), the end of a residual block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.case import Case, Subject, activations


class AddReLU(nn.Module):
    """relu(a + b)."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return F.relu(a + b)


def case(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, level: str = "op", clock: str = "kernel"
) -> Case:
    def make() -> Subject:
        def ours():
            from fastres import add_relu

            return add_relu

        inputs = (activations(shape, dtype, device), activations(shape, dtype, device, seed=1) - 0.5)
        return Subject(AddReLU(), inputs, ours)

    elements = torch.Size(shape).numel()
    return Case(
        level,
        "add_relu",
        f"add_relu {'x'.join(map(str, shape))}",
        shape[0],
        dtype,
        device,
        [(3 * elements * dtype.itemsize, 2 * elements)],
        make,
        clock=clock,
    )
