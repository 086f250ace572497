"""Single layers: convolution + BN + activation, and BN + activation."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..activation import Activation
from ..ops.tensors import activation
from . import functional


class BNAct(nn.Module):
    """act(batch_norm(x) + residual).

    Args:
        num_features, eps, momentum, affine, track_running_stats: as in `torch.nn.BatchNorm2d`.
        act: an `Activation` or its name.

    The normalisation is the child `bn`, an ordinary `BatchNorm2d`, so that PyTorch's own tools (for instance
    `SyncBatchNorm.convert_sync_batchnorm`) may exchange it without losing the activation.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        act: Activation | str = "relu",
    ):
        super().__init__()
        self.bn = nn.BatchNorm2d(num_features, eps, momentum, affine, track_running_stats)
        self.act = activation(act)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x, residual: [N, C, H, W]. Errors are those of `fastres.ops.bn_act`."""
        return functional.bn_act(x, self.bn, residual, self.act)

    def extra_repr(self) -> str:
        return f"act={self.act}"


class ConvBNAct(nn.Module):
    """act(batch_norm(conv2d(x)) + residual).

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias: as in `torch.nn.Conv2d`.
        padding: None keeps the image's size (at stride 1, odd kernels).
        act: an `Activation` or its name.
        norm_layer: called with the number of channels; None for no normalisation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        act: Activation | str = "relu",
        norm_layer: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
    ):
        super().__init__()
        if padding is None:
            kernels = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
            dilations = (dilation, dilation) if isinstance(dilation, int) else dilation
            padding = tuple(d * (k - 1) // 2 for k, d in zip(kernels, dilations, strict=True))
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=bias
        )
        self.bn = None if norm_layer is None else norm_layer(out_channels)
        self.act = activation(act)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [N, in_channels, H, W]; residual: the result's shape. Errors as in `fastres.ops.conv_bn_act`."""
        return functional.conv_bn_act(x, self.conv, self.bn, residual, self.act)

    def extra_repr(self) -> str:
        return f"act={self.act}"
