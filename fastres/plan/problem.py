"""What a kernel may depend on: the problem (layers, shapes, dtype) and the target (the machine)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from fastres.activation import IDENTITY, Activation

_DTYPE_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
}


def dtype_name(dtype: torch.dtype) -> str:
    return _DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def dtype_from_name(name: str) -> torch.dtype:
    for dtype, known in _DTYPE_NAMES.items():
        if known == name or str(dtype) in (name, f"torch.{name}"):
            return dtype
    raise ValueError(f"dtype: got {name!r}, takes one of {', '.join(_DTYPE_NAMES.values())}")


@dataclass(frozen=True)
class ConvSpec:
    """A convolution with its BN, residual and activation: x [n, c, h, w] → y [n, k, p, q].

    `affine` says that a BN (a per-channel scale) belongs to it; `bias` that its shift is not zero by construction.
    """

    n: int
    c: int
    h: int
    w: int
    k: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    act: Activation = IDENTITY
    residual: bool = False
    affine: bool = True
    bias: bool = True

    @property
    def p(self) -> int:
        return _extent(self.h, self.kernel[0], self.stride[0], self.padding[0], self.dilation[0])

    @property
    def q(self) -> int:
        return _extent(self.w, self.kernel[1], self.stride[1], self.padding[1], self.dilation[1])

    @property
    def x_shape(self) -> tuple[int, ...]:
        return (self.n, self.c, self.h, self.w)

    @property
    def y_shape(self) -> tuple[int, ...]:
        return (self.n, self.k, self.p, self.q)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.k, self.c // self.groups, *self.kernel)

    @property
    def pointwise(self) -> bool:
        return self.kernel == (1, 1) and self.padding == (0, 0) and self.groups == 1

    @property
    def flops(self) -> int:
        return 2 * self.n * self.p * self.q * math.prod(self.weight_shape)

    @property
    def weight_elements(self) -> int:
        return math.prod(self.weight_shape)

    def __str__(self) -> str:
        text = f"{self.c}->{self.k} {self.kernel[0]}x{self.kernel[1]}/{_one(self.stride)} @{self.h}x{self.w}"
        default = tuple((extent - 1) // 2 * d for extent, d in zip(self.kernel, self.dilation, strict=True))
        if self.padding != default:
            text += f" pad{_one(self.padding)}"
        if self.dilation != (1, 1):
            text += f" dil{_one(self.dilation)}"
        if self.groups != 1:
            text += f" g{self.groups}"
        if not self.affine:
            text += " plain" if self.bias else " plain nobias"
        return text + (" +add" if self.residual else "") + (f" {self.act}" if self.act != IDENTITY else "")


@dataclass(frozen=True)
class PoolSpec:
    """A max pool over windows, or (`kernel` None) the mean over all of H and W; `flat` drops H and W."""

    n: int
    c: int
    h: int
    w: int
    kernel: tuple[int, int] | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False
    flat: bool = False

    @property
    def p(self) -> int:
        return 1 if self.kernel is None else self._pooled(self.h, 0)

    @property
    def q(self) -> int:
        return 1 if self.kernel is None else self._pooled(self.w, 1)

    def _pooled(self, size: int, axis: int) -> int:
        stride, padding = self.stride[axis], self.padding[axis]
        rest = stride - 1 if self.ceil_mode else 0
        span = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        extent = (size + 2 * padding - span + rest) // stride + 1
        # PyTorch's rule: the last window must start inside the input or its left padding
        return extent - 1 if self.ceil_mode and (extent - 1) * stride >= size + padding else extent

    @property
    def x_shape(self) -> tuple[int, ...]:
        return (self.n, self.c, self.h, self.w)

    @property
    def y_shape(self) -> tuple[int, ...]:
        return (self.n, self.c) if self.flat else (self.n, self.c, self.p, self.q)

    @property
    def flops(self) -> int:
        return 0

    @property
    def weight_elements(self) -> int:
        return 0

    def __str__(self) -> str:
        if self.kernel is None:
            return f"mean {self.c} @{self.h}x{self.w}" + ("" if self.flat else " keepdim")
        text = f"max {self.kernel[0]}x{self.kernel[1]}/{_one(self.stride)} {self.c} @{self.h}x{self.w}"
        if self.padding != tuple((extent - 1) // 2 for extent in self.kernel):
            text += f" pad{_one(self.padding)}"
        if self.dilation != (1, 1):
            text += f" dil{_one(self.dilation)}"
        return text + (" ceil" if self.ceil_mode else "")


@dataclass(frozen=True)
class LinearSpec:
    """y [n, k] = x [n, c] w^T + b."""

    n: int
    c: int
    k: int
    bias: bool = True

    @property
    def x_shape(self) -> tuple[int, ...]:
        return (self.n, self.c)

    @property
    def y_shape(self) -> tuple[int, ...]:
        return (self.n, self.k)

    @property
    def flops(self) -> int:
        return 2 * self.n * self.c * self.k

    @property
    def weight_elements(self) -> int:
        return self.c * self.k

    def __str__(self) -> str:
        return f"{self.c}->{self.k}" + ("" if self.bias else " nobias")


@dataclass(frozen=True)
class NormalizeSpec:
    """(x / 255 - mean) / std of uint8 images, channel by channel: y in the compute type."""

    n: int
    c: int
    h: int
    w: int

    @property
    def x_shape(self) -> tuple[int, ...]:
        return (self.n, self.c, self.h, self.w)

    y_shape = x_shape

    @property
    def flops(self) -> int:
        return 0

    @property
    def weight_elements(self) -> int:
        return 0

    def __str__(self) -> str:
        return f"{self.c} @{self.h}x{self.w}"


Spec = ConvSpec | PoolSpec | LinearSpec | NormalizeSpec


@dataclass(frozen=True)
class Problem:
    """One kernel call: the pattern's layers that are present, by role, and the compute type.

    Attributes:
        pattern: the pattern's name, e.g. "shifted_block".
        layers: (role, spec) in execution order; optional roles that are absent are left out.
        dtype: the type of activations (a uint8 input precedes a `normalize` layer and no other).
        inputs: names of the tensors read, e.g. ("conv.x", "expand.residual"); the order in which allocating launches
            take them.
        outputs: the roles whose outputs are written, in order.
        flags: what else changes the answer or the choice: "tf32", of fp32.
    """

    pattern: str
    layers: tuple[tuple[str, Spec], ...]
    dtype: torch.dtype
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    flags: tuple[str, ...] = ()

    def __getitem__(self, role: str) -> Spec:
        return self._by_role[role]

    def get(self, role: str) -> Spec | None:
        return self._by_role.get(role)

    @cached_property
    def _by_role(self) -> dict[str, Spec]:
        return dict(self.layers)

    @property
    def n(self) -> int:
        return self.layers[0][1].n

    @property
    def first(self) -> Spec:
        return self.layers[0][1]

    def with_batch(self, n: int) -> Problem:
        """The same layers at batch size `n`."""
        return replace(self, layers=tuple((role, replace(spec, n=n)) for role, spec in self.layers))

    def input_shape(self, name: str) -> tuple[int, ...]:
        """The shape of input "role.x" or "role.residual"."""
        role, _, which = name.partition(".")
        return self[role].x_shape if which == "x" else self[role].y_shape

    def input_dtype(self, name: str) -> torch.dtype:
        return torch.uint8 if name == "normalize.x" else self.dtype

    def output_shape(self, role: str) -> tuple[int, ...]:
        return self[role].y_shape

    @cached_property
    def flops(self) -> int:
        return sum(spec.flops for _, spec in self.layers)

    @cached_property
    def bytes(self) -> int:
        """The least that must move: each input that is read, each output and each weight once."""
        size = self.dtype.itemsize
        total = sum(self._elements_read(name) * self.input_dtype(name).itemsize for name in self.inputs)
        total += sum(math.prod(self.output_shape(role)) for role in self.outputs) * size
        return total + sum(spec.weight_elements for _, spec in self.layers) * size

    def _elements_read(self, name: str) -> int:
        """A strided 1x1 convolution reads only the pixels that it stands on."""
        spec = self[name.partition(".")[0]]
        if name.endswith(".x") and isinstance(spec, ConvSpec) and spec.pointwise:
            return spec.n * spec.c * spec.p * spec.q
        return math.prod(self.input_shape(name))

    @cached_property
    def key(self) -> str:
        """A readable, stable key for tables; two problems with equal keys are equal but for the batch size's place."""
        return f"n{self.n} {self.layer_key}"

    @cached_property
    def layer_key(self) -> str:
        """`key` without the batch size."""
        parts = " | ".join(f"{role} {spec}" for role, spec in self.layers)
        return " ".join((self.pattern, dtype_name(self.dtype), parts, *self.flags))

    def __str__(self) -> str:
        return self.key


