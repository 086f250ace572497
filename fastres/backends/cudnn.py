"""cuDNN through ATen's fused calls: conv + bias + ReLU, and conv + bias + residual + ReLU, in one kernel each.

It has cliffs, met here by the form of the call (measured on an H100, batch 256, bf16): the 7x7 stem on three channels
takes 2.9 ms where a convolution of its size takes 0.3, so the stem is rearranged; a convolution without ReLU adds its
bias in a pass of its own (the two calls of a projection block at 56x56: 1,112 us where the one with ReLU takes 333), so
a projection's bias moves into the expand's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.backends.reference import layer
from fastres.graph.fold import LayerParameters
from fastres.plan.candidate import LAUNCH_MS, Candidate, Work, register
from fastres.plan.pattern import CONV_BN_ACT, DUAL, STEM_POOL
from fastres.plan.problem import ConvSpec, Problem, Target, dtype_name

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class CuDnn(Candidate):
    backend = "cudnn"
    allocates = True
    # its fused kernels take 1.02 to 1.9 times their floor, layer by layer (measured on an H100, batch 256, bf16)
    efficiency = 0.75

    def accepts(self, problem: Problem, target: Target) -> str | None:
        if target.kind != "cuda":
            return "it needs an NVIDIA GPU"
        if problem.dtype not in _DTYPES:
            return f"it takes fp16, bf16 and fp32, not {dtype_name(problem.dtype)}"
        if target.on_paper:
            return None
        if torch.version.hip is not None or not torch.backends.cudnn.is_available():
            return "this PyTorch has no cuDNN"
        return None if torch.backends.cudnn.enabled else "torch.backends.cudnn.enabled is off"


# Tiles that cuDNN is assumed to choose from.
_TILES = ((256, 128), (128, 128), (128, 64), (64, 64))


def product_ms(spec: ConvSpec, problem: Problem, target: Target) -> float:
    """The convolution as a matrix product, in the best of `_TILES`."""
    if spec.groups != 1:
        return 0.0
    m, depth = spec.n * spec.p * spec.q, spec.weight_elements // spec.k
    cuts = [Work.product(m, spec.k, depth, *tile, problem.dtype.itemsize) for tile in _TILES]
    return min(work.ms(problem, target) for work in cuts)


class ConvBnAct(CuDnn):
    name = "cudnn.conv_bn_act"
    pattern = CONV_BN_ACT
    source = "torch.ops.aten.cudnn_convolution_relu, cudnn_convolution_add_relu"

    def accepts(self, problem: Problem, target: Target) -> str | None:
        if problem["conv"].act.kind != "relu":
            return "cuDNN fuses ReLU and no other activation"
        return super().accepts(problem, target)

    def busiest_ms(self, problem: Problem, target: Target) -> float:
        return product_ms(problem["conv"], problem, target)

    def prepare(self, problem: Problem, config, parameters: Mapping[str, LayerParameters]):
        return _folded(parameters["conv"], problem.dtype)

    def bind(self, problem: Problem, config, buffers, constants):
        weight, bias = constants
        return _fused(problem["conv"], weight, bias)


class Dual(CuDnn):
    """Two calls; the projection runs without bias, so that nothing passes over its output but the expand's kernel."""

    name = "cudnn.dual"
    pattern = DUAL
    source = "torch.ops.aten.cudnn_convolution, cudnn_convolution_add_relu"

    def accepts(self, problem: Problem, target: Target) -> str | None:
        if problem["expand"].act.kind != "relu":
            return "cuDNN fuses ReLU and no other activation"
        return super().accepts(problem, target)

    def busiest_ms(self, problem: Problem, target: Target) -> float:
        return sum(product_ms(problem[role], problem, target) for role in ("shortcut", "expand"))

    def estimate_ms(self, problem: Problem, target: Target) -> float:
        # the projection's output is written and read, unlike the floor's
        return 2 * super().estimate_ms(problem, target)

    def prepare(self, problem: Problem, config, parameters: Mapping[str, LayerParameters]):
        shortcut, shift = parameters["shortcut"].folded()
        expand, bias = parameters["expand"].folded()
        dtype = problem.dtype
        return _nhwc(shortcut, dtype), _nhwc(expand, dtype), (shift + bias).to(dtype)

    def bind(self, problem: Problem, config, buffers, constants):
        projection, expand_weight, bias = constants
        spec = problem["shortcut"]
        expand = _fused(problem["expand"], expand_weight, bias)
        swap = problem.inputs.index("expand.x") == 0

        def launch(a: Tensor, b: Tensor) -> Tensor:
            x, hidden = (b, a) if swap else (a, b)
            shortcut = F.conv2d(x, projection, None, spec.stride, spec.padding, spec.dilation)
            return expand(hidden, shortcut)

        return launch


@dataclass(frozen=True)
class StemConfig:
    """How the stem's few channels are laid out.

    Attributes:
        form: "plain"; "padded": zero channels up to `channels`; "depth": each 2x2 square of pixels becomes one pixel of
            four times the channels (padded to `channels`), which turns a stride-2 RxS filter into a stride-1 one
            of half the size.
        channels: channels of the rearranged input.
    """

    form: str = "depth"
    channels: int = 16


