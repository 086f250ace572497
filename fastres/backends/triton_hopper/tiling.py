"""Tiles of output pixels and channels, as hopper.conv_bn_act and hopper.dual cut them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from fastres.backends.triton_hopper.base import (
    BARRIERS,
    SHARED_MEMORY,
    descriptor,
    memory,
    steps_ms,
)
from fastres.plan.problem import ConvSpec
from fastres.tuning.config import Config


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
        return 2 * (slab * (self.stages * self.block_m + weights * self.block_n) + output) + BARRIERS

    def kernel_arguments(self) -> dict[str, int]:
        # 4-warp consumers of 128 x 128 hold 128 accumulators a thread; with 8 warps the register file ends
        # at 152.
        return {
            "CONSUMERS": self.consumers,
            "STAGED": self.staged,
            "STAGES": self.stages,
            "CONSUMER_REGS": 240 if self.warps == 4 else 152,
            "PRODUCER_REGS": 40,
        }

    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, **({"maxnreg": 128} if self.per_sm == 2 else {})}


# Tiles that were the fastest of several layers (one H100, batch 256 or 32, bf16, prototypes).
WIDE = GemmConfig(128, 256, stages=3, consumers=1, warps=8)
TALL = GemmConfig(256, 128, stages=3, consumers=1, warps=8)
PING_PONG = GemmConfig(128, 128, stages=4)
# More tiles than there can be along a dimension: how many there are is then no constant of a kernel.
_MANY = 1 << 30


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


def tiling_of(spec: ConvSpec, config: GemmConfig) -> Tiling:
    if spec.pointwise:
        # Pixels, or rows, of all images are one dimension: the one that the prototypes' boxes had them in.
        if spec.stride == (1, 1):
            return Tiling((1, 1, spec.n * spec.p * spec.q), (1, 1, config.block_m))
        return tile_of(1, spec.n * spec.p, spec.q, config.block_m)
    if config.skip:
        return Tiling((spec.n, spec.p, spec.q), (config.block_m, 1, 1))
    return tile_of(spec.n, spec.p, spec.q, config.block_m)


def tile_arguments(spec: ConvSpec, tiling: Tiling) -> dict[str, int]:
    """A tile's shape and the tiles of an image down and across, as the kernels' constants."""
    down, across = tiling.counts[1:]
    if spec.pointwise and spec.stride == (1, 1):
        across = _MANY
    elif spec.pointwise:
        down = _MANY
    return dict(zip(("TN", "TH", "TW", "NTH", "NTW"), (*tiling.tile, down, across), strict=True))


def slab_of(channels: int) -> int:
    """Channels of one ring stage: one 128-byte swizzle row, or half of one for up to 32 channels."""
    return 64 if channels > 32 else 32


def unfit_geometry(spec: ConvSpec) -> str | None:
    if spec.stride not in ((1, 1), (2, 2)):
        return f"stride {spec.stride[0]}x{spec.stride[1]}: takes 1 and 2"
    if spec.dilation[0] != spec.dilation[1]:
        return "dilation differs along height and width"
    if spec.kernel[0] * spec.kernel[1] > 49:
        return f"kernel {spec.kernel[0]}x{spec.kernel[1]}: takes up to 7x7"
    if spec.stride == (2, 2):
        if spec.h % 2 or spec.w % 2:
            return f"stride 2 over {spec.h}x{spec.w}: its TMA view takes even heights and widths"
        if spec.c % slab_of(spec.c):
            return f"stride 2 with {spec.c} channels: its TMA view takes multiples of {slab_of(spec.c)}"
    return None


def input_descriptor(x, spec: ConvSpec, tiling: Tiling, slab: int):
    """x's descriptor: [n, h, w, c], or at stride 2 [n, h/2, 2, w/2, 2c]; pointwise, pixels of all images in w's
    place, or at stride 2 their rows in h's."""
    n, h, w, c = spec.n, spec.h, spec.w, spec.c
    tn, th, tw = tiling.tile
    if spec.stride == (1, 1):
        shape = [1, 1, n * h * w, c] if spec.pointwise else [n, h, w, c]
        return descriptor(memory(x), shape, [tn, th, tw, slab])
    shape = [1, n * h // 2, 2, w // 2, 2 * c] if spec.pointwise else [n, h // 2, 2, w // 2, 2 * c]
    return descriptor(memory(x), shape, [tn, th, 1, tw, slab])


def output_descriptor(y, spec: ConvSpec, tiling: Tiling, channels: int, block: int):
    return descriptor(memory(y), [*tiling.extent, channels], [*tiling.tile, block])


def gemm_ms(problem, target, spec: ConvSpec, k: int, config: GemmConfig, steps: int) -> float:
    tiles = tiling_of(spec, config).tiles * -(-k // config.block_n)
    products = config.block_m * config.block_n * slab_of(spec.c)
    return steps_ms(tiles, steps, products, problem, target, config.per_sm)


def folds(spec: ConvSpec, config: GemmConfig) -> bool:
    """Whether the weights carry BN's scale: a thread that holds 128 sums of 64 channels has no registers for it where
    there are 4 warps or a residual comes in (16 to 232 bytes spilled on Triton 3.6, which the prototype did not)."""
    return config.block_n == 256 and (config.warps == 4 or spec.residual)


def fits(spec: ConvSpec, config: GemmConfig, sms: int) -> bool:
    taps = spec.kernel[0] * spec.kernel[1]
    if config.shared_bytes(taps, spec.c, slab_of(spec.c)) > SHARED_MEMORY // config.per_sm:
        return False
    if config.block_n > max(64, -(-spec.k // 64) * 64):
        return False
    # A block keeps to one column of tiles; there must be a block for each.
    if config.stationary and -(-spec.k // config.block_n) > min(64, sms * config.per_sm):
        return False
    if config.skip:
        same = spec.kernel == (3, 3) and spec.stride == spec.padding == spec.dilation == (1, 1)
        return same and spec.n >= 64 and spec.p <= 14 and spec.q <= 14
    return True
