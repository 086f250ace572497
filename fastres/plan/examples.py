"""For each pattern a few problems as they occur in a ResNet: what a family of kernels is asked about first."""

from __future__ import annotations

import torch

from fastres.activation import RELU
from fastres.plan.pattern import Pattern
from fastres.plan.problem import ConvSpec, LinearSpec, NormalizeSpec, PoolSpec, Problem, Target

_N = 8


def _conv(c: int, k: int, size: int, kernel: int = 1, stride: int = 1, **more) -> ConvSpec:
    pad = kernel // 2
    return ConvSpec(_N, c, size, size, k, (kernel, kernel), (stride, stride), (pad, pad), **more)


_STEM = _conv(3, 64, 224, 7, 2, act=RELU)
_STEM_POOL = PoolSpec(_N, 64, 112, 112, (3, 3), (2, 2), (1, 1))
_MEAN = PoolSpec(_N, 2048, 7, 7, flat=True)
_FC = LinearSpec(_N, 2048, 1000)
_REDUCE = _conv(256, 64, 56, act=RELU)
_SHIFTED = _conv(64, 64, 56, 3, act=RELU)
_EXPAND = _conv(64, 256, 56, act=RELU, residual=True)
_SHORTCUT = _conv(64, 256, 56)

# pattern → (layers, inputs, outputs)
_EXAMPLES = {
    "conv_bn_act": ((("conv", _SHIFTED),), ("conv.x",), ("conv",)),
    "max_pool": ((("pool", _STEM_POOL),), ("pool.x",), ("pool",)),
    "global_avg_pool": ((("pool", _MEAN),), ("pool.x",), ("pool",)),
    "linear": ((("linear", _FC),), ("linear.x",), ("linear",)),
    "normalize": ((("normalize", NormalizeSpec(_N, 3, 224, 224)),), ("normalize.x",), ("normalize",)),
    "stem_pool": ((("conv", _STEM), ("pool", _STEM_POOL)), ("conv.x",), ("pool",)),
    "dual": ((("shortcut", _SHORTCUT), ("expand", _EXPAND)), ("shortcut.x", "expand.x"), ("expand",)),
    "expand_reduce": (
        (("expand", _EXPAND), ("reduce", _REDUCE)),
        ("expand.x", "expand.residual"),
        ("expand", "reduce"),
    ),
    "shifted_block": (
        (("conv", _SHIFTED), ("expand", _EXPAND), ("reduce", _REDUCE)),
        ("conv.x", "expand.residual"),
        ("expand", "reduce"),
    ),
    "pool_linear": ((("pool", _MEAN), ("linear", _FC)), ("pool.x",), ("linear",)),
}


def example_problems(pattern: Pattern, target: Target) -> list[Problem]:
    """Problems of `pattern` in the types that `target` computes fast."""
    layers, inputs, outputs = _EXAMPLES[pattern.name]
    dtypes = (torch.bfloat16, torch.float32) if target.kind == "cuda" else (torch.float32,)
    return [Problem(pattern.name, layers, dtype, inputs, outputs) for dtype in dtypes]