class StemPool(CuDnn):
    """Rearranged conv + bias + ReLU, then PyTorch's max pool."""

    name = "cudnn.stem_pool"
    pattern = STEM_POOL
    source = "torch.ops.aten.cudnn_convolution_relu, torch.nn.functional.max_pool2d"

    def accepts(self, problem: Problem, target: Target) -> str | None:
        spec = problem["conv"]
        if spec.act.kind != "relu" or spec.residual:
            return "cuDNN fuses ReLU and no other activation"
        if spec.c > 4 or spec.groups != 1:
            return "it is for images of up to 4 channels"
        return super().accepts(problem, target)

    def configs(self, problem: Problem, target: Target):
        spec = problem["conv"]
        others = (StemConfig("padded", 8), StemConfig("padded", 4), StemConfig("plain", spec.c))
        # unmeasured: chosen because the rearranged filter has 4x4x16 products where cuDNN's kernels are fast
        return (StemConfig("depth", 16), *others) if can_rearrange(spec) else others

    def estimate_ms(self, problem: Problem, target: Target) -> float:
        # the convolution's output is written and read; the images are copied, and the pool is a launch of its own
        spec = problem["conv"]
        hidden = 2 * spec.n * spec.k * spec.p * spec.q * problem.dtype.itemsize
        passes = 1e3 * hidden / target.bandwidth if target.bandwidth else 0.0
        return super().estimate_ms(problem, target) + passes + 2 * LAUNCH_MS

    def prepare_key(self, problem: Problem, config):
        return problem.dtype, config

    def prepare(self, problem: Problem, config, parameters: Mapping[str, LayerParameters]):
        weight, shift = parameters["conv"].folded()
        normalize = parameters.get("normalize")
        statistics = () if normalize is None else (normalize.mean, normalize.std)
        return _nhwc(stem_weight(weight, config), problem.dtype), shift.to(problem.dtype), statistics

    def bind(self, problem: Problem, config, buffers, constants):
        weight, bias, statistics = constants
        conv, pool, normalize = problem["conv"], problem["pool"], problem.get("normalize")
        spec = rearranged(conv, config)
        fused = _fused(spec, weight, bias)

        def launch(x: Tensor) -> Tensor:
            if normalize is not None:
                x = layer(normalize, x, None, statistics, problem.dtype)
            return layer(pool, fused(rearrange(x, conv, config)), None, (), problem.dtype)

        return launch


def can_rearrange(spec: ConvSpec) -> bool:
    """Whether 2x2 squares can become pixels: stride 2, no dilation, and sizes that come out even."""
    return spec.stride == (2, 2) and spec.dilation == (1, 1) and spec.h % 2 == 0 and spec.w % 2 == 0


def rearranged(spec: ConvSpec, config: StemConfig) -> ConvSpec:
    """The convolution that computes `spec` on the rearranged input."""
    if config.form != "depth":
        return ConvSpec(
            spec.n,
            config.channels,
            spec.h,
            spec.w,
            spec.k,
            spec.kernel,
            spec.stride,
            spec.padding,
            act=spec.act,
        )
    kernel = tuple(-(-extent // 2) for extent in spec.kernel)
    # squares of the padded input, as many as the filter reads
    height, width = spec.p + kernel[0] - 1, spec.q + kernel[1] - 1
    return ConvSpec(spec.n, config.channels, height, width, spec.k, kernel, act=spec.act)


def stem_weight(weight: Tensor, config: StemConfig) -> Tensor:
    """[K, C, R, S] for the rearranged input."""
    k, c, r, s = weight.shape
    if config.form != "depth":
        return F.pad(weight, (0, 0, 0, 0, 0, config.channels - c))
    weight = F.pad(weight, (0, s % 2, 0, r % 2))
    squares = weight.view(k, c, (r + r % 2) // 2, 2, (s + s % 2) // 2, 2)
    # a pixel's channels: row in the square, column in the square, channel
    depth = squares.permute(0, 3, 5, 1, 2, 4).reshape(k, 4 * c, (r + r % 2) // 2, (s + s % 2) // 2)
    return F.pad(depth, (0, 0, 0, 0, 0, config.channels - 4 * c))


def rearrange(x: Tensor, spec: ConvSpec, config: StemConfig) -> Tensor:
    """The images [N, C, H, W] as the rearranged convolution reads them, channels_last."""
    if config.form == "plain":
        return x
    n, c, h, w = x.shape
    if config.form == "padded":
        made = x.new_zeros(n, h, w, config.channels)
        made[..., :c] = x.permute(0, 2, 3, 1)
        return made.permute(0, 3, 1, 2)
    new = rearranged(spec, config)
    padded = x.new_zeros(n, 2 * new.h, 2 * new.w, c)
    top, left = spec.padding
    rows, columns = min(h, 2 * new.h - top), min(w, 2 * new.w - left)
    padded[:, top : top + rows, left : left + columns] = x.permute(0, 2, 3, 1)[:, :rows, :columns]
    made = x.new_zeros(n, new.h, new.w, config.channels)
    squares = padded.view(n, new.h, 2, new.w, 2, c).permute(0, 1, 3, 2, 4, 5)
    made[..., : 4 * c] = squares.reshape(n, new.h, new.w, 4 * c)
    return made.permute(0, 3, 1, 2)


def _folded(parameters: LayerParameters, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight, shift = parameters.folded()
    return _nhwc(weight, dtype), shift.to(dtype)


def _nhwc(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).contiguous(memory_format=torch.channels_last)


def _fused(spec: ConvSpec, weight: Tensor, bias: Tensor):
    """A callable (x[, residual]) → y over cuDNN's fused call."""
    window = (list(spec.stride), list(spec.padding), list(spec.dilation), spec.groups)
    if spec.residual:
        conv_add_relu = torch.ops.aten.cudnn_convolution_add_relu.default
        return lambda x, residual: conv_add_relu(x, weight, residual, 1.0, bias, *window)
    conv_relu = torch.ops.aten.cudnn_convolution_relu.default
    return lambda x: conv_relu(x, weight, bias, *window)


register(ConvBnAct())
register(Dual())
register(StemPool())
