"""C++ CPU kernels of kernels/cpu, built at first use (fastres/native.py)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastres import native
from fastres.graph.fold import LayerParameters
from fastres.plan.candidate import Candidate, register
from fastres.plan.context import nhwc_strides
from fastres.plan.pattern import CONV_BN_ACT, GLOBAL_AVG_POOL, MAX_POOL, Pattern
from fastres.plan.problem import ConvSpec, Problem, Target, dtype_name


class Pool(Candidate):
    backend = "cpu"
    source = "kernels/cpu"
    allocates = True
    efficiency = 1.0

    def __init__(self, name: str, pattern: Pattern):
        self.name, self.pattern = name, pattern

    def accepts(self, problem: Problem, target: Target) -> str | None:
        if target.kind != "cpu":
            return "it runs on the CPU only"
        return None if target.on_paper else native.available("cpu")

    def bind(self, problem: Problem, config, buffers, constants):
        from fastres.backends import cpu_ops

        spec, dtype = problem["pool"], problem.dtype
        shape, strides = spec.y_shape, nhwc_strides(spec.y_shape)
        if spec.kernel is None:
            window = ()
            flat = (spec.n, spec.c)
            call = cpu_ops.global_avg_pool
        else:
            window = (spec.kernel, spec.stride, spec.padding, spec.dilation)
            flat = None
            call = cpu_ops.max_pool2d

        def launch(x: Tensor) -> Tensor:
            y = torch.empty_strided(shape, strides, dtype=dtype)
            call(x, *window, y if flat is None else y.view(flat))
            return y

        return launch


class WinogradConvBnAct(Candidate):
    """3x3 convolutions in fp32 with 2.25 times fewer multiplications, within PyTorch's own rounding."""

    name = "cpu.winograd_conv_bn_act"
    backend = "cpu"
    pattern = CONV_BN_ACT
    source = "kernels/cpu"
    allocates = True
    efficiency = 1.0

    def accepts(self, problem: Problem, target: Target) -> str | None:
        spec = problem["conv"]
        if target.kind != "cpu":
            return "it runs on the CPU only"
        if problem.dtype != torch.float32:
            return f"it takes fp32, not {dtype_name(problem.dtype)}: 16 bits would not hold its transforms"
        if (spec.kernel, spec.stride, spec.dilation, spec.groups) != ((3, 3), (1, 1), (1, 1), 1):
            return "it takes 3x3 convolutions of stride 1, without dilation or groups"
        if spec.c < _WINOGRAD_CHANNELS:
            return f"with fewer than {_WINOGRAD_CHANNELS} input channels its transforms round more than the sums do"
        return None if target.on_paper else native.available("cpu")

    def estimate_ms(self, problem: Problem, target: Target) -> float:
        return super().estimate_ms(problem, target) * winograd_cost(problem["conv"], target.sms)

    def prepare(self, problem: Problem, config, parameters: Mapping[str, LayerParameters]):
        from fastres.backends import cpu_ops

        scale, shift = parameters["conv"].scale_shift()
        weight = parameters["conv"].weight.double() * scale.double().view(-1, 1, 1, 1)
        k, c = weight.shape[:2]
        packed = torch.empty(16 * c * (-(-k // 16) * 16), dtype=torch.float32)
        cpu_ops.winograd_pack(weight.contiguous(), packed)
        return packed, shift.float()

    def bind(self, problem: Problem, config, buffers, constants):
        from fastres.backends import cpu_ops

        spec = problem["conv"]
        packed, shift = constants
        act, param, padding = spec.act.code, spec.act.param, spec.padding
        shape, strides = spec.y_shape, nhwc_strides(spec.y_shape)
        in_place = "conv.residual" in buffers.donated

        def launch(x: Tensor, residual: Tensor | None = None) -> Tensor:
            y = residual if in_place else torch.empty_strided(shape, strides, dtype=torch.float32)
            cpu_ops.winograd_conv_bn_act(x, packed, shift, residual, act, param, padding, y)
            return y

        return launch


# From here on its error is at most 1.5 times PyTorch's own (1.1 at 8 channels after a ReLU, 2.1 at one).
_WINOGRAD_CHANNELS = 8


def winograd_cost(spec: ConvSpec, threads: int) -> float:
    """Time of Winograd's convolution as a share of the direct one's, a tenth too high to be sure of what it promises.

    Counted in multiplications of one channel pair. A tile of 2x2 outputs takes 16, transforms cost as many as 100
    input and 80 output channels, reading weights from beyond the L2 cache as much as 2 tiles; direct convolution
    takes as many as there are taps inside the image; the calls themselves cost 7 and 25 us. Fitted to one thread of a
    Zen 4 core with AVX-512, 130 shapes from 1x1 to 56x56 and from 16 to 512 channels.
    """
    tiles = spec.n * -(-spec.p // 2) * -(-spec.q // 2)
    k = -(-spec.k // 16) * 16
    ours = tiles * (16 * spec.c * k + 100 * spec.c + 80 * k)
    if 64 * spec.c * k > 1 << 20:
        ours += 32 * spec.c * k
    # pieces of the least size that threads can share
    pieces = -(-tiles // 6) * -(-k // 64)
    ours *= -(-pieces // threads) * threads / pieces if pieces < 8 * threads else 1
    direct = spec.n * _taps(spec.h, spec.p, spec.padding[0]) * _taps(spec.w, spec.q, spec.padding[1])
    return (1.1 * ours + 400_000) / (direct * spec.c * spec.k + 1_400_000)


def _taps(size: int, extent: int, padding: int) -> int:
    """Pairs of an output position and one of three taps that lie inside the image, along one axis."""
    return sum(0 <= at - padding + tap < size for at in range(extent) for tap in range(3))


register(Pool("cpu.max_pool", MAX_POOL))
register(Pool("cpu.global_avg_pool", GLOBAL_AVG_POOL))
register(WinogradConvBnAct())
