"""Every primitive in PyTorch's own arithmetic: runs anywhere, and says what the fast ones must compute.

x: [N, C, *spatial], contiguous or channels_last; out, residual, grad: its strides. Parameters and
    statistics: [C],
fp32 (fp64 where x is fp64). Arithmetic is in the statistics' dtype; one rounding, on the store.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import KINDS, apply


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.view(1, -1, *[1] * (x.dim() - 2))


def _sum(t: Tensor) -> Tensor:
    return t.sum([d for d in range(t.dim()) if d != 1])


def add_relu(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = max(a + b, 0); out may be a or b."""
    torch.add(a, b, out=out)
    out.relu_()


def bn_stats(x: Tensor, mean: Tensor, var: Tensor) -> None:
    """Mean and biased variance of every channel."""
    dims = [d for d in range(x.dim()) if d != 1]
    v, m = torch.var_mean(x.to(mean.dtype), dims, correction=0)
    mean.copy_(m)
    var.copy_(v)


def bn_finalize(
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    count: int | Tensor,
    invstd: Tensor,
    scale: Tensor,
    shift: Tensor,
) -> None:
    """What follows the statistics of `count` values a channel, for all channels at once:

    invstd = 1 / sqrt(var + eps); scale = weight * invstd; shift = bias - mean * scale;
    running = (1 - momentum) * running + momentum * (mean | var * count / (count - 1)).
    """
    # As few calls as there are: the vectors are short, the calls are what costs.
    torch.add(var, eps, out=invstd).rsqrt_()
    if weight is None:
        scale.copy_(invstd)
    else:
        torch.mul(invstd, weight, out=scale)
    if bias is None:
        torch.mul(mean, scale, out=shift).neg_()
    else:
        torch.addcmul(bias, mean, scale, value=-1, out=shift)
    if running_mean is not None:
        _lerp(running_mean, mean, momentum)
        _lerp(running_var, var * (count / (count - 1)), momentum)


def _lerp(running: Tensor, value: Tensor, momentum: float) -> None:
    if running.dtype == value.dtype:
        running.lerp_(value, momentum)
    else:
        # Half-precision buffers are rounded once, after the sum.
        running.copy_(running.to(value.dtype).lerp_(value, momentum))


def bn_act(
    x: Tensor, residual: Tensor | None, scale: Tensor, shift: Tensor, act: int, act_param: float, out: Tensor
) -> None:
    """out = act(x * scale[c] + shift[c] + residual); out may be x."""
    z = torch.addcmul(_per_channel(shift, x), x.to(scale.dtype), _per_channel(scale, x))
    if residual is not None:
        z += residual
    out.copy_(apply(z, KINDS[act], act_param))


def _dz(
    grad: Tensor,
    x: Tensor,
    residual: Tensor | None,
    out: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    act: int,
    act_param: float,
) -> Tensor:
    """grad * act'(z): ReLU's mask is in its output, for the others z is computed again."""
    grad = grad.to(mean.dtype)
    kind = KINDS[act]
    if kind == "identity":
        return grad
    if kind == "relu" and out is not None:
        return grad.masked_fill(out <= 0, 0)
    scale = invstd if weight is None else invstd * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    z = torch.addcmul(_per_channel(shift, x), x.to(mean.dtype), _per_channel(scale, x))
    if residual is not None:
        z += residual
    # Autograd is off below an op, so the derivatives are named.
    aten = torch.ops.aten
    match kind:
        case "relu":
            return aten.threshold_backward(grad, z, 0)
        case "relu6":
            return aten.hardtanh_backward(grad, z, 0, 6)
        case "silu":
            return aten.silu_backward(grad, z)
        case "gelu":
            return aten.gelu_backward(grad, z)
        case "gelu_tanh":
            return aten.gelu_backward(grad, z, approximate="tanh")
        case "leaky_relu":
            return aten.leaky_relu_backward(grad, z, act_param, False)
        case "hardswish":
            return aten.hardswish_backward(grad, z)
    raise ValueError(f"act: no derivative for {kind!r}")


def bn_act_backward_reduce(
    grad: Tensor,
    x: Tensor,
    residual: Tensor | None,
    out: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    act: int,
    act_param: float,
    sum_dy: Tensor,
    sum_dy_xhat: Tensor,
    grad_residual: Tensor | None = None,
) -> None:
    """With dz = grad * act'(z): sum_dy = sum dz; sum_dy_xhat = sum dz * (x - mean) * invstd; grad_residual = dz."""
    dz = _dz(grad, x, residual, out, mean, invstd, weight, bias, act, act_param)
    if grad_residual is not None:
        grad_residual.copy_(dz)
    sum_dy.copy_(_sum(dz))
    sum_dy_xhat.copy_(_sum(dz * (x.to(mean.dtype) - _per_channel(mean, x))) * invstd)


def bn_act_backward(
    grad: Tensor,
    x: Tensor,
    residual: Tensor | None,
    out: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    act: int,
    act_param: float,
    mean_dy: Tensor | None,
    mean_dy_xhat: Tensor | None,
    grad_x: Tensor,
    grad_residual: Tensor | None,
) -> None:
    """grad_x = weight * invstd * (dz - mean_dy - xhat * mean_dy_xhat); grad_residual = dz.

    mean_dy and mean_dy_xhat are None where the statistics are constants (eval mode): then dx = weight *
    invstd * dz.
    """
    dz = _dz(grad, x, residual, out, mean, invstd, weight, bias, act, act_param)
    if grad_residual is not None:
        grad_residual.copy_(dz)
    dx = dz
    if mean_dy is not None:
        xhat = (x.to(mean.dtype) - _per_channel(mean, x)) * _per_channel(invstd, x)
        dx = dz - _per_channel(mean_dy, x) - xhat * _per_channel(mean_dy_xhat, x)
    grad_x.copy_(dx * _per_channel(invstd if weight is None else invstd * weight, x))
