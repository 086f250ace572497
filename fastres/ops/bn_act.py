"""bn_act: batch normalisation, residual add and activation in one pass over memory, forward and backward.

    z = (x - mean[c]) * weight[c] / sqrt(var[c] + eps) + bias[c] + residual,    out = act(z)

mean and var are the batch's own (Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 1) or given ones
(frozen). With dz = grad * act'(z) and xhat = (x - mean) / sqrt(var + eps), the backward over the batch's own
statistics is

    dx = weight / sqrt(var + eps) * (dz - mean(dz) - xhat * mean(dz * xhat)),    dresidual = dz,
    dweight = sum(dz * xhat),    dbias = sum(dz)

and over given ones dx = weight / sqrt(var + eps) * dz.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import _C, Tensor

from ..activation import KINDS, RELU, Activation, apply
from . import primitives, torch_primitives
from .library import counting_versions, register, unwatched, without_autocast
from .statistics import mean_over, merge_over, statistics_of
from .tensors import IDENTITY as _IDENTITY
from .tensors import RELU as _RELU
from .tensors import (
    activation,
    channel_vector,
    check_act,
    check_channels,
    check_float,
    check_rank,
    check_same,
    dense,
    like,
    stat_dtype,
)


def bn_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    act: Activation | str = RELU,
    statistics: tuple[Tensor, Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """act(batch_norm(x) + residual); the arguments of `torch.nn.functional.batch_norm`, and four more.

    Args:
        x: [N, C, *spatial], any number of spatial dimensions; fp16, bf16, fp32 or fp64. NCHW or channels_last
            memory is kept, anything else is copied. Empty batches are taken, and change no running
            statistics.
        running_mean, running_var: [C]. With `training` they are updated in place (the variance unbiased) and
            may be None; without, they are what x is normalised with.
        weight, bias: [C], or None for 1 and 0. Any float dtype; arithmetic is fp32 (fp64 for fp64 inputs).
        training: normalise with the batch's own mean and biased variance.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.
        residual: added before the activation; shape and dtype of x.
        act: an `Activation` or its name.
        statistics: with `training`, mean and biased variance of x that its producer has computed already (see
            `conv_stats`); gradients are those of computing them here.
        group: with `training`, normalise with the statistics of the whole group's batch. Gradients of weight
            and bias are this process's share, as in `torch.nn.SyncBatchNorm`. Every process must take part.

    Returns:
        A new tensor, shape, dtype and memory format of x. Differentiable in x, residual, weight and bias;
        also twice, through PyTorch's arithmetic.

    Raises:
        TypeError, ValueError: an argument does not fit, or `training` with one value a channel.
    """
    act = activation(act)
    if training:
        mean, var = statistics or (None, None)
        name = group.group_name if group is not None and group.size() > 1 else ""
        tensors = (x, residual, weight, bias, running_mean, running_var, mean, var)
        arguments = (*tensors, momentum, eps, act.code, act.param, name)
        if not unwatched(*tensors):
            return _train(*arguments)[0]
        if not torch.is_autocast_enabled(x.device.type):
            return _train_directly(*arguments)
        with without_autocast():
            return _train_directly(*_autocast(x.dtype, *arguments))
    if statistics is not None or group is not None:
        raise ValueError(
            "statistics, group: they belong to training, without it running_mean and running_var do"
        )
    if running_mean is None or running_var is None:
        raise ValueError("running_mean, running_var: needed without training, got None")
    return frozen(x, residual, weight, bias, running_mean, running_var, eps, act.code, act.param)


def _check(x, residual, weight, bias, mean, var, act: int) -> None:
    check_float("x", x)
    check_rank("x", x, 2)
    check_same("residual", residual, x)
    channels = x.shape[1]
    for name, t in (("weight", weight), ("bias", bias), ("running_mean", mean), ("running_var", var)):
        check_channels(name, t, channels, x)
    check_act(act)


def _check_train(
    x, residual, weight, bias, running_mean, running_var, mean, var, act: int, group: str
) -> None:
    _check(x, residual, weight, bias, running_mean, running_var, act)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean, running_var: give both or neither, got one")
    for t in (mean, var):
        check_channels("statistics", t, x.shape[1], x)
    if x.numel() == x.shape[1] and not group:
        raise ValueError(
            f"x: expected more than 1 value per channel when training, got input size {tuple(x.shape)}"
        )


# --- the batch's own statistics


def _train_impl(
    x,
    residual,
    weight,
    bias,
    running_mean,
    running_var,
    mean,
    var,
    momentum: float,
    eps: float,
    act: int,
    act_param: float,
    group: str,
):
    _check_train(x, residual, weight, bias, running_mean, running_var, mean, var, act, group)
    x = dense(x)
    out = torch.empty_like(x)
    saved_mean, invstd = (x.new_empty(x.shape[1], dtype=stat_dtype(x)) for _ in range(2))
    count = x.numel() // x.shape[1] if x.shape[1] else 0
    if count == 0 and not group:
        return out, saved_mean.zero_(), invstd.zero_()
    mean, var = statistics_of(x, count, mean, var, saved_mean)
    finalize = primitives.get("bn_finalize", x)
    if group:
        mean, var, count = merge_over(group, mean, var, count)
        finalize = torch_primitives.bn_finalize
    if mean is not saved_mean:
        saved_mean.copy_(mean)
    weight, bias = channel_vector(weight, mean.dtype), channel_vector(bias, mean.dtype)
    scale, shift = torch.empty_like(mean), torch.empty_like(mean)
    finalize(mean, var, weight, bias, running_mean, running_var, momentum, eps, count, invstd, scale, shift)
    if x.numel():
        primitives.get("bn_act", x)(x, like(residual, x), scale, shift, act, act_param, out)
    return out, saved_mean, invstd


def _train_fake(
    x, residual, weight, bias, running_mean, running_var, mean, var, momentum, eps, act, act_param, group
):
    _check_train(x, residual, weight, bias, running_mean, running_var, mean, var, act, group)
    stat = x.new_empty(x.shape[1], dtype=stat_dtype(x))
    return torch.empty_like(dense(x)), stat, torch.empty_like(stat)


def _train_directly(*args) -> Tensor:
    """The op without the dispatcher, see `unwatched`."""
    if torch.is_grad_enabled() and _C._any_requires_grad(*args[:8]):
        return _Train.apply(_train_now, *args)[0]
    return _train_now(*args)[0]


class _Train(torch.autograd.Function):
    @staticmethod
    def forward(ctx, below, *args):
        x, residual, weight, bias, *_, eps, act, act_param, group = args
        out, mean, invstd = below(*args)
        ctx.mark_non_differentiable(mean, invstd)
        # else every backward would fill two vectors with zeros for them
        ctx.set_materialize_grads(False)
        ctx.batch_stats, ctx.group = True, group
        _save(ctx, x, residual, weight, bias, mean, invstd, out, eps, act, act_param)
        return out, mean, invstd

    @staticmethod
    def backward(ctx, grad, _mean, _invstd):
        if grad is None:
            return (None,) * 14
        return None, *_gradients(ctx, grad, ctx.needs_input_grad[1:5]), *[None] * 9


# --- given statistics


def scale_shift(weight, bias, mean, var, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x * scale + shift = (x - mean) * weight / sqrt(var + eps) + bias, in `dtype`."""
    scale = torch.rsqrt(var.to(dtype) + eps)
    if weight is not None:
        scale = scale * weight.to(dtype)
    shift = -mean.to(dtype) * scale
    if bias is not None:
        shift = shift + bias.to(dtype)
    return scale, shift


