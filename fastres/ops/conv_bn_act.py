"""conv_bn_act: convolution, normalisation by given statistics, residual add and activation.

    out = act((conv(x, weight) + conv_bias - mean) * scale + bn_bias + residual)
    scale = bn_weight / sqrt(var + eps)

The convolution is PyTorch's; everything after it is one pass in place. With dz = grad * act'(z), backward is
one `convolution_backward` of dz with the weights scaled, which gives dx and G = d(conv)(dz)/dweight; then

    dweight = scale * G,    dbn_bias = sum(dz),    dscale = <G, weight> + (conv_bias - mean) * sum(dz)

because the convolution is linear in its weights: <G, weight> = sum(dz * conv(x, weight)). So neither the
convolution's output nor the normalised one is kept: backward reads x and out, which the neighbours keep
anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..activation import RELU, Activation
from . import primitives
from .bn_act import frozen
from .bn_act_passes import inverse_deviation, scale_shift
from .library import autocast_to, register
from .tensors import IDENTITY as _IDENTITY
from .tensors import RELU as _RELU
from .tensors import (
    activation,
    check_act,
    check_channels,
    check_device,
    check_float,
    check_rank,
    check_same,
    like,
    stat_dtype,
)


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    conv_bias: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    eps: float = 1e-5,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    residual: Tensor | None = None,
    act: Activation | str = RELU,
) -> Tensor:
    """act(batch_norm(conv2d(x)) + residual) with fixed statistics: inference, and fine-tuning with frozen BN.

    Args:
        x: [N, C, H, W], fp16, bf16, fp32 or fp64; best in channels_last (other layouts are converted).
        weight: [K, C / groups, R, S], dtype of x.
        conv_bias, bn_weight, bn_bias: [K] or None.
        mean, var: [K], constants; both None for a convolution without normalisation.
        eps: added to var.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`; padding in pixels.
        residual: [N, K, P, Q], dtype of x, added before the activation.
        act: an `Activation` or its name.

    Returns:
        [N, K, P, Q] in channels_last memory, dtype of x. Differentiable in x, weight, conv_bias, bn_weight,
        bn_bias and residual. Under autocast x, weight and residual are cast, the [K] vectors are not.

    Raises:
        TypeError, ValueError: an argument does not fit, or the output would have no pixels.
    """
    act = activation(act)
    return _op(
        x,
        weight,
        conv_bias,
        bn_weight,
        bn_bias,
        mean,
        var,
        eps,
        pair("stride", stride),
        pair("padding", padding),
        pair("dilation", dilation),
        groups,
        residual,
        act.code,
        act.param,
    )


def pair(name: str, value: int | Sequence[int]) -> list[int]:
    both = [value, value] if isinstance(value, int) else list(value)
    if len(both) != 2 or not all(isinstance(v, int) for v in both):
        raise ValueError(f"{name}: expected an int or two, got {value!r}")
    return both


def output_shape(x, weight, stride, padding, dilation, groups: int) -> tuple[int, int, int, int]:
    """The shape of conv2d's output; checks its arguments."""
    check_float("x", x)
    check_rank("x", x, 4, 4)
    check_float("weight", weight)
    check_rank("weight", weight, 4, 4)
    check_device("weight", weight, x)
    if weight.dtype != x.dtype:
        raise TypeError(f"weight: expected the dtype of x, {x.dtype}, got {weight.dtype}")
    out_channels, in_channels = weight.shape[0], weight.shape[1] * groups
    if groups < 1 or out_channels % groups:
        raise ValueError(f"groups: expected a divisor of the {out_channels} output channels, got {groups}")
    if x.shape[1] != in_channels:
        raise ValueError(
            f"x: expected {in_channels} channels for weight {tuple(weight.shape)}, got {x.shape[1]}"
        )
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if min(values) < least:
            raise ValueError(f"{name}: expected at least {least}, got {tuple(values)}")
    spatial = tuple(
        (size + 2 * p - d * (kernel - 1) - 1) // s + 1
        for size, kernel, s, p, d in zip(
            x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    )
    if min(spatial) < 1:
        raise ValueError(
            f"x: {tuple(x.shape[2:])} pixels are too few for a {tuple(weight.shape[2:])} kernel with padding "
            f"{tuple(padding)} and dilation {tuple(dilation)}: the output would be {spatial}"
        )
    return x.shape[0], out_channels, *spatial


def _check(
    x, weight, conv_bias, bn_weight, bn_bias, mean, var, stride, padding, dilation, groups, residual, act
) -> tuple[int, int, int, int]:
    """Checks every argument; the shape of the output."""
    shape = output_shape(x, weight, stride, padding, dilation, groups)
    vectors = {"conv_bias": conv_bias, "bn_weight": bn_weight, "bn_bias": bn_bias, "mean": mean, "var": var}
    for name, t in vectors.items():
        check_channels(name, t, shape[1], x)
    if (mean is None) != (var is None):
        raise ValueError("mean, var: give both or neither, got one")
    if mean is None and (bn_weight is not None or bn_bias is not None):
        raise ValueError("bn_weight, bn_bias: expected None without mean and var")
    check_same("residual", residual, x, shape=shape)
    check_act(act)
    return shape


def _impl(
    x,
    weight,
    conv_bias,
    bn_weight,
    bn_bias,
    mean,
    var,
    eps: float,
    stride,
    padding,
    dilation,
    groups: int,
    residual,
    act: int,
    act_param: float,
):
    _check(
        x, weight, conv_bias, bn_weight, bn_bias, mean, var, stride, padding, dilation, groups, residual, act
    )
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.conv2d(x, weight, None, stride, padding, dilation, groups)
    out = out.contiguous(memory_format=torch.channels_last)
    if mean is not None and (whole := primitives.find("bn_act_forward", out)) is not None:
        # the convolution's bias moves the mean
        moved = mean if conv_bias is None else mean - conv_bias
        vectors = (bn_weight, bn_bias, moved, var, None, None)
        if whole(out, like(residual, out), *vectors, False, 0.0, eps, act, act_param, out):
            return out
    scale, shift = _epilogue(out, conv_bias, bn_weight, bn_bias, mean, var, eps)
    if out.numel():
        primitives.get("bn_act", out)(out, like(residual, out), scale, shift, act, act_param, out)
    return out


def _epilogue(out, conv_bias, bn_weight, bn_bias, mean, var, eps: float) -> tuple[Tensor, Tensor]:
    """The output is act(conv * scale + shift + residual)."""
    dtype = stat_dtype(out)
    if mean is None:
        scale = torch.ones(out.shape[1], dtype=dtype, device=out.device)
        return scale, torch.zeros_like(scale) if conv_bias is None else conv_bias.to(dtype)
    scale, shift = scale_shift(bn_weight, bn_bias, mean, inverse_deviation(var, eps, dtype))
    return scale, shift if conv_bias is None else shift + scale * conv_bias.to(dtype)


def _fake(
    x,
    weight,
    conv_bias,
    bn_weight,
    bn_bias,
    mean,
    var,
    eps,
    stride,
    padding,
    dilation,
    groups,
    residual,
    act,
    act_param,
):
    shape = _check(
        x, weight, conv_bias, bn_weight, bn_bias, mean, var, stride, padding, dilation, groups, residual, act
    )
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


class _ConvBNAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, below, *args):
        x, weight, conv_bias, bn_weight, _, mean, var, eps, *geometry, _, act, _ = args
        out = below(*args)
        ctx.save_for_backward(x, weight, conv_bias, bn_weight, mean, var, out if act == _RELU else None)
        ctx.eps, ctx.geometry = eps, geometry
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, conv_bias, bn_weight, mean, var, out = ctx.saved_tensors
        _, for_x, for_weight, for_conv_bias, for_bn_weight, for_bn_bias, *_ = ctx.needs_input_grad
        dtype = stat_dtype(x)
        dz = grad if out is None else torch.ops.aten.threshold_backward(grad, out, 0)
        dz = dz.contiguous(memory_format=torch.channels_last)
        scale, scaled = None, weight
        if mean is not None:
            invstd = torch.rsqrt(var.to(dtype) + ctx.eps)
            scale = invstd if bn_weight is None else invstd * bn_weight.to(dtype)
            scaled = (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype)
        stride, padding, dilation, groups = ctx.geometry
        mask = [for_x, for_weight or for_bn_weight, False]
        dx = g = None
        if any(mask):
            dx, g, _ = torch.ops.aten.convolution_backward(
                dz, x, scaled, None, stride, padding, dilation, False, [0, 0], groups, mask
            )
        sum_dz = dconv_bias = dbn_weight = None
        if for_conv_bias or for_bn_weight or for_bn_bias:
            sum_dz = dz.sum((0, 2, 3), dtype=dtype)
        if for_conv_bias:
            dconv_bias = sum_dz if scale is None else sum_dz * scale
        if for_bn_weight:
            offset = -mean.to(dtype) if conv_bias is None else conv_bias.to(dtype) - mean.to(dtype)
            dbn_weight = ((g.to(dtype) * weight).sum((1, 2, 3)) + offset * sum_dz) * invstd
        if for_weight and scale is not None:
            g = (g * scale.view(-1, 1, 1, 1)).to(weight.dtype)
        return (
            None,
            dx if for_x else None,
            g if for_weight else None,
            dconv_bias,
            dbn_weight,
            sum_dz if for_bn_bias else None,
            *[None] * 7,
            dz if ctx.needs_input_grad[13] else None,
            None,
            None,
        )


def _autograd(below, *args):
    x, weight, conv_bias, bn_weight, bn_bias, mean, var, eps, *geometry, residual, act, act_param = args
    if mean is not None and (mean.requires_grad or var.requires_grad):
        raise ValueError("mean, var: statistics are constants, they cannot require a gradient")
    # Without the convolution's output, dscale = <G, weight> inherits the rounding of G: too coarse in 16
    # bits.
    sixteen_bit = x.element_size() == 2 and bn_weight is not None and bn_weight.requires_grad
    if act in (_RELU, _IDENTITY) and not sixteen_bit:
        return _ConvBNAct.apply(below, *args)
    y = _op(x, weight, conv_bias, None, None, None, None, eps, *geometry, None, _IDENTITY, 0.0)
    if mean is None:
        mean = torch.zeros(y.shape[1], dtype=stat_dtype(y), device=y.device)
        var, eps = torch.ones_like(mean), 0.0
    return frozen(y, residual, bn_weight, bn_bias, mean, var, eps, act, act_param)


def _autocast(dtype: torch.dtype, x, weight, *args):
    *vectors_and_geometry, residual, act, act_param = args
    x, weight, residual = (autocast_to(dtype, t) for t in (x, weight, residual))
    return x, weight, *vectors_and_geometry, residual, act, act_param


_op = register(
    "conv_bn_act(Tensor x, Tensor weight, Tensor? conv_bias, Tensor? bn_weight, Tensor? bn_bias, "
    "Tensor? mean, Tensor? var, float eps, int[2] stride, int[2] padding, int[2] dilation, int groups, "
    "Tensor? residual, int act, float act_param) -> Tensor",
    _impl,
    _fake,
    autograd=_autograd,
    autocast=_autocast,
)
