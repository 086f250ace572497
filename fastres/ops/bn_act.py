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
from . import bn_act_passes as passes
from .library import counting_versions, register, unwatched
from .tensors import IDENTITY as _IDENTITY
from .tensors import RELU as _RELU
from .tensors import activation, dense, stat_dtype


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
        return _train(*tensors, momentum, eps, act.code, act.param, name)[0]
    if statistics is not None or group is not None:
        raise ValueError(
            "statistics, group: they belong to training, without it running_mean and running_var do"
        )
    if running_mean is None or running_var is None:
        raise ValueError("running_mean, running_var: needed without training, got None")
    return frozen(x, residual, weight, bias, running_mean, running_var, eps, act.code, act.param)


class _BNAct(torch.autograd.Function):
    """`below(x, residual, weight, bias, *arguments)` gives (out, mean, invstd); constants: (whether these are the
    batch's own, eps, act, act_param, group)."""

    @staticmethod
    def forward(ctx, below, x, residual, weight, bias, arguments, constants):
        out, mean, invstd = below(x, residual, weight, bias, *arguments)
        ctx.set_materialize_grads(False)
        ctx.constants = constants
        _save(ctx, x, residual, weight, bias, mean, invstd, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * 7
        return None, *_gradients(ctx, grad, ctx.needs_input_grad[1:5]), None, None


def _save(ctx, x, residual, weight, bias, mean, invstd, out) -> None:
    """Keep what backward reads and no more.

    z is computed again where it costs no read beyond that of x, so of ReLU without a residual too. With one,
    ReLU's mask is in the output, which the next layer keeps anyway. A frozen normalisation with a constant weight
    is linear in dz: then x is not kept at all.
    """
    batch_stats, _, act, _, _ = ctx.constants
    smooth = act not in (_RELU, _IDENTITY)
    needs_x = batch_stats or smooth or ctx.needs_input_grad[3]
    recomputes = smooth or (act == _RELU and residual is None and needs_x)
    ctx.save_for_backward(
        x if needs_x else None,
        residual if recomputes else None,
        weight,
        bias if recomputes else None,
        mean,
        invstd,
        out if act == _RELU and not recomputes else None,
    )


def _gradients(ctx, grad: Tensor, wanted: tuple[bool, bool, bool, bool]) -> list[Tensor | None]:
    """Gradients of x, residual, weight, bias; None where not wanted."""
    if torch.is_grad_enabled():
        return _differentiable_gradients(ctx, grad, wanted)
    tensors = (grad, *ctx.saved_tensors)
    batch_stats, _, act, act_param, group = ctx.constants
    # With nothing behind the sum its gradient is the one that came.
    through = act == _IDENTITY and wanted[1]
    mask = (wanted[0], False, *wanted[2:]) if through else wanted
    if unwatched(tensors):
        grads = passes.gradients(*tensors, batch_stats, act, act_param, group, mask)
    else:
        with _C._AutoDispatchBelowAutograd():
            grads = _backward.op(*tensors, batch_stats, act, act_param, group, mask)
        grads = [g if m else None for g, m in zip(grads, mask, strict=True)]
    if through:
        grads[1] = grad
    # Half-precision weights get fp32 gradients here: autograd casts them to the dtype of the input.
    return grads


def _differentiable_gradients(ctx, grad: Tensor, wanted) -> list[Tensor | None]:
    """The same in PyTorch's differentiable arithmetic, for `create_graph=True`."""
    batch_stats, eps, act, act_param, group = ctx.constants
    if group:
        raise RuntimeError(
            "bn_act: a second derivative over the statistics of a process group is not supported"
        )
    x, residual, weight, bias, mean, invstd, out = ctx.saved_tensors
    dtype = stat_dtype(grad)
    bias_wanted, grad = wanted[3], grad.to(dtype)
    leaf = x if x is not None else torch.zeros_like(grad)
    if not leaf.requires_grad:
        leaf = leaf.detach().requires_grad_()
    arguments = (
        weight.to(dtype) if weight is not None else None,
        bias.to(dtype) if bias is not None else None,
    )
    if batch_stats:
        z = F.batch_norm(leaf.to(dtype), None, None, *arguments, True, 0.0, eps)
    else:
        scale, shift = passes.scale_shift(*arguments, mean, invstd)
        column = (1, -1, *[1] * (leaf.dim() - 2))
        z = leaf.to(dtype) * scale.view(column) + shift.view(column)
    dz = grad
    if out is not None:
        dz = torch.ops.aten.threshold_backward(grad, out, 0)
    elif act != _IDENTITY:
        total = z if residual is None else z + residual
        (dz,) = torch.autograd.grad(apply(total, KINDS[act], act_param), total, grad, create_graph=True)
    inputs = [leaf] + ([weight] if wanted[2] else [])
    grad_x, *grad_weight = torch.autograd.grad(z, inputs, dz, create_graph=True)
    grad_bias = dz.sum([d for d in range(dz.dim()) if d != 1]) if bias_wanted else None
    return [
        grad_x if wanted[0] else None,
        dz if wanted[1] else None,
        grad_weight[0] if wanted[2] else None,
        grad_bias,
    ]


def _train_impl(*args):
    out, mean, invstd = passes.train(*args)
    # results of an op may not be its arguments
    return out, mean.clone() if mean is args[6] else mean, invstd


def _train_fake(
    x, residual, weight, bias, running_mean, running_var, mean, var, momentum, eps, act, act_param, group
):
    passes.check_train(x, residual, weight, bias, running_mean, running_var, mean, var, act, group)
    stat = x.new_empty(x.shape[1], dtype=stat_dtype(x))
    return torch.empty_like(dense(x)), stat, torch.empty_like(stat)


def _train_autograd(below, x, residual, weight, bias, *arguments):
    statistics: list[Tensor] = []

    def keeping(*args):
        results = below(*args)
        statistics.extend(results[1:])
        return results

    *_, eps, act, act_param, group = arguments
    constants = (True, eps, act, act_param, group)
    return _BNAct.apply(keeping, x, residual, weight, bias, arguments, constants), *statistics


def _train_direct(_, x, residual, weight, bias, *arguments):
    *_, eps, act, act_param, group = arguments
    constants = (True, eps, act, act_param, group)
    return (_BNAct.apply(_train_now, x, residual, weight, bias, arguments, constants),)


def _frozen_impl(*args):
    return passes.frozen(*args)[0]


def _frozen_fake(x, residual, weight, bias, mean, var, eps, act, act_param):
    passes.check(x, residual, weight, bias, mean, var, act)
    return torch.empty_like(dense(x))


def _frozen_autograd(below, x, residual, weight, bias, mean, var, eps, *rest):
    def with_statistics(*args):
        return below(*args), mean, passes.inverse_deviation(var, eps, stat_dtype(x))

    return _frozen_direct(None, x, residual, weight, bias, mean, var, eps, *rest, below=with_statistics)


def _frozen_direct(_, x, residual, weight, bias, mean, var, eps, act, act_param, *, below=passes.frozen):
    if mean.requires_grad or var.requires_grad:
        raise ValueError(
            "running_mean, running_var: statistics are constants, they cannot require a gradient"
        )
    arguments, constants = (mean, var, eps, act, act_param), (False, eps, act, act_param, "")
    return _BNAct.apply(below, x, residual, weight, bias, arguments, constants)


def _backward_impl(grad, x, residual, weight, bias, mean, invstd, *constants):
    grads = passes.gradients(grad, x, residual, weight, bias, mean, invstd, *constants)
    return tuple(
        like.new_empty(0) if g is None else g
        for g, like in zip(grads, (grad, grad, invstd, invstd), strict=True)
    )


def _backward_fake(
    grad, x, residual, weight, bias, mean, invstd, out, batch_stats, act, act_param, group, mask
):
    layout = dense(next(t for t in (x, out, grad) if t is not None))
    return (
        *(torch.empty_like(layout) if m else layout.new_empty(0) for m in mask[:2]),
        *(torch.empty_like(invstd) if m else invstd.new_empty(0) for m in mask[2:]),
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
    autograd=_train_autograd,
    autocast=_autocast,
    direct=_train_direct,
)
_train_now = counting_versions(_train.op, passes.train)
frozen = register(
    "bn_act_frozen(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, "
    "float eps, int act, float act_param) -> Tensor",
    _frozen_impl,
    _frozen_fake,
    autograd=_frozen_autograd,
    autocast=_autocast,
    direct=_frozen_direct,
)
_backward = register(
    "bn_act_backward(Tensor grad, Tensor? x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor invstd, Tensor? out, bool batch_stats, int act, float act_param, str group, bool[4] mask) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)