def _frozen_impl(x, residual, weight, bias, mean, var, eps: float, act: int, act_param: float):
    _check(x, residual, weight, bias, mean, var, act)
    x = dense(x)
    out = torch.empty_like(x)
    if x.numel():
        scale, shift = scale_shift(weight, bias, mean, var, eps, stat_dtype(x))
        primitives.get("bn_act", x)(x, like(residual, x), scale, shift, act, act_param, out)
    return out


def _frozen_fake(x, residual, weight, bias, mean, var, eps, act, act_param):
    _check(x, residual, weight, bias, mean, var, act)
    return torch.empty_like(dense(x))


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, below, x, residual, weight, bias, mean, var, eps, act, act_param):
        if mean.requires_grad or var.requires_grad:
            raise ValueError(
                "running_mean, running_var: statistics are constants, they cannot require a gradient"
            )
        out = below(x, residual, weight, bias, mean, var, eps, act, act_param)
        ctx.batch_stats, ctx.group = False, ""
        _save(ctx, x, residual, weight, bias, mean, var, out, eps, act, act_param)
        return out

    @staticmethod
    def backward(ctx, grad):
        return None, *_gradients(ctx, grad, ctx.needs_input_grad[1:5]), None, None, None, None, None


# --- backward of both


def _save(ctx, x, residual, weight, bias, mean, spread, out, eps, act, act_param) -> None:
    """Keep what backward reads and no more.

    `spread` is invstd of the batch, or the given variance. z is computed again where it costs no read beyond
    that of x, so of ReLU without a residual too. With one, ReLU's mask is in the output, which the next layer
    keeps anyway. A frozen normalisation with a constant weight is linear in dz: then x is not kept at all.
    """
    smooth = act not in (_RELU, _IDENTITY)
    needs_x = ctx.batch_stats or smooth or ctx.needs_input_grad[3]
    recomputes = smooth or (act == _RELU and residual is None and needs_x)
    ctx.save_for_backward(
        x if needs_x else None,
        residual if recomputes else None,
        weight,
        bias if recomputes else None,
        mean,
        spread,
        out if act == _RELU and not recomputes else None,
    )
    ctx.eps, ctx.act, ctx.act_param = eps, act, act_param


