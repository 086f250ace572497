"""Hopper candidates that compute one output tile by tile: hopper.conv_bn_act and hopper.dual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from fastres.backends.triton_hopper_common import (
    SHARED_MEMORY,
    Call,
    HopperCandidate,
    Layer,
    descriptor,
    memory,
    multiprocessors,
    prepare_folded,
    prepare_layer,
    steps_ms,
    unfit_layer,
)
from fastres.graph.fold import LayerParameters
from fastres.plan.candidate import Buffers, register
from fastres.plan.pattern import CONV_BN_ACT, DUAL
from fastres.plan.problem import ConvSpec, Problem, Target
from fastres.tuning.config import Config

_BARRIERS = 1024  # bytes of barriers and tickets, and what alignment costs: an upper bound


@dataclass(frozen=True)
class GemmConfig(Config):
    """Tiles and pipeline of the implicit GEMM.

    Attributes:
        block_m, block_n: pixels and output channels of a tile.
        stages: of the ring that inputs and weights pass through.
        consumers: 1, or 2 groups that multiply alternate tiles.
        warps: of each consumer group, 4 or 8.
        staged: output buffers a group.
        stationary: the block's weights stay in shared memory.
        skip: taps wholly in the padding are left out (static tiles).
        per_sm: blocks a multiprocessor; 2 limits registers to 128 a thread.
    """

    block_m: int = 128
    block_n: int = 128
    stages: int = 4
    consumers: int = 2
    warps: int = 4
    staged: int = 1
    stationary: bool = False
    skip: bool = False
    per_sm: int = 1

    def shared_bytes(self, taps: int, channels: int, slab: int) -> int:
        weights = taps * -(-channels // slab) if self.stationary else self.stages
        output = self.consumers * self.staged * self.block_m * self.block_n
        return 2 * (slab * (self.stages * self.block_m + weights * self.block_n) + output) + _BARRIERS

    @property
    def folds(self) -> bool:
        """Whether the weights carry BN's scale: 4 warps by 256 channels have no registers for it (Triton
        3.6 spills)."""
        return self.block_n == 256 and self.warps == 4

    def kernel_arguments(self) -> dict[str, int]:
        # 4-warp consumers of 128 x 128 hold 128 accumulators a thread; with 8 warps the register file ends
        # at 152.
        return {
            "CONSUMERS": self.consumers,
            "STAGED": self.staged,
            "STAGES": self.stages,
            "DYNAMIC": int(not self.skip),
            "CONSUMER_REGS": 240 if self.warps == 4 else 152,
            "PRODUCER_REGS": 40,
        }

    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, **({"maxnreg": 128} if self.per_sm == 2 else {})}


# One H100, batch 256, bf16, prototypes of this kernel with static tiles, the fastest of 13 (1x1) or 10 (3x3).
_WIDE = GemmConfig(128, 256, stages=3, consumers=1, warps=8)
_NARROW = GemmConfig(128, 64, stages=3, consumers=1, per_sm=2)
_PING_PONG = GemmConfig(128, 128, stages=4)
_RESIDENT = GemmConfig(128, 64, stages=4, staged=2, stationary=True)
_PICKS: dict[tuple[int, int, int, int, bool], GemmConfig] = {
    # (c, k, r, stride, residual): config                              us against cuDNN's
    (64, 64, 1, 1, False): _NARROW,  # 78.0 / 77.1
    (256, 64, 1, 1, False): _RESIDENT,  # 172.7 / 177.8
    (64, 256, 1, 1, True): GemmConfig(64, 256, stages=4, staged=2, stationary=True),  # 316 (dynamic) / 332.9
    (64, 256, 1, 1, False): GemmConfig(64, 256, stages=3),  # 198.8 / 782.4
    (256, 128, 1, 1, False): _NARROW,  # 220.0 / 211.1
    (128, 512, 1, 1, True): _RESIDENT,  # 169.3 / 167.4
    (512, 128, 1, 1, False): GemmConfig(128, 64, stages=6, staged=2),  # 89.8 / 92.2
    (512, 256, 1, 1, False): _WIDE,  # 119.1 / 116.1
    (256, 1024, 1, 1, True): GemmConfig(128, 128, stages=4, stationary=True),  # 86 / 92
    (1024, 512, 1, 1, False): _WIDE,  # 85 / 83
    (512, 1024, 1, 2, False): _WIDE,
    (64, 64, 3, 1, False): _RESIDENT,  # 137.3 / 148.7; hopper.halo 88
    (256, 256, 3, 1, False): _WIDE,  # 80 / 80
    (512, 512, 3, 1, False): GemmConfig(128, 128, stages=4, skip=True),  # 74 / 81
}
# What `fastres tune` tries beside the pick: the prototypes' sweep.
_SWEEP = (
    _PING_PONG,
    GemmConfig(128, 128, stages=2, consumers=1, per_sm=2),
    _WIDE,
    GemmConfig(256, 128, stages=3, consumers=1, warps=8),
    GemmConfig(128, 64, stages=6, staged=2),
    _NARROW,
    GemmConfig(64, 256, stages=3),
    GemmConfig(64, 64, stages=6, staged=2),
    GemmConfig(128, 128, stages=4, staged=2, stationary=True),
    GemmConfig(128, 128, stages=4, stationary=True),
    GemmConfig(64, 256, stages=4, staged=2, stationary=True),
    _RESIDENT,
    GemmConfig(128, 256, stages=4, consumers=1, warps=8, stationary=True),
    GemmConfig(128, 128, stages=4, skip=True),
)


@dataclass(frozen=True)
class Tiling:
    """Output tiles over [n, h, w] pixels (as the kernel is told them) and the shape of one."""

    extent: tuple[int, int, int]
    tile: tuple[int, int, int]

    @property
    def counts(self) -> tuple[int, int, int]:
        return tuple(-(-size // block) for size, block in zip(self.extent, self.tile, strict=True))

    @property
    def tiles(self) -> int:
        n, h, w = self.counts
        return n * h * w


@cache
def tile_of(n: int, p: int, q: int, pixels: int) -> Tiling:
    """The tile of `pixels` (a power of two) that covers [n, p, q] with the fewest tiles; among those the
    one that spans most of one image, then the squarest, whose taps share most input. A TMA box has at most
    256 a side."""
    best = None
    for th in _powers(pixels):
        for tw in _powers(pixels // th):
            tiling = Tiling((n, p, q), (pixels // th // tw, th, tw))
            if max(tiling.tile) > 256:
                continue
            rank = (tiling.tiles, -th * tw, th + tw)
            if best is None or rank < best[0]:
                best = rank, tiling
    return best[1]


def _powers(limit: int) -> list[int]:
    return [1 << i for i in range(limit.bit_length())]


def _tiling(spec: ConvSpec, config: GemmConfig) -> Tiling:
    if spec.pointwise:
        # Rows of all images are one dimension, so that the batch size is no constant of the kernel.
        if spec.stride == (1, 1):
            return Tiling((spec.n * spec.p * spec.q, 1, 1), (config.block_m, 1, 1))
        tiling = tile_of(1, spec.n * spec.p, spec.q, config.block_m)
        (_, rows, q), (_, th, tw) = tiling.extent, tiling.tile
        return Tiling((rows, 1, q), (th, 1, tw))
    if config.skip:
        return Tiling((spec.n, spec.p, spec.q), (config.block_m, 1, 1))
    return tile_of(spec.n, spec.p, spec.q, config.block_m)


def _slab(channels: int) -> int:
    """Channels of one ring stage: one 128-byte swizzle row, or half of one for up to 32 channels."""
    return 64 if channels > 32 else 32


def _unfit_geometry(spec: ConvSpec) -> str | None:
    if spec.stride not in ((1, 1), (2, 2)):
        return f"stride {spec.stride[0]}x{spec.stride[1]}: takes 1 and 2"
    if spec.dilation[0] != spec.dilation[1]:
        return "dilation differs along height and width"
    if spec.kernel[0] * spec.kernel[1] > 49:
        return f"kernel {spec.kernel[0]}x{spec.kernel[1]}: takes up to 7x7"
    if spec.stride == (2, 2):
        if spec.h % 2 or spec.w % 2:
            return f"stride 2 over {spec.h}x{spec.w}: its TMA view takes even heights and widths"
        if spec.c % _slab(spec.c):
            return f"stride 2 with {spec.c} channels: its TMA view takes multiples of {_slab(spec.c)}"
    return None


def _input(x, spec: ConvSpec, tiling: Tiling, slab: int):
    """x's descriptor: [n, h, w, c], or at stride 2 [n, h/2, 2, w/2, 2c]; pointwise, rows of all images in
    n's place."""
    n, h, w, c = spec.n, spec.h, spec.w, spec.c
    tn, th, tw = tiling.tile
    if spec.stride == (1, 1):
        shape = [n * h * w, 1, 1, c] if spec.pointwise else [n, h, w, c]
        return descriptor(memory(x), shape, [tn, th, tw, slab])
    shape = [n * h // 2, 1, 2, w // 2, 2 * c] if spec.pointwise else [n, h // 2, 2, w // 2, 2 * c]
    return descriptor(memory(x), shape, [tn, th, 1, tw, slab])


def _output(y, spec: ConvSpec, tiling: Tiling, channels: int, block: int):
    return descriptor(memory(y), [*tiling.extent, channels], [*tiling.tile, block])


class HopperConv(HopperCandidate):
    name = "hopper.conv_bn_act"
    pattern = CONV_BN_ACT
    source = "kernels/triton/hopper_conv_bn_act.py"

    def refuses(self, problem: Problem, target: Target) -> str | None:
        spec = problem["conv"]
        reason = unfit_layer(spec) or _unfit_geometry(spec)
        return reason or (None if self.configs(problem, target) else "no tile fits into shared memory")

    def configs(self, problem: Problem, target: Target) -> Sequence[GemmConfig]:
        spec = problem["conv"]
        picked = _PICKS.get((spec.c, spec.k, spec.kernel[0], spec.stride[0], spec.residual), _default(spec))
        choices = dict.fromkeys((picked, _default(spec), *_SWEEP))
        return tuple(config for config in choices if _fits(spec, config))

    def busiest_ms(self, problem: Problem, target: Target) -> float:
        spec, config = problem["conv"], self.configs(problem, target)[0]
        taps = spec.kernel[0] * spec.kernel[1]
        return _busiest_ms(problem, target, spec, spec.k, config, taps * -(-spec.c // _slab(spec.c)))

    def counters(self, problem: Problem, config: GemmConfig) -> int:
        return -(-problem["conv"].k // config.block_n) if config.stationary else 1

    def prepare(
        self, problem: Problem, config: GemmConfig, parameters: Mapping[str, LayerParameters]
    ) -> Layer:
        make = prepare_folded if config.folds else prepare_layer
        return make(parameters["conv"], problem.dtype, _slab(problem["conv"].c))

    def prepare_key(self, problem: Problem, config: GemmConfig):
        return problem.dtype, config.folds

    def call(self, problem: Problem, config: GemmConfig, buffers: Buffers, constants: Layer) -> Call:
        from fastres.kernels.triton.hopper_conv_bn_act import conv_bn_act_kernel

        spec = problem["conv"]
        x, y, z = buffers["conv.x"], buffers["conv"], buffers.get("conv.residual")
        slab, tiling = _slab(spec.c), _tiling(spec, config)
        columns = -(-spec.k // config.block_n)
        tiles = tiling.tiles * columns
        blocks = multiprocessors(x.device) * config.per_sm
        step = columns if config.stationary else 1
        y_desc = _output(y, spec, tiling, spec.k, config.block_n)
        arguments = {
            "counter": buffers.counters,
            "x_desc": _input(x, spec, tiling, slab),
            "w_desc": descriptor(constants.weight, list(constants.weight.shape), [config.block_n, slab]),
            "z_desc": y_desc if z is None else _output(z, spec, tiling, spec.k, config.block_n),
            "y_desc": y_desc,
            "scale": constants.scale,
            "shift": constants.shift,
            "slope": float(spec.act.param),
            "tiles": tiles,
            "columns": columns,
            "C": spec.c,
            "R": spec.kernel[0],
            "S": spec.kernel[1],
            "STRIDE": spec.stride[0],
            "DILATION": spec.dilation[0],
            "PAD_H": spec.padding[0],
            "PAD_W": spec.padding[1],
            **dict(zip(("TN", "TH", "TW"), tiling.tile, strict=True)),
            "BN": config.block_n,
            "BK": slab,
            "NTH": tiling.counts[1],
            "NTW": tiling.counts[2],
            "RESIDUAL": int(spec.residual),
            "ACT": spec.act.code,
            "STATIONARY": int(config.stationary),
            "SKIP": int(config.skip),
            "SCALED": int(not config.folds),
            **config.kernel_arguments(),
        }
        return Call(conv_bn_act_kernel, min(blocks // step * step, tiles), arguments, config.options())


def _default(spec: ConvSpec) -> GemmConfig:
    """For layers that were not measured: the ping-pong tile that most picks are, narrower where K or the
    number of tiles is small, with resident weights where a residual takes the bandwidth."""
    if spec.k <= 64:
        return (
            _RESIDENT if spec.c * spec.kernel[0] * spec.kernel[1] <= 576 else GemmConfig(128, 64, 6, staged=2)
        )
    tiles = -(-spec.n * spec.p * spec.q // 128) * -(-spec.k // 128)
    if tiles < 132:
        return GemmConfig(64, 64, stages=6, staged=2)
    return _PING_PONG


def _busiest_ms(problem, target, spec: ConvSpec, k: int, config: GemmConfig, steps: int) -> float:
    tiles = _tiling(spec, config).tiles * -(-k // config.block_n)
    products = config.block_m * config.block_n * _slab(spec.c)
    return steps_ms(tiles, steps, products, problem, target, config.per_sm)


def _fits(spec: ConvSpec, config: GemmConfig) -> bool:
    taps = spec.kernel[0] * spec.kernel[1]
    if config.shared_bytes(taps, spec.c, _slab(spec.c)) > SHARED_MEMORY // config.per_sm:
        return False
    if config.block_n > max(64, -(-spec.k // 64) * 64):
        return False
    if config.stationary and -(-spec.k // config.block_n) > 64:
        return False
    if config.skip:
        same = spec.kernel == (3, 3) and spec.stride == spec.padding == spec.dilation == (1, 1)
        return same and spec.n >= 64 and spec.p <= 14 and spec.q <= 14
    return True


class HopperDual(HopperCandidate):
    name = "hopper.dual"
    pattern = DUAL
    source = "kernels/triton/hopper_dual.py"

    def refuses(self, problem: Problem, target: Target) -> str | None:
        shortcut, expand = problem["shortcut"], problem["expand"]
        for role, spec in (("shortcut", shortcut), ("expand", expand)):
            reason = unfit_layer(spec) or _unfit_geometry(spec)
            if reason is None and spec.c % 64:
                reason = f"{spec.c} channels: takes multiples of 64"
            if reason is not None:
                return f"{role}: {reason}"
        return None

    def configs(self, problem: Problem, target: Target) -> Sequence[GemmConfig]:
        shortcut = problem["shortcut"]
        # One H100, batch 256, bf16: 64+64->256@56 230 us, 512+1024->2048@14/2 121 with ping-pong;
        # 128+256->512@56/2 165, 256+512->1024@28/2 127 with one wide group.
        wide = shortcut.stride == (2, 2) and shortcut.c <= 512
        first = (_WIDE, _PING_PONG) if wide else (_PING_PONG, _WIDE)
        tall = GemmConfig(256, 128, stages=3, consumers=1, warps=8)
        small = GemmConfig(64, 64, stages=6, staged=2)
        choices = (*first, GemmConfig(64, 256, stages=3), tall, small)
        return tuple(config for config in choices if _fits(problem["expand"], config))

    def busiest_ms(self, problem: Problem, target: Target) -> float:
        shortcut, expand = problem["shortcut"], problem["expand"]
        steps = (shortcut.c + expand.c) // 64
        return _busiest_ms(problem, target, shortcut, expand.k, self.configs(problem, target)[0], steps)

    def counters(self, problem: Problem, config: GemmConfig) -> int:
        return 1

    def prepare(self, problem: Problem, config: GemmConfig, parameters: Mapping[str, LayerParameters]):
        shortcut, expand = (
            prepare_folded(parameters[role], problem.dtype, 64) for role in ("shortcut", "expand")
        )
        return shortcut.weight, expand.weight, shortcut.shift + expand.shift

    def call(self, problem: Problem, config: GemmConfig, buffers: Buffers, constants) -> Call:
        from fastres.kernels.triton.hopper_dual import dual_kernel

        shortcut, expand = problem["shortcut"], problem["expand"]
        x, h, y = buffers["shortcut.x"], buffers["expand.x"], buffers["expand"]
        w, v, shift = constants
        tiling = _tiling(shortcut, config)
        columns = -(-expand.k // config.block_n)
        tiles = tiling.tiles * columns
        block = [config.block_n, 64]
        arguments = {
            "counter": buffers.counters,
            "x_desc": _input(x, shortcut, tiling, 64),
            "w_desc": descriptor(w, list(w.shape), block),
            "h_desc": _output(h, expand, tiling, expand.c, 64),
            "v_desc": descriptor(v, list(v.shape), block),
            "y_desc": _output(y, expand, tiling, expand.k, config.block_n),
            "shift": shift,
            "slope": float(expand.act.param),
            "tiles": tiles,
            "columns": columns,
            "C": shortcut.c,
            "CH": expand.c,
            "STRIDE": shortcut.stride[0],
            "TN": tiling.tile[0],
            "TW": tiling.tile[2],
            "BN": config.block_n,
            "BK": 64,
            "NTW": tiling.counts[2],
            "ACT": expand.act.code,
            **config.kernel_arguments(),
        }
        return Call(
            dual_kernel, min(multiprocessors(x.device) * config.per_sm, tiles), arguments, config.options()
        )


register(HopperConv())
register(HopperDual())
