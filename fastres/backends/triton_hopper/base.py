"""What the Hopper candidates share: who may run them, TMA descriptors, the bound kernel call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastres.graph.fold import LayerParameters
from fastres.plan.candidate import Candidate
from fastres.plan.problem import ConvSpec, Problem, Target, dtype_name

# 227 KB a block on compute capability 9.0 (CUDA C++ Programming Guide, table of compute capabilities).
SHARED_MEMORY = 232_448
# Bytes of barriers and tickets, and what alignment costs: an upper bound.
BARRIERS = 1024
# Constants that tiles read past the last channel are padded to a multiple of the widest tile.
_PADDED = 256
# Up to so many tiles a block they are shared out evenly instead of claimed: the scheduler runs a few tickets ahead, so
# that a block which starts early takes a tile of another's share. One H100, batch 256: three tiles a block (256 ->
# 1024 -> 256 at 14x14) 124 us evenly, 129 claimed; from twelve on claiming was faster each time (128 -> 512 -> 128 at
# 28x28 200 against 197, 256 -> 64 at 56x56 174 against 171, 3x3 64 -> 64 91 against 88, 64 -> 256 with a residual 343
# against 316). What lies between is not measured.
FEW_TILES = 8


@dataclass(frozen=True)
class Call:
    """A kernel with its arguments resolved; calling it launches it on the current stream."""

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    options: dict[str, int]

    def __post_init__(self):
        # Triton skips an empty grid without a word: the output would be whatever was there.
        if self.grid < 1:
            raise ValueError(
                f"grid: {self.grid} blocks, where a device has fewer multiprocessors than tile columns"
            )

    def __call__(self) -> None:
        self.kernel[(self.grid,)](**self.arguments, **self.options)


class HopperCandidate(Candidate):
    """Subclasses name their kernel in `kernel` and build its `Call` in `call`."""

    backend = "hopper"
    # Share of the roofline that its prototype reached, for `estimate_ms`.
    efficiency = 0.85

    def accepts(self, problem: Problem, target: Target) -> str | None:
        return unfit(problem, target) or self.refuses(problem, target)

    def refuses(self, problem: Problem, target: Target) -> str | None:
        """The reason why this kernel cannot compute `problem` on a Hopper with a known Triton; None if it
        can."""
        raise NotImplementedError

    def estimate_ms(self, problem: Problem, target: Target) -> float:
        """3 us more for filling and draining a persistent kernel's pipeline (an assumption)."""
        return super().estimate_ms(problem, target) + 3e-3

    def call(self, problem: Problem, config: Any, buffers: Any, constants: Any) -> Call:
        raise NotImplementedError

    def kernels(self, problem: Problem, config: Any, buffers: Any, constants: Any):
        call = self.call(problem, config, buffers, constants)
        return [(call.kernel, call.arguments, call.options)]

    def bind(self, problem: Problem, config: Any, buffers: Any, constants: Any) -> Call:
        return self.call(problem, config, buffers, constants)


