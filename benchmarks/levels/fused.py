"""Fused patterns: what one kernel can compute beyond a layer, at the places of ResNet-50."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from benchmarks import modules
from benchmarks.case import Case, Subject, activations, to_device
from benchmarks.scope import Scope
from fastres.activation import IDENTITY, RELU
from fastres.bench.photographs import photographs
from fastres.plan.problem import ConvSpec, LinearSpec, PoolSpec, Problem, Spec


def cases(scope: Scope) -> list[Case]:
    batches = scope.batches or scope.pick(
        smoke=(1,), quick=(8,), cuda_quick=(256,), full=(1, 8), cuda_full=(1, 32, 256)
    )
    # (stage, channels inside a block, height and width)
    stages = ((1, 64, 56), (2, 128, 28), (3, 256, 14), (4, 512, 7))
    stages = scope.pick(smoke=((1, 8, 8),), quick=stages[:3:2], full=stages)
    found = []
    for dtype in scope.part_dtypes:
        for n in batches:
            for stage, width, size in stages:
                for pattern in (dual, expand_reduce, shifted_block):
                    found.append(pattern(stage, n, width, size, dtype, scope.device))
            found.append(stem_pool(n, scope.image, dtype, scope.device))
            found.append(pool_linear(n, scope.image // 32, dtype, scope.device))
    return found


def _conv(n: int, c: int, size: int, k: int, kernel: int = 1, **more) -> ConvSpec:
    act = more.pop("act", RELU)
    return ConvSpec(
        n, c, size, size, k, (kernel, kernel), padding=(kernel // 2, kernel // 2), act=act, **more
    )


def dual(stage: int, n: int, width: int, size: int, dtype: torch.dtype, device: torch.device) -> Case:
    """The projection shortcut and the expand of a stage's first block."""
    step = 1 if stage == 1 else 2
    c = width if stage == 1 else 2 * width
    shortcut = _conv(n, c, size * step, 4 * width, act=IDENTITY, stride=(step, step))
    expand = _conv(n, width, size, 4 * width, residual=True)
    return _case(
        f"dual, stage {stage}",
        Problem(
            "dual",
            (("shortcut", shortcut), ("expand", expand)),
            dtype,
            ("shortcut.x", "expand.x"),
            ("expand",),
        ),
        lambda: modules.Dual(shortcut, expand),
        (shortcut.x_shape, expand.x_shape),
        device,
    )


def expand_reduce(
    stage: int, n: int, width: int, size: int, dtype: torch.dtype, device: torch.device
) -> Case:
    """A block's expand with its residual, and the next block's reduce."""
    expand, reduce = _conv(n, width, size, 4 * width, residual=True), _conv(n, 4 * width, size, width)
    return _case(
        f"expand_reduce, stage {stage}",
        Problem(
            "expand_reduce",
            (("expand", expand), ("reduce", reduce)),
            dtype,
            ("expand.x", "expand.residual"),
            ("expand", "reduce"),
        ),
        lambda: modules.ExpandReduce(expand, reduce),
        (expand.x_shape, expand.y_shape),
        device,
    )


def shifted_block(
    stage: int, n: int, width: int, size: int, dtype: torch.dtype, device: torch.device
) -> Case:
    """A block's 3x3 and expand with its residual, and the next block's reduce."""
    conv = _conv(n, width, size, width, 3)
    expand, reduce = _conv(n, width, size, 4 * width, residual=True), _conv(n, 4 * width, size, width)
    return _case(
        f"shifted_block, stage {stage}",
        Problem(
            "shifted_block",
            (("conv", conv), ("expand", expand), ("reduce", reduce)),
            dtype,
            ("conv.x", "expand.residual"),
            ("expand", "reduce"),
        ),
        lambda: modules.ShiftedBlock(conv, expand, reduce),
        (conv.x_shape, expand.y_shape),
        device,
    )


def stem_pool(n: int, image: int, dtype: torch.dtype, device: torch.device) -> Case:
    """The 7x7/2 convolution and the 3x3/2 max pool."""
    conv = ConvSpec(n, 3, image, image, 64, (7, 7), (2, 2), (3, 3), act=RELU)
    pool = PoolSpec(n, 64, conv.p, conv.q, (3, 3), (2, 2), (1, 1))
    return _case(
        "stem_pool",
        Problem("stem_pool", (("conv", conv), ("pool", pool)), dtype, ("conv.x",), ("pool",)),
        lambda: modules.StemPool(conv),
        (conv.x_shape,),
        device,
        images=True,
    )


def pool_linear(n: int, size: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Global average pool and the classifier."""
    pool, linear = PoolSpec(n, 2048, size, size, flat=True), LinearSpec(n, 2048, 1000)
    return _case(
        "pool_linear",
        Problem("pool_linear", (("pool", pool), ("linear", linear)), dtype, ("pool.x",), ("linear",)),
        lambda: modules.PoolLinear(2048, 1000),
        (pool.x_shape,),
        device,
    )


def _case(
    name: str,
    problem: Problem,
    module: Callable[[], nn.Module],
    shapes: Sequence[tuple[int, ...]],
    device: torch.device,
    *,
    images: bool = False,
) -> Case:
    def make() -> Subject:
        torch.manual_seed(0)
        if images:
            x = photographs(problem.n, size=shapes[0][2]).to(device, problem.dtype)
            inputs = (x.contiguous(memory_format=torch.channels_last),)
        else:
            inputs = tuple(
                activations(shape, problem.dtype, device, seed) for seed, shape in enumerate(shapes)
            )
        return Subject(modules.calibrated(to_device(module(), device), *inputs), inputs)

    first: Spec = problem.first
    return Case(
        "fused",
        name,
        problem.key,
        first.n,
        problem.dtype,
        device,
        [(problem.bytes, problem.flops)],
        make,
        model="resnet50",
        kernels=problem,
    )
