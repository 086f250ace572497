"""Layouts, dtypes and input checks that every op shares."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import KINDS, Activation

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
RELU = KINDS.index("relu")
RELU6 = KINDS.index("relu6")
IDENTITY = KINDS.index("identity")


def activation(act: Activation | str) -> Activation:
    """The activation that the caller named, as a string or an `Activation`."""
    if isinstance(act, Activation):
        return act
    if isinstance(act, str):
        return Activation(act)
    raise TypeError(f"act: expected an Activation or its name, got {type(act).__name__}")


def stat_dtype(x: Tensor) -> torch.dtype:
    """dtype of statistics and of all arithmetic between load and store: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def memory_format(x: Tensor) -> torch.memory_format:
    """The dense format nearest to `x`: channels_last if its channels are adjacent, else contiguous."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is None or x.is_contiguous():
        return torch.contiguous_format
    if x.is_contiguous(memory_format=last) or x.stride(1) == 1:
        return last
    return torch.contiguous_format


def dense(x: Tensor) -> Tensor:
    """`x` itself if it is contiguous or channels_last, else a copy that is."""
    return x.contiguous(memory_format=memory_format(x))


def like(t: Tensor | None, x: Tensor) -> Tensor | None:
    """`t` with the strides of the dense tensor `x`; copies only where the memory order differs."""
    if t is None or t.stride() == x.stride():
        return t
    layout = memory_format(x)
    if t.is_contiguous(memory_format=layout):
        # Strides of size-1 dimensions are arbitrary; kernels may compare them.
        return t.as_strided(x.shape, x.stride())
    return torch.empty_like(x, dtype=t.dtype).copy_(t)


def channel_vector(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A [C] parameter as kernels take it: contiguous, in the arithmetic's dtype."""
    return None if t is None else t.to(dtype).contiguous()


def check_float(name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
    if t.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {t.dtype}")


def check_rank(name: str, t: Tensor, least: int, most: int | None = None) -> None:
    if t.dim() < least or (most is not None and t.dim() > most):
        wanted = (
            f"{least}" if most == least else f"at least {least}" if most is None else f"{least} to {most}"
        )
        raise ValueError(f"{name}: expected {wanted} dimensions, got {t.dim()} (shape {tuple(t.shape)})")


def check_same(
    name: str, t: Tensor | None, x: Tensor, x_name: str = "x", shape: tuple[int, ...] | None = None
) -> None:
    """`t` must have the dtype and device of `x`, and its shape unless another one is given."""
    if t is None:
        return
    check_float(name, t)
    if tuple(t.shape) != tuple(x.shape if shape is None else shape):
        wanted = f"the shape of {x_name}, {tuple(x.shape)}" if shape is None else f"shape {tuple(shape)}"
        raise ValueError(f"{name}: expected {wanted}, got {tuple(t.shape)}")
    if t.dtype != x.dtype:
        raise TypeError(f"{name}: expected the dtype of {x_name}, {x.dtype}, got {t.dtype}")
    check_device(name, t, x, x_name)


def check_device(name: str, t: Tensor, x: Tensor, x_name: str = "x") -> None:
    if t.device != x.device:
        raise ValueError(f"{name}: expected the device of {x_name}, {x.device}, got {t.device}")


def check_channels(name: str, t: Tensor | None, channels: int, x: Tensor) -> None:
    """`t` must be a [channels] vector on the device of `x`."""
    if t is None:
        return
    check_float(name, t)
    if t.dim() != 1 or t.shape[0] != channels:
        raise ValueError(
            f"{name}: expected one value for each of {channels} channels, got shape {tuple(t.shape)}"
        )
    check_device(name, t, x)


def check_act(act: int) -> None:
    if not 0 <= act < len(KINDS):
        raise ValueError(f"act: expected a code from 0 to {len(KINDS) - 1}, got {act}")
