"""conv → BN → add → activation over modules: the one place that decides how a layer of a block is computed.

In training the convolution runs as it is and everything after it is one fused op over the batch's
statistics; with fixed statistics (eval mode) it is one op altogether. A module that is not exactly what is
fused here (another norm, a subclass, hooks, a parametrization, another padding mode) is called as it is, so
that whatever was put there acts.
"""

from __future__ import annotations

import torch.distributed as dist
import torch.fx
from torch import Tensor, nn

from .. import ops
from ..activation import IDENTITY, RELU, Activation
from ..ops.conv_stats import kernel_for

_ACTIVATIONS = {
    nn.Identity: lambda m: IDENTITY,
    nn.ReLU: lambda m: RELU,
    nn.ReLU6: lambda m: Activation("relu6"),
    nn.SiLU: lambda m: Activation("silu"),
    nn.GELU: lambda m: Activation("gelu" if m.approximate == "none" else "gelu_tanh"),
    nn.LeakyReLU: lambda m: Activation("leaky_relu", float(m.negative_slope)),
    nn.Hardswish: lambda m: Activation("hardswish"),
}
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: nn.Module | None, *types: type[nn.Module]) -> bool:
    """Whether `module` is exactly of one of `types`, with nothing attached that calling it would trigger."""
    if type(module) not in types or "forward" in module.__dict__:
        return False
    return not any(getattr(module, hooks) for hooks in _HOOKS)


def activation_of(act: Activation | nn.Module) -> Activation | None:
    """The activation that a module stands for; None if it is not one that can be fused."""
    if isinstance(act, Activation):
        return act
    return _ACTIVATIONS[type(act)](act) if is_plain(act, *_ACTIVATIONS) else None


def conv_bn_act(
    x: Tensor,
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d | None,
    residual: Tensor | None = None,
    act: Activation | nn.Module = RELU,
) -> Tensor:
    """act(bn(conv(x)) + residual).

    Args:
        x: [N, C, H, W].
        conv, bn: the block's own modules; bn may be None.
        residual: shape of the result, added before the activation.
        act: an `Activation`, or the module that computes it.

    Returns:
        [N, K, P, Q]; differentiable in x, residual and all parameters.
    """
    activation = activation_of(act)
    if isinstance(x, torch.fx.Proxy):
        # a capture keeps the layer whole (graph/primitive.py)
        arguments = (x, conv, bn, residual, act if activation is None else activation)
        return x.tracer.create_proxy("call_function", conv_bn_act, arguments, {})
    fusible = activation is not None and _fuses_conv(conv)
    if fusible and bn is not None and _takes_statistics(x, conv, bn):
        y, *statistics = ops.conv_stats(x, conv.weight, conv.stride, conv.padding, conv.dilation, conv.groups)
        return bn_act(y, bn, residual, act, tuple(statistics))
    if not fusible or not (bn is None or _has_fixed_statistics(bn)):
        y = conv(x)
        return _finish(y, residual, act) if bn is None else bn_act(y, bn, residual, act)
    bn_arguments = (None,) * 4 if bn is None else (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    return ops.conv_bn_act(
        x,
        conv.weight,
        conv.bias,
        *bn_arguments,
        0.0 if bn is None else bn.eps,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        residual=residual,
        act=activation,
    )


conv_bn_act.fastres_conv_bn_act = True


def bn_act(
    x: Tensor,
    bn: nn.Module,
    residual: Tensor | None = None,
    act: Activation | nn.Module = RELU,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """act(bn(x) + residual), with running statistics and batch counter kept as `bn` would keep them.

    `statistics`: mean and biased variance of x in training, if they are known already.
    """
    activation = activation_of(act)
    if activation is None or not is_plain(bn, *_BATCH_NORMS):
        return _finish(bn(x), residual, act)
    bn._check_input_dim(x)
    momentum = bn.momentum
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(bn.num_batches_tracked)
    keeps = not bn.training or bn.track_running_stats
    return ops.bn_act(
        x,
        bn.running_mean if keeps else None,
        bn.running_var if keeps else None,
        bn.weight,
        bn.bias,
        bn.training or (bn.running_mean is None and bn.running_var is None),
        0.0 if momentum is None else momentum,
        bn.eps,
        residual=residual,
        act=activation,
        statistics=statistics,
        group=_group(bn),
    )


def _group(bn: nn.Module) -> dist.ProcessGroup | None:
    """The processes whose batches `bn` normalises together; None: this one alone."""
    if type(bn) is not nn.SyncBatchNorm or not bn.training:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return bn.process_group or dist.group.WORLD


def _fuses_conv(conv: nn.Module) -> bool:
    return is_plain(conv, nn.Conv2d) and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def _has_fixed_statistics(bn: nn.Module) -> bool:
    return is_plain(bn, *_BATCH_NORMS) and not bn.training and bn.running_mean is not None


def _takes_statistics(x: Tensor, conv: nn.Conv2d, bn: nn.Module) -> bool:
    """Whether the batch's statistics are wanted, and a kernel that emits them with the convolution is worth it."""
    if torch.compiler.is_compiling() or not is_plain(bn, *_BATCH_NORMS) or _has_fixed_statistics(bn):
        return False
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return conv.bias is None and x.dim() == 4 and kernel_for(x, conv.weight, *geometry) is not None


def _finish(y: Tensor, residual: Tensor | None, act: Activation | nn.Module) -> Tensor:
    """What remains after a norm that was called as it is."""
    if residual is None:
        return act(y)
    if activation_of(act) == RELU and y.dtype == residual.dtype:
        return ops.add_relu(y, residual)
    return act(y + residual)
