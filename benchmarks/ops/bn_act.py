"""bn_act: batch normalisation by the batch's own statistics, residual add, ReLU; forward, and backward."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.case import Case, Subject, activations


class BNAddReLU(nn.Module):
    """relu(bn(x) + residual) in training."""

    def __init__(self, channels: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return F.relu(self.bn(x) + residual)


class OursBNAddReLU(BNAddReLU):
    """The same by fastres's op."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        from fastres import bn_act

        bn = self.bn
        if self.training:
            bn.num_batches_tracked.add_(1)
        return bn_act(
            x,
            bn.running_mean,
            bn.running_var,
            bn.weight,
            bn.bias,
            self.training,
            bn.momentum,
            bn.eps,
            residual=residual,
        )


class Gradients(nn.Module):
    """Forward and backward of a body: its output and the gradients of its inputs and parameters."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x: Tensor, residual: Tensor, grad: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
            out = self.body(x, residual)
            wanted = (x, residual, *self.body.parameters())
            return [out.detach(), *torch.autograd.grad(out, wanted, grad)]


def case(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    backward: bool,
    level: str = "op",
    clock: str = "kernel",
) -> Case:
    def make() -> Subject:
        def module(body: type[BNAddReLU]) -> nn.Module:
            torch.manual_seed(0)
            made = body(shape[1])
            nn.init.uniform_(made.bn.weight, 0.5, 1.2)
            nn.init.normal_(made.bn.bias, std=0.1)
            return (Gradients(made) if backward else made).to(device).train()

        plain = module(BNAddReLU)
        inputs = [activations(shape, dtype, device, seed) for seed in range(3 if backward else 2)]
        wide = [x.double() for x in inputs]
        return Subject(
            plain,
            tuple(inputs),
            fastres=lambda: module(OursBNAddReLU),
            keeps_dtype=True,
            exact=lambda: _tensors(copy.deepcopy(plain).double()(*wide)),
        )

    elements = torch.Size(shape).numel()
    # forward reads x twice (statistics, result) and the residual, writes out; backward reads grad, x and out
    # twice (sums, result), writes the gradients of x and of the residual
    passes = 4 + (8 if backward else 0)
    return Case(
        level,
        "bn_act_backward" if backward else "bn_act",
        f"bn_act{' forward+backward' if backward else ''} {'x'.join(map(str, shape))} +add relu",
        shape[0],
        dtype,
        device,
        [(passes * elements * dtype.itemsize, (20 if backward else 8) * elements)],
        make,
        clock=clock,
    )


def _tensors(out: Tensor | list[Tensor]) -> list[Tensor]:
    return [t.detach() for t in (out if isinstance(out, list) else [out])]