def steps_ms(
    tiles: int, steps: int, products: int, problem: Problem, target: Target, per_sm: int = 1
) -> float:
    """`tiles` shared among all blocks, each of `steps` ring steps of `products` multiply-adds; a step of
    TMA and barriers takes 0.2 us at least (an assumption: 128 x 64 products of 64 take that)."""
    rate = target.rate(problem.dtype) / target.sms
    if not rate:
        return 0.0
    return -(-tiles // (target.sms * per_sm)) * steps * max(2e3 * products * per_sm / rate, 2e-4)


def unfit(problem: Problem, target: Target) -> str | None:
    if target.kind != "cuda":
        return f"needs a CUDA device, this is {target.kind}"
    if target.capability != 90:
        return f"needs compute capability 9.0 (TMA, wgmma), this is {target.arch}"
    if target.triton is None:
        return "needs Triton, which is not installed"
    if target.triton < (3, 6):
        return f"needs Triton 3.6 or newer, this is {target.triton[0]}.{target.triton[1]}"
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bf16 and fp16, this is {dtype_name(problem.dtype)}"
    return None


def unfit_layer(spec: ConvSpec) -> str | None:
    """What no Hopper kernel of this project computes."""
    if spec.n * max(spec.h * spec.w, spec.p * spec.q) >= 2**31:
        return "more than 2^31 pixels: a TMA coordinate has 32 bits"
    if spec.groups != 1:
        return f"{spec.groups} groups: computes dense convolutions only"
    if spec.act.kind == "gelu":
        return "gelu: erf spills registers beside the accumulators"
    if spec.c % 8 or spec.k % 8:
        return f"{spec.c} -> {spec.k} channels: TMA takes rows of whole 16 bytes, multiples of 8 channels"
    return None


@cache
def multiprocessors(device: torch.device) -> int:
    """How many the device has; 132, an H100's, where there is no device (descriptors in tests)."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def claims(tiles: int, blocks: int) -> int:
    """1 if `blocks` claim their tiles from a counter, 0 if each takes every `blocks`-th."""
    return int(tiles > FEW_TILES * blocks)


def descriptor(tensor: Tensor, shape: list[int], block: list[int], strides: list[int] | None = None) -> Any:
    """A TMA descriptor of `tensor`'s memory seen as `shape` (contiguous unless `strides`), in boxes of
    `block`."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    if strides is None:
        strides = [1]
        for size in reversed(shape[1:]):
            strides.insert(0, strides[0] * size)
    layout = NVMMASharedLayout(
        min(128, block[-1] * tensor.element_size()), 8 * tensor.element_size(), len(block)
    )
    return TensorDescriptor(tensor, list(shape), list(strides), list(block), layout)


def memory(activation: Tensor) -> Tensor:
    """A channels_last activation [N, C, H, W] as its bytes lie: contiguous [N, H, W, C]."""
    return activation.permute(0, 2, 3, 1)


def padded(vector: Tensor) -> Tensor:
    """fp32 with zeros up to a multiple of the widest tile: tiles read it without a mask."""
    return torch.nn.functional.pad(vector.float(), (0, -vector.numel() % _PADDED)).contiguous()


def krsc(weight: Tensor, dtype: torch.dtype, slab: int = 1) -> Tensor:
    """[K, C, R, S] → [K, R * S * C'] in `dtype`, each tap's channels padded with zeros to a multiple of
    `slab`."""
    weight = weight.permute(0, 2, 3, 1).to(dtype)
    weight = torch.nn.functional.pad(weight, (0, -weight.shape[-1] % slab))
    return weight.reshape(weight.shape[0], -1).contiguous()


@dataclass(frozen=True)
class Layer:
    """One convolution's constants: weights [K, R * S * C'] in the compute type, fp32 scale and shift."""

    weight: Tensor
    scale: Tensor
    shift: Tensor


def prepare_layer(parameters: LayerParameters, dtype: torch.dtype, slab: int) -> Layer:
    """The original weights, rounded once; BN stays in fp32 in the epilogue, which is more exact than
    folding it."""
    scale, shift = parameters.scale_shift()
    return Layer(krsc(parameters.weight, dtype, slab), padded(scale), padded(shift))


def prepare_folded(parameters: LayerParameters, dtype: torch.dtype, slab: int) -> Layer:
    """BN folded into the weights in fp32 and rounded once: for accumulators that take two inputs."""
    weight, shift = parameters.folded()
    return Layer(krsc(weight, dtype, slab), padded(torch.ones_like(shift)), padded(shift))


def prepare_layers(
    problem: Problem, parameters: Mapping[str, LayerParameters], slab: int = 64
) -> dict[str, Layer]:
    return {
        role: prepare_layer(parameters[role], problem.dtype, slab)
        for role, spec in problem.layers
        if isinstance(spec, ConvSpec)
    }


def fold_shortcut(
    layers: dict[str, Layer], parameters: Mapping[str, LayerParameters], dtype: torch.dtype
) -> dict[str, Layer]:
    """`layers` for kernels in which one accumulator takes the expand and the projection, if there is one: their
    scales go into the weights, the shifts into one."""
    if "shortcut" not in layers:
        return layers
    shortcut, expand = (prepare_folded(parameters[role], dtype, 64) for role in ("shortcut", "expand"))
    return {**layers, "shortcut": shortcut, "expand": replace(expand, shift=expand.shift + shortcut.shift)}


def layer_arguments(spec: ConvSpec, layer: Layer, suffix: str) -> dict:
    """A layer's epilogue, as the kernels' parameters of that suffix."""
    return {
        f"scale_{suffix}": layer.scale,
        f"shift_{suffix}": layer.shift,
        f"slope_{suffix}": float(spec.act.param),
        f"ACT_{suffix.upper()}": spec.act.code,
    }
