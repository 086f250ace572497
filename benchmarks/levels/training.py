"""Training steps: forward, loss, backward and SGD, under autocast where the dtype is not fp32."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.case import Case, Subject
from benchmarks.scope import Scope
from benchmarks.shapes import parts
from fastres.bench.models import load_model
from fastres.bench.photographs import photographs


class Step(nn.Module):
    """One training step of `body`; returns the loss and the gradients.

    The learning rate is 0: the optimizer does all its work and every step starts from the same weights, so
    that every step can be compared with fp64.
    """

    def __init__(self, body: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.body = body
        self.dtype = dtype
        self.optimizer: torch.optim.Optimizer | None = None

    def forward(self, x: Tensor, target: Tensor) -> list[Tensor]:
        parameters = list(self.body.parameters())
        if self.optimizer is None:
            self.optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=1e-4, fused=True)
        self.optimizer.zero_grad(set_to_none=True)
        narrow = self.dtype not in (torch.float32, torch.float64)
        with torch.enable_grad():
            with torch.autocast(x.device.type, self.dtype, enabled=narrow):
                loss = F.cross_entropy(self.body(x), target)
            loss.backward()
        self.optimizer.step()
        return [loss.detach().reshape(1), *(p.grad.flatten() for p in parameters)]


def cases(scope: Scope) -> list[Case]:
    networks = scope.networks or scope.pick(
        smoke=("resnet18",), quick=("resnet18",), cuda_quick=("resnet50",), full=("resnet18", "resnet50")
    )
    batches = scope.batches or scope.pick(
        smoke=(4,), quick=(8,), cuda_quick=(256,), full=(8,), cuda_full=(64, 256)
    )
    # fp16 needs a loss scale, which is not what is measured here
    dtypes = [dtype for dtype in scope.dtypes if dtype != torch.float16]
    size = scope.pick(smoke=32, quick=112, cuda_quick=224, full=224)
    return [_case(net, n, size, dtype, scope.device) for net in networks for dtype in dtypes for n in batches]


def _case(network: str, n: int, size: int, dtype: torch.dtype, device: torch.device) -> Case:
    def make() -> Subject:
        images = photographs(n, size=size).to(device).contiguous(memory_format=torch.channels_last)
        target = torch.arange(n, device=device) * 7 % 1000
        step = Step(load_model(network), dtype).to(device).train()

        def ours() -> nn.Module:
            from fastres import accelerate

            own = copy.deepcopy(step).to(memory_format=torch.channels_last)
            own.body = accelerate(own.body).train()
            return own

        def exact() -> list[Tensor]:
            wide = Step(copy.deepcopy(step.body).double(), torch.float64).train()
            return wide(images.double(), target)

        return Subject(step, (images, target), fastres=ours, keeps_dtype=True, exact=exact)

    # backward computes two products of the forward's size; bytes are those of three forward passes, roughly
    step_parts = [(3 * nbytes, 3 * flops) for nbytes, flops in parts(network, n, dtype, size)]
    return Case(
        "training",
        f"{network} step",
        f"n{n} {network} step @{size}x{size}",
        n,
        dtype,
        device,
        step_parts,
        make,
        model=network,
        clock="call",
    )