def _gradients(ctx, grad: Tensor, wanted: tuple[bool, bool, bool, bool]) -> tuple[Tensor | None, ...]:
    """Gradients of x, residual, weight, bias; None where not wanted."""
    x, residual, weight, bias, mean, spread, out = ctx.saved_tensors
    if torch.is_grad_enabled():
        return _differentiable_gradients(ctx, grad, wanted)
    invstd = spread if ctx.batch_stats else torch.rsqrt(spread.to(stat_dtype(grad)) + ctx.eps)
    mean = mean if ctx.batch_stats else mean.to(invstd.dtype)
    through = ctx.act == _IDENTITY and wanted[1]
    mask = [wanted[0], wanted[1] and not through, wanted[2], wanted[3]]
    constants = (ctx.batch_stats, ctx.act, ctx.act_param, ctx.group, mask)
    tensors = (grad, x, residual, weight, bias, mean, invstd, out)
    if unwatched(*tensors) and not torch.is_autocast_enabled(grad.device.type):
        grads = _backward_impl(*tensors, *constants)
    else:
        with _C._AutoDispatchBelowAutograd():
            grads = _backward(*tensors, *constants)
    grads = [g if m else None for g, m in zip(grads, mask, strict=True)]
    if through:
        grads[1] = grad
    # Half-precision weights get fp32 gradients here: autograd casts them to the dtype of the input.
    return tuple(grads)


