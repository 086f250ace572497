"""What `bn_act` computes on real tensors: the forward over the batch's own or given statistics, and the gradients.

Each is one call of a kernel that has it whole (`bn_act_forward`, `bn_act_gradients` of `primitives`), where there
is one and the arguments are as it takes them; else its passes one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import primitives, torch_primitives
from .statistics import mean_over, merge_over, statistics_of
from .tensors import (
    IDENTITY,
    RELU,
    RELU6,
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


def check(x, residual, weight, bias, mean, var, act: int) -> None:
    check_float("x", x)
    check_rank("x", x, 2)
    check_same("residual", residual, x)
    channels = x.shape[1]
    for name, t in (("weight", weight), ("bias", bias), ("running_mean", mean), ("running_var", var)):
        check_channels(name, t, channels, x)
    check_act(act)


def check_train(
    x, residual, weight, bias, running_mean, running_var, mean, var, act: int, group: str
) -> None:
    check(x, residual, weight, bias, running_mean, running_var, act)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean, running_var: give both or neither, got one")
    for t in (mean, var):
        check_channels("statistics", t, x.shape[1], x)
    if x.numel() == x.shape[1] and not group:
        raise ValueError(
            f"x: expected more than 1 value per channel when training, got input size {tuple(x.shape)}"
        )


def train(
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
) -> Sequence[Tensor]:
    """(out, mean, 1 / sqrt(var + eps)) of the batch, the mean being the given one if there is; the running
    statistics are moved."""
    whole = None if group else primitives.find("bn_act_forward", x)
    rest = (running_mean, running_var, mean, var, True, momentum, eps, act, act_param, None)
    if whole is not None and (results := whole(x, residual, weight, bias, *rest)):
        return results if mean is None else (results[0], mean, results[1])
    check_train(x, residual, weight, bias, running_mean, running_var, mean, var, act, group)
    x = dense(x)
    residual, dtype = like(residual, x), stat_dtype(x)
    weight, bias = channel_vector(weight, dtype), channel_vector(bias, dtype)
    if whole is not None and (results := whole(x, residual, weight, bias, *rest)):
        return results if mean is None else (results[0], mean, results[1])
    out = torch.empty_like(x)
    saved_mean, invstd = (x.new_empty(x.shape[1], dtype=dtype) for _ in range(2))
    count = x.numel() // x.shape[1] if x.shape[1] else 0
    if count == 0 and not group:
        return out, saved_mean.zero_(), invstd.zero_()
    mean, var = statistics_of(x, count, mean, var, saved_mean)
    finalize = primitives.get("bn_finalize", x)
    if group:
        mean, var, count = merge_over(group, mean, var, count)
        finalize = torch_primitives.bn_finalize
    scale, shift = torch.empty_like(mean), torch.empty_like(mean)
    finalize(mean, var, weight, bias, running_mean, running_var, momentum, eps, count, invstd, scale, shift)
    if x.numel():
        primitives.get("bn_act", x)(x, residual, scale, shift, act, act_param, out)
    return out, mean, invstd


def scale_shift(weight, bias, mean, invstd) -> tuple[Tensor, Tensor]:
    """x * scale + shift = (x - mean) * weight * invstd + bias, in the dtype of `invstd`."""
    scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
    shift = -mean.to(invstd.dtype) * scale
    return scale, shift if bias is None else shift + bias.to(invstd.dtype)


def inverse_deviation(var: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return torch.rsqrt(var.to(dtype) + eps)


def frozen(
    x, residual, weight, bias, mean, var, eps: float, act: int, act_param: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, mean, 1 / sqrt(var + eps))."""
    whole = primitives.find("bn_act_forward", x)
    if whole is not None:
        results = whole(
            x, residual, weight, bias, mean, var, None, None, False, 0.0, eps, act, act_param, None
        )
        if results:
            return results[0], mean, results[1]
    check(x, residual, weight, bias, mean, var, act)
    x = dense(x)
    out, invstd = torch.empty_like(x), inverse_deviation(var, eps, stat_dtype(x))
    if x.numel():
        scale, shift = scale_shift(weight, bias, mean, invstd)
        primitives.get("bn_act", x)(x, like(residual, x), scale, shift, act, act_param, out)
    return out, mean, invstd


def gradients(
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
) -> list[Tensor | None]:
    """Gradients of x, residual, weight and bias; None where `mask` is false."""
    whole = None if group else primitives.find("bn_act_gradients", grad)
    tail = (batch_stats, act, act_param, mask[0] + 2 * mask[1] + 4 * mask[2] + 8 * mask[3])
    if whole is not None and (results := whole(grad, x, residual, weight, bias, mean, invstd, out, *tail)):
        return _spread(results, mask)
    # Without x (linear in dz) no kernel reads it: the gradient stands in.
    layout = dense(next(t for t in (x, out, grad) if t is not None))
    grad, out, residual = like(grad, layout), like(out, layout), like(residual, layout)
    mean = channel_vector(mean, invstd.dtype)
    weight, bias = channel_vector(weight, mean.dtype), channel_vector(bias, mean.dtype)
    x = None if x is None else layout
    if whole is not None and (results := whole(grad, x, residual, weight, bias, mean, invstd, out, *tail)):
        return _spread(results, mask)
    return _gradients_by_passes(
        grad, x, residual, weight, bias, mean, invstd, out, batch_stats, act, act_param, group, mask
    )


def _spread(results: list[Tensor], mask) -> list[Tensor | None]:
    if len(results) == 4:
        return results
    results = iter(results)
    return [next(results) if wanted else None for wanted in mask]


def _gradients_by_passes(
    grad, x, residual, weight, bias, mean, invstd, out, batch_stats, act, act_param, group, mask
) -> list[Tensor | None]:
    wants_x, wants_residual, wants_weight, wants_bias = mask
    x = grad if x is None else x
    values = x.numel()
    grad_x = torch.empty_like(x) if wants_x or wants_residual else None
    grad_residual = torch.empty_like(x) if wants_residual else None
    # Two tensors: results of an op may not share memory.
    make = torch.empty_like if values else torch.zeros_like
    sums = make(mean), make(mean)
    inputs = (grad, x, residual, out, mean, invstd, weight, bias, act, act_param)
    left = grad_residual
    if values and ((wants_x and batch_stats) or wants_weight or wants_bias):
        # dz, once it is written, is all that the second pass needs of grad, out and residual, provided that it
        # has lost nothing in the dtype of the activations.
        exact = act in (IDENTITY, RELU, RELU6) or grad.dtype == mean.dtype
        dz = grad_residual if exact else None
        primitives.get("bn_act_backward_reduce", x)(*inputs, *sums, dz)
        if dz is not None:
            inputs, left = (dz, x, None, None, mean, invstd, weight, bias, IDENTITY, 0.0), None
    means = (None, None)
    if wants_x and batch_stats:
        means = mean_over(group, sums, values // max(x.shape[1], 1))
    if values and (wants_x or left is not None):
        primitives.get("bn_act_backward", x)(*inputs, *means, grad_x, left)
    every = (grad_x, grad_residual, sums[1], sums[0])
    return [t if wanted else None for t, wanted in zip(every, mask, strict=True)]