@dataclass(frozen=True)
class Target:
    """The machine that a plan is for.

    Attributes:
        kind: "cuda" or "cpu" (or another torch device type).
        arch: "sm80", "sm90", "sm100", …, or "cpu".
        name: what the device calls itself.
        sms: streaming multiprocessors (CUDA) or threads (CPU).
        bandwidth: bytes a second that a copy reaches (read + written), for floors; 0 where unknown.
        l2_bandwidth: bytes a second that all multiprocessors together read from the L2, for estimates; 0 where unknown.
        flops: arithmetic rate for `floor_ms`, by dtype name; missing where unknown.
        triton: Triton's version as (major, minor), or None where it cannot be imported.
        on_paper: true when no such device is here: nothing can run or be measured, tables decide.
    """

    kind: str
    arch: str
    name: str = ""
    sms: int = 1
    bandwidth: float = 0.0
    l2_bandwidth: float = 0.0
    flops: tuple[tuple[str, float], ...] = ()
    triton: tuple[int, int] | None = None
    on_paper: bool = False

    @property
    def capability(self) -> int:
        """90 for "sm90"; 0 where it is no CUDA device."""
        return int(self.arch[2:]) if self.arch.startswith("sm") and self.arch[2:].isdigit() else 0

    def rate(self, dtype: torch.dtype) -> float:
        """Arithmetic operations a second in this type; 0 where unknown."""
        return dict(self.flops).get(dtype_name(dtype), 0.0)

    def l2_ms(self, nbytes: int) -> float:
        """For all multiprocessors together to read so much from the L2; 0 where its bandwidth is unknown."""
        return 1e3 * nbytes / self.l2_bandwidth if self.l2_bandwidth else 0.0

    def floor_ms(self, problem: Problem) -> float | None:
        """max(bytes / bandwidth, flops / arithmetic rate), or None where the device's rates are unknown."""
        rate = self.rate(problem.dtype)
        if not self.bandwidth or not rate:
            return None
        return 1e3 * max(problem.bytes / self.bandwidth, problem.flops / rate)


def _extent(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _one(pair: tuple[int, int]) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"
