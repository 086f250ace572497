"""A case: one problem in one setting, which every provider solves, is checked on, and is timed at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastres.bench.verify import oracle
from fastres.plan.problem import Problem

# What a provider builds: called with the subject's inputs, returns the outputs.
Call = Callable[..., object]


@dataclass
class Subject:
    """A built case.

    Attributes:
        module: eval mode, parameters in fp32 on the device; providers copy it, never change it.
        inputs: in the case's dtype and channels_last, on the device.
        fastres: how to build fastres's own call where it is not `accelerate(module)`: ops, training.
        keeps_dtype: the module's parameters stay fp32 whatever the case's dtype: training.
        exact: computes the outputs in fp64 where eval mode and chunks of images would not do.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    fastres: Callable[[], Call] | None = None
    keeps_dtype: bool = False
    exact: Callable[[], list[Tensor]] | None = None

    def reference(self) -> list[Tensor]:
        """The outputs in fp64."""
        return oracle(self.module, *self.inputs) if self.exact is None else self.exact()


@dataclass
class Entry:
    """One provider in one case: how to build its call, or why there is none.

    `inputs` turns the subject's inputs into its own form; `capturable`: its call may be captured into a CUDA
    graph by whoever times it; `compiles`: its first call may take minutes.
    """

    provider: str
    build: Callable[[Subject], Call] | None = None
    inputs: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = lambda given: given
    skip: str = ""
    capturable: bool = True
    compiles: bool = False


@dataclass
class Case:
    """One problem in one setting.

    Attributes:
        level: "op", "layer", "fused", "block", "model", "training" or "host".
        name: for people and for matching rows of two files, e.g. "resnet50 layer1.0.conv2".
        problem: shapes and attributes, as fastres's tuning tables write them.
        parts: (bytes, flops) of the kernels that it takes at least; its floor is the sum of theirs.
        model: the network that it is a part of, and how often it occurs in it.
        clock: "call" times whole calls, "kernel" on a GPU kernels alone (on a CPU as "call"), "host" the time
            until a call returns.
        make: builds the subject; only then is memory taken.
        kernels: the problem that one kernel of any backend may solve, whose compilation is worth doing ahead.
    """

    level: str
    name: str
    problem: str
    batch: int
    dtype: torch.dtype
    device: torch.device
    parts: Sequence[tuple[int, int]]
    make: Callable[[], Subject]
    model: str = ""
    count: int = 1
    clock: str = "kernel"
    kernels: Problem | None = None

    @property
    def bytes(self) -> int:
        return sum(nbytes for nbytes, _ in self.parts)

    @property
    def flops(self) -> int:
        return sum(flops for _, flops in self.parts)


def to_device(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` in eval mode on `device`, without gradients."""
    return module.to(device).eval().requires_grad_(False)


def activations(shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """What a ReLU leaves: half zeros, channels_last."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(tuple(shape), generator=generator, device=device).relu_().to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