def _differentiable_gradients(ctx, grad: Tensor, wanted) -> tuple[Tensor | None, ...]:
    """The same in PyTorch's differentiable arithmetic, for `create_graph=True`."""
    if ctx.group:
        raise RuntimeError(
            "bn_act: a second derivative over the statistics of a process group is not supported"
        )
    x, residual, weight, bias, mean, spread, out = ctx.saved_tensors
    dtype = stat_dtype(grad)
    bias_wanted, grad = wanted[3], grad.to(dtype)
    leaf = x if x is not None else torch.zeros_like(grad)
    if not leaf.requires_grad:
        leaf = leaf.detach().requires_grad_()
    arguments = (
        weight.to(dtype) if weight is not None else None,
        bias.to(dtype) if bias is not None else None,
    )
    if ctx.batch_stats:
        z = F.batch_norm(leaf.to(dtype), None, None, *arguments, True, 0.0, ctx.eps)
    else:
        z = F.batch_norm(leaf.to(dtype), mean.to(dtype), spread.to(dtype), *arguments, False, 0.0, ctx.eps)
    dz = grad
    if out is not None:
        dz = torch.ops.aten.threshold_backward(grad, out, 0)
    elif ctx.act != _IDENTITY:
        total = z if residual is None else z + residual
        (dz,) = torch.autograd.grad(
            apply(total, KINDS[ctx.act], ctx.act_param), total, grad, create_graph=True
        )
    inputs = [leaf] + ([weight] if wanted[2] else [])
    grad_x, *grad_weight = torch.autograd.grad(z, inputs, dz, create_graph=True)
    grad_bias = dz.sum([d for d in range(dz.dim()) if d != 1]) if bias_wanted else None
    return (
        grad_x if wanted[0] else None,
        dz if wanted[1] else None,
        grad_weight[0] if wanted[2] else None,
        grad_bias,
    )


def _backward_impl(
    grad,
    x,
    residual,
    weight,
    bias,
    mean,
    invstd,
    out,
    batch_stats: bool,
    act: int,
    act_param: float,
    group: str,
    mask,
):
    wants_x, wants_residual, wants_weight, wants_bias = mask
    # Without x (linear in dz) no kernel reads it: the gradient stands in.
    layout = dense(next(t for t in (x, out, grad) if t is not None))
    grad, out, residual = like(grad, layout), like(out, layout), like(residual, layout)
    x = grad if x is None else layout
    grad_x = torch.empty_like(x) if wants_x or wants_residual else None
    grad_residual = torch.empty_like(x) if wants_residual else None
    # Two tensors: results of an op may not share memory.
    make = torch.empty_like if x.numel() else torch.zeros_like
    sums = make(mean), make(mean)
    shared = (grad, x, residual, out, mean, invstd)
    shared += (channel_vector(weight, mean.dtype), channel_vector(bias, mean.dtype), act, act_param)
    if x.numel() and ((wants_x and batch_stats) or wants_weight or wants_bias):
        primitives.get("bn_act_backward_reduce", x)(*shared, *sums)
    means = (None, None)
    if wants_x and batch_stats:
        means = mean_over(group, sums, x.numel() // max(x.shape[1], 1))
    if x.numel() and grad_x is not None:
        primitives.get("bn_act_backward", x)(*shared, *means, grad_x, grad_residual)
    return (
        grad_x if wants_x else x.new_empty(0),
        grad_residual if wants_residual else x.new_empty(0),
        sums[1] if wants_weight else mean.new_empty(0),
        sums[0] if wants_bias else mean.new_empty(0),
    )


def _backward_fake(
    grad, x, residual, weight, bias, mean, invstd, out, batch_stats, act, act_param, group, mask
):
    layout = dense(next(t for t in (x, out, grad) if t is not None))
    return (
        *(torch.empty_like(layout) if m else layout.new_empty(0) for m in mask[:2]),
        *(torch.empty_like(mean) if m else mean.new_empty(0) for m in mask[2:]),
    )


def _autocast(_dtype: torch.dtype, x, residual, *rest):
    # As PyTorch's batch_norm: x sets the dtype, and the sum is stored in it.
    return x, None if residual is None else residual.to(x.dtype), *rest


_train = register(
    "bn_act(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor? mean, Tensor? var, float momentum, float eps, int act, "
    "float act_param, str group) "
    "-> (Tensor, Tensor, Tensor)",
    _train_impl,
    _train_fake,
    autograd=_Train.apply,
    autocast=_autocast,
)
_train_now = counting_versions(_train, _train_impl)
frozen = register(
    "bn_act_frozen(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, "
    "float eps, int act, float act_param) -> Tensor",
    _frozen_impl,
    _frozen_fake,
    autograd=_Frozen.apply,
    autocast=_autocast,
)
_backward = register(
    "bn_act_backward(Tensor grad, Tensor? x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor invstd, Tensor? out, bool batch_stats, int act, float act_param, str group, bool[4] mask) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)
