"""Which modules are known, by exact type. Subclasses are not: timm's `BatchNormAct2d` is a BatchNorm with an
activation, its `StdConv2d` a Conv that standardises its weights; taking them for their base class would be silently
wrong."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from fastres.activation import IDENTITY, Activation


def exact_type(module: nn.Module) -> type:
    """The module's class, seen through `torch.nn.utils.parametrize`."""
    return parametrize.type_before_parametrizations(module)


def qualified_type(module: nn.Module) -> str:
    kind = exact_type(module)
    return f"{kind.__module__}.{kind.__qualname__}"


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_layer(module: nn.Module) -> bool:
    """Layers stay whole in a trace, whatever their class: Conv, BN and their subclasses."""
    return (
        isinstance(module, (_ConvNd, _NormBase, nn.Linear))
        or is_batch_norm(module)
        or bool(batch_norm_act(module))
    )


def is_identity_now(module: nn.Module) -> bool:
    """Whether the module hands its input on: an Identity, or a dropout in eval mode."""
    kind = exact_type(module)
    return kind is nn.Identity or (kind in _DROPOUTS and not module.training)


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def traces(module: nn.Module) -> bool:
    """Whether fx would look inside the module at all."""
    return not exact_type(module).__module__.startswith("torch.nn")


def is_conv(module: nn.Module) -> bool:
    """An exact nn.Conv2d (parametrized or not) with zero padding that is symmetric."""
    return (
        exact_type(module) is nn.Conv2d
        and module.padding_mode == "zeros"
        and conv_padding(module) is not None
    )


def conv_padding(conv: nn.Conv2d) -> tuple[int, int] | None:
    """The padding in pixels a side, or None where 'same' would be lopsided."""
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return None if any(t % 2 for t in total) else (total[0] // 2, total[1] // 2)
    return tuple(conv.padding)


def is_batch_norm(module: nn.Module) -> bool:
    """A BN whose arithmetic in eval mode is that of nn.BatchNorm2d over the same four tensors and `eps`."""
    return exact_type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm) or (
        qualified_type(module)
        in (
            "torchvision.ops.misc.FrozenBatchNorm2d",
            "timm.layers.norm.FrozenBatchNorm2d",
            "timm.layers.norm_act.FrozenBatchNormAct2d",
        )
        and batch_norm_act(module) is None
    )


def batch_norm_act(module: nn.Module) -> Activation | None:
    """The activation of timm's BN-with-activation layers, or None where it is no such layer (or an unknown one)."""
    if qualified_type(module) not in (
        "timm.layers.norm_act.BatchNormAct2d",
        "timm.layers.norm_act.FrozenBatchNormAct2d",
    ):
        return None
    if not isinstance(getattr(module, "drop", None), (nn.Identity, type(None))):
        return None
    return activation(module.act)


def foldable(bn: nn.Module) -> bool:
    """Whether the BN uses its running statistics now."""
    return getattr(bn, "running_mean", None) is not None and not (
        bn.training and not qualified_type(bn).split(".")[-1].startswith("Frozen")
    )


def activation(module: nn.Module) -> Activation | None:
    """The activation that `module` computes, or None."""
    kind = exact_type(module)
    if kind is nn.Identity:
        return IDENTITY
    if kind is nn.GELU:
        return Activation("gelu" if module.approximate == "none" else "gelu_tanh")
    if kind is nn.LeakyReLU:
        return Activation("leaky_relu", float(module.negative_slope))
    name = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish"}.get(kind)
    return Activation(name) if name else None
