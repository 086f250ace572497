"""conv_stats: a convolution that also gives the batch statistics of its output.

A kernel that still holds the output in its accumulators emits the per-channel sums with it,
deterministically in two stages, which saves the training forward one read of every activation. The results
feed `bn_act(statistics=...)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import primitives
from .conv_bn_act import output_shape, pair
from .library import autocast_to, register
from .tensors import stat_dtype


def conv_stats(
    x: Tensor,
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """conv2d(x, weight), and the mean and biased variance of each of its channels.

    Args:
        x: [N, C, H, W], fp16, bf16, fp32 or fp64; best in channels_last (other layouts are converted).
        weight: [K, C / groups, R, S], dtype of x.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`; padding in pixels.

    Returns:
        y [N, K, P, Q] in channels_last memory, dtype of x; mean and variance [K] in fp32 (fp64 for fp64).
        Only y is differentiable: `bn_act` counts the statistics into its own gradient. They are those of y, or,
        where a kernel emits them, of y before it was rounded to its dtype.

    Raises:
        TypeError, ValueError: an argument does not fit, or y would have no pixels.
    """
    return _op(
        x, weight, pair("stride", stride), pair("padding", padding), pair("dilation", dilation), groups
    )


def kernel_for(x: Tensor, weight: Tensor, *geometry) -> Callable | None:
    """The primitive that computes this convolution with its statistics and is believed to be no slower than two
    passes; None: the convolution, then `bn_stats`. `geometry`: stride, padding, dilation, groups."""
    if not x.numel():
        return None
    kernels, takes = (primitives.every(name, x) for name in ("conv_stats", "conv_stats_takes"))
    return next((k for k, t in zip(kernels, takes, strict=True) if t(x, weight, *geometry)), None)


def _impl(x, weight, stride, padding, dilation, groups: int):
    shape = output_shape(x, weight, stride, padding, dilation, groups)
    x = x.contiguous(memory_format=torch.channels_last)
    mean, var = (x.new_empty(shape[1], dtype=stat_dtype(x)) for _ in range(2))
    kernel = kernel_for(x, weight, stride, padding, dilation, groups)
    if kernel is not None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        kernel(x, weight, stride, padding, dilation, groups, out, mean, var)
        return out, mean, var
    out = torch.conv2d(x, weight, None, stride, padding, dilation, groups)
    out = out.contiguous(memory_format=torch.channels_last)
    if shape[0]:
        primitives.get("bn_stats", out)(out, mean, var)
        return out, mean, var
    return out, mean.zero_(), var.zero_()


def _fake(x, weight, stride, padding, dilation, groups):
    shape = output_shape(x, weight, stride, padding, dilation, groups)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return out, *(x.new_empty(shape[1], dtype=stat_dtype(x)) for _ in range(2))


class _ConvStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, below, x, weight, *geometry):
        out, mean, var = below(x, weight, *geometry)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return out, mean, var

    @staticmethod
    def backward(ctx, grad, _mean, _var):
        if grad is None:
            return (None,) * 7
        stride, padding, dilation, groups = ctx.geometry
        mask = [*ctx.needs_input_grad[1:3], False]
        grad = grad.contiguous(memory_format=torch.channels_last)
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            grad, *ctx.saved_tensors, None, stride, padding, dilation, False, [0, 0], groups, mask
        )
        return None, dx, dweight, None, None, None, None


def _autocast(dtype: torch.dtype, x, weight, *geometry):
    return autocast_to(dtype, x), autocast_to(dtype, weight), *geometry


_op = register(
    "conv_stats(Tensor x, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, int groups) "
    "-> (Tensor, Tensor, Tensor)",
    _impl,
    _fake,
    autograd=_ConvStats.apply,
    autocast=_autocast,
)
