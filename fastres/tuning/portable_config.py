"""Configurations of the portable Triton kernels, and what is picked where no table knows better.

Times named as reasons were measured on an H100 80GB HBM3, batch 256, bf16, Triton 3.6, on the experiments
that these kernels grew out of; whatever has no such reason is a guess that `fastres tune` replaces.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fastres.plan.problem import ConvSpec, PoolSpec, Problem, Target
from fastres.tuning.config import Config


@dataclass(frozen=True)
class ConvConfig(Config):
    """Of `triton.conv_bn_act`.

    Attributes:
        form: "implicit" (any convolution), "stationary" and "persistent" (1x1, stride 1), "depthwise".
        block_m, block_n, block_k: output pixels, output channels and reduction of a tile.
        num_warps, num_stages: of the compiler; in "stationary" form the stages of the tile loop.
        dynamic: "stationary" and "persistent" programs claim their last tiles from a counter.
    """

    form: str
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    dynamic: bool = False


def conv_configs(problem: Problem, target: Target, shared: int) -> list[ConvConfig]:
    """For one convolution, the best guess first; `shared` is the shared memory that a block may take."""
    spec: ConvSpec = problem["conv"]
    size = problem.dtype.itemsize
    if spec.groups > 1 and spec.groups == spec.c == spec.k:
        return _depthwise(spec)
    m = spec.n * spec.p * spec.q
    implicit = _implicit(spec, m, size, target, shared)
    aligned = spec.c * size % 16 == 0 and spec.k * size % 16 == 0
    if size == 4 and "tf32" not in problem.flags:
        # Without tensor cores the operands of a whole tile stand in registers: a long reduction a step spills.
        return list(dict.fromkeys(replace(config, block_k=16) for config in implicit))
    if not (spec.pointwise and spec.stride == (1, 1) and aligned):
        return implicit
    tma = [
        replace(config, dynamic=_claims(spec, m, config, size, target))
        for config in _stationary(spec, m, size, shared) + _persistent(spec, m, size, shared, target)
    ]
    if tma and tma[0].dynamic:
        tma.insert(1, replace(tma[0], dynamic=False))
    # Before Hopper a descriptor is only a pointer with masks: nothing is known to be gained by it.
    return tma + implicit if target.capability >= 90 else implicit + tma


def _claims(spec: ConvSpec, m: int, config: ConvConfig, size: int, target: Target) -> bool:
    """Dynamic tiles from eight a multiprocessor on; unmeasured in plain Triton (in Gluon 64->256 @56 + add went from
    343 to 316 us). Fewer are all in the first, even round, and the claims that find nothing take about 1 us."""
    if target.capability != 90 and spec.residual and config.block_k * size >= 512:
        return False  # there are no registers left for it (sm_100, Triton 3.8)
    return _tiles(m, spec.k, config.block_m, config.block_n) >= 8 * target.sms


def _stationary(spec: ConvSpec, m: int, size: int, shared: int) -> list[ConvConfig]:
    """Weights of a tile column stay in shared memory. 256->64 @56: 172 us (floor 171, cuDNN 178);
    64->256 @56 + add: 334 (308, 333); 128->512 @28 + add: 166 (154, 167); 64->64 @56: 77 (68, 77)."""
    # tl.dot takes a reduction of 16 at least.
    block_c = max(16, _pow2(spec.c))
    if block_c * size > 512:
        return []
    first = [(128, 64, 4)] if spec.c <= 64 and spec.k <= 64 else [(64, 64, 4)] if spec.k <= 128 else []
    if spec.k > 128:
        first = [(64, 128, 4 if spec.c <= 64 else 3)]
    more = [(64, 64, 3), (64, 64, 4), (64, 128, 3), (64, 128, 4), (128, 64, 3), (128, 128, 3), (64, 256, 3)]
    found = []
    for block_m, block_n, stages in first + more:
        if block_n > max(64, _pow2(spec.k)):
            continue
        need = block_n * block_c + stages * block_m * block_c
        need += (stages if spec.residual else 0) * block_m * block_n + block_m * block_n
        if need * size <= shared:
            found.append(ConvConfig("stationary", block_m, block_n, block_c, 4, stages))
    return found if m >= 64 else []


def _persistent(spec: ConvSpec, m: int, size: int, shared: int, target: Target) -> list[ConvConfig]:
    """512->128 @28: 93 us (floor 86, cuDNN 92) at 128x128; 512->256 @28: 120 (103, 116),
    1024->256 @14: 58 (43, 55) and 1024->512 @14: 87 (70, 83) at 128x256."""
    block_k = min(128 // size, max(16, _pow2(spec.c)))
    # On sm_100 a tile of 128x256 spills (Triton 3.8).
    wide = spec.k >= 256 and not spec.residual and spec.c <= 1024 and target.capability == 90
    order = [(128, 256, 8, 3), (128, 128, 8, 4)] if wide else [(128, 128, 8, 4), (128, 256, 8, 3)]
    order += [(128, 64, 4, 4), (128, 128, 8, 3), (64, 128, 4, 4), (64, 64, 4, 4)]
    if _tiles(m, spec.k, 128, 128) < target.sms:
        order = [(64, 64, 4, 4), (64, 128, 4, 4), *order]
    found = []
    for block_m, block_n, warps, stages in order:
        need = stages * block_k * (block_m + block_n) + block_m * block_n * (2 if spec.residual else 1)
        if need * size <= shared and block_n <= max(64, _pow2(spec.k)):
            found.append(ConvConfig("persistent", block_m, block_n, block_k, warps, stages))
    return found


def _implicit(spec: ConvSpec, m: int, size: int, target: Target, shared: int) -> list[ConvConfig]:
    """Of 128x128 tiles, 4 warps with 3 stages won for the two-input product (128+256->512 @28: 192 us, with 8
    more): two blocks share a multiprocessor. Else unmeasured: the largest tile that fills the device."""
    columns = slice_outputs(spec)
    reduction = spec.weight_elements // spec.k * slice_inputs(spec) // (spec.c // spec.groups)
    block_k = _reduction_block(slice_inputs(spec), reduction, size)
    # 4 warps own the whole tile: on sm_90 that leaves registers enough, but not for a residual's pointers too.
    few = target.capability == 90 and not spec.residual
    tiles = [
        (128, 128, 4 if few else 8),
        (128, 64, 4),
        (64, 128, 4),
        (64, 64, 4),
        (64, 32, 4),
        (32, 32, 4),
        (16, 32, 2),
    ]
    if size == 4:
        # No tensor cores in IEEE fp32: a tile of 64 x 64 already takes 64 registers of each of 128 threads.
        tiles = [tile for tile in tiles if tile[0] * tile[1] <= 64 * 64]
    tiles = [tile for tile in tiles if tile[1] <= max(32, _pow2(columns))]
    tiles.sort(key=lambda tile: max(0, target.sms - _tiles(m, spec.k, tile[0], tile[1])))
    found = []
    for block_m, block_n, warps in tiles:
        for stages in (3, 2) if block_m * block_n > 64 * 128 else (4, 3, 2):
            if stages * block_k * (block_m + block_n) * size <= shared:
                found.append(ConvConfig("implicit", block_m, block_n, block_k, warps, stages))
                break
    if found and block_k * size == 64:
        found.append(replace(found[0], block_k=2 * block_k, num_stages=2))
    return found


def conv_stats_config(spec: ConvSpec, size: int, target: Target, shared: int, aligned: bool) -> ConvConfig:
    """Of `conv_stats`, a 1x1 of stride 1 with `size` bytes an element; `aligned`: every matrix starts and steps
    by 16 bytes. Tiles are those of `conv_bn_act` (unmeasured here) with at most 64 accumulators a thread: the
    sums take as many registers again, and on sm_100, where a thread holds a row, three times as many."""
    most = 64 if target.capability < 100 else 32
    m = spec.n * spec.p * spec.q
    found = []
    if aligned and target.capability >= 90:
        found = _stationary(spec, m, size, shared) + _persistent(spec, m, size, shared, target)
    found += _implicit(spec, m, size, target, shared)
    return next(config for config in found if config.block_m * config.block_n <= most * 32 * config.num_warps)


def _depthwise(spec: ConvSpec) -> list[ConvConfig]:
    """Unmeasured: 16-byte loads along the channels, and enough pixels to keep 128 threads busy."""
    block_c = min(64, _pow2(spec.c))
    return [ConvConfig("depthwise", m, block_c, 1, 4, 1) for m in (32, 64, 16)]


def slice_groups(spec: ConvSpec, width: int = 32) -> int:
    """How many groups share a tile: as many as have `width` inputs and outputs together. Unmeasured: narrower
    wastes fewer products on zeros, wider fills the instructions better."""
    each = max(spec.k, spec.c) // spec.groups
    if spec.groups == 1 or each >= width:
        return 1
    return max(g for g in range(1, width // each + 1) if spec.groups % g == 0)


def slice_outputs(spec: ConvSpec) -> int:
    return spec.k // spec.groups * slice_groups(spec)


def slice_inputs(spec: ConvSpec) -> int:
    return spec.c // spec.groups * slice_groups(spec)


def _reduction_block(inputs: int, reduction: int, size: int) -> int:
    """128 bytes where the channels allow it (one swizzle row), never past the whole reduction."""
    block = 128 // size
    while block > 64 // size and (inputs % block or reduction < block):
        block //= 2
    return max(16, min(block, _pow2(reduction)))


def _tiles(m: int, k: int, block_m: int, block_n: int) -> int:
    return -(-m // block_m) * -(-k // block_n)


def _pow2(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


@dataclass(frozen=True)
class TileConfig(Config):
    """A tile of a matrix product: rows (pixels), columns (output channels), reduction; compiler options."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def dual_configs(problem: Problem, target: Target, shared: int) -> list[TileConfig]:
    """128x128 with 4 warps and 3 stages: 192 us for 128+256->512 @56/2 (floor 120), 150 for 256+512->1024
    (105), 139 for 512+1024->2048 (105), better than with 8 warps: two blocks then share a multiprocessor."""
    expand, size = problem["expand"], problem.dtype.itemsize
    m = expand.n * expand.p * expand.q
    depth = min(problem["shortcut"].c, expand.c)
    block_k = max(16, min(128 // size, _pow2(depth)))
    # With 4 warps a 128x128 tile leaves few registers for pointers: two long loops then spill (Triton 3.8).
    few = target.capability == 90 and expand.c + problem["shortcut"].c < 512
    tiles = [
        (128, 128, 4 if few else 8),
        (128, 64, 4 if few else 8),  # Triton 3.6 spills with 4
        (64, 128, 4),
        (64, 64, 4),
        (32, 32, 4),
        (16, 32, 2),
    ]
    if size == 4:
        tiles = [tile for tile in tiles if tile[0] * tile[1] <= 64 * 64]
    tiles = [tile for tile in tiles if tile[1] <= max(32, _pow2(expand.k))]
    tiles.sort(key=lambda tile: max(0, target.sms - _tiles(m, expand.k, tile[0], tile[1])))
    return [
        TileConfig(block_m, block_n, block_k, warps, stages)
        for block_m, block_n, warps in tiles
        for stages in (3, 4)
        if stages * block_k * (block_m + block_n) * size <= shared
    ]


@dataclass(frozen=True)
class ChainConfig(Config):
    """Of `triton.expand_reduce` and `triton.shifted_block`.

    Attributes:
        block_m: pixels of a tile.
        block_e: expand channels a step.
        block_s, block_c: reduction of a step of the shortcut and of the 3x3.
        num_warps, num_stages: of the compiler.
    """

    block_m: int
    block_e: int
    block_s: int
    block_c: int
    num_warps: int
    num_stages: int


# How many configurations of a chain `fastres tune` may try; there are up to 45.
_MOST = 12


def expand_reduce_configs(problem: Problem, target: Target, shared: int) -> list[ChainConfig]:
    return _chains(problem, target, shared)[:_MOST]


def _chains(problem: Problem, target: Target, shared: int) -> list[ChainConfig]:
    """Unmeasured in plain Triton. 128 pixels a tile halve the weights' traffic; z stays in registers."""
    expand, reduce, shortcut = problem["expand"], problem.get("reduce"), problem.get("shortcut")
    size = problem.dtype.itemsize
    wide_z = _pow2(reduce.k) if reduce else 16
    c1 = _pow2(expand.c)
    if max(c1, wide_z) > 512 // size:
        return []
    block_s = max(16, min(128 // size, _pow2(shortcut.c))) if shortcut else 16
    m = expand.n * expand.p * expand.q
    found = []
    # Registers of a thread: z, the step's product, the shortcut's, the middle activation. Beyond these limits
    # the compiler spills (Triton 3.8); only Hopper takes the middle activation from shared memory.
    limit = (200 if shortcut else 230) if target.capability == 90 and size == 2 else 125
    for block_m, warps in ((128, 8), (64, 8), (64, 4), (32, 4), (16, 4)):
        rank = 0
        for block_e in (64, 32, 128):
            words = wide_z + block_e * (2 if shortcut else 1) + c1 * size // 4
            if words * block_m > limit * 32 * warps:
                continue
            for stages in (2, 3, 1):
                need = block_m * c1 + stages * block_e * (c1 + wide_z)
                need += stages * block_s * (block_m + block_e) if shortcut else 0
                if need * size <= shared:
                    idle = max(0, target.sms - -(-m // block_m))
                    found.append((idle, rank, ChainConfig(block_m, block_e, block_s, 16, warps, stages)))
                    rank += 1
    # The best guess of every tile comes first.
    return [config for *_, config in sorted(found, key=lambda item: item[:2])]


def shifted_block_configs(problem: Problem, target: Target, shared: int) -> list[ChainConfig]:
    """Unmeasured in plain Triton: as `expand_reduce`, with the middle activation in registers."""
    conv, size = problem["conv"], problem.dtype.itemsize
    if _pow2(conv.k) > 256 // size:
        return []
    block_c = max(16, min(128 // size, _pow2(conv.c)))
    return [
        replace(config, block_c=block_c)
        for config in _chains(problem, target, shared)
        if config.num_stages * block_c * (config.block_m + _pow2(conv.k)) * size <= shared
    ][:_MOST]


@dataclass(frozen=True)
class StemConfig(Config):
    """Of `triton.stem_pool`: pooled columns of a tile, pooled rows of a strip, filter rows of a step."""

    block_q: int
    strip: int
    block_r: int
    num_warps: int
    num_stages: int


def stem_configs(problem: Problem, target: Target) -> list[StemConfig]:
    """Unmeasured. Longer strips compute fewer rows twice (1 in 2 strip + 1), shorter ones fill the device.
    Where the product reads weights from shared memory they stay there (8 rows a step); elsewhere they would
    not fit into the registers (Triton 3.8 spills)."""
    pool, size = problem["pool"], problem.dtype.itemsize
    block_q = 64 if pool.q > 32 else max(16, _pow2(pool.q))
    resident = target.capability in (90, 100) and size == 2
    if size == 4:
        block_q = min(block_q, 32)
    columns = -(-pool.q // block_q)
    strips = [s for s in (14, 7, 4, 2, 1) if s <= pool.p]
    strips.sort(key=lambda s: max(0, 4 * target.sms - pool.n * columns * -(-pool.p // s)))
    steps = [(8, 8), (2, 4), (1, 4)] if resident else [(2, 8), (1, 4), (2, 4)]
    if resident and problem.get("normalize") is not None:
        # Normalising contiguous images spills with all of the reduction at once.
        steps = [(2, 4), (1, 4), (8, 8)]
    return [StemConfig(block_q, strip, rows, warps, 1) for strip in strips for rows, warps in steps]


@dataclass(frozen=True)
class PoolConfig(Config):
    """Pixels and channels of a tile."""

    block_p: int
    block_c: int
    num_warps: int


def pool_configs(spec: PoolSpec) -> list[PoolConfig]:
    """Unmeasured. Of the mean: one image's pixels, few channels, so that batch 1 still gives many blocks."""
    block_p = min(64, max(8, _pow2(spec.h * spec.w)))
    return [PoolConfig(block_p, min(_pow2(spec.c), c), 4) for c in (64, 128, 32)]


def linear_configs(spec: ConvSpec, dtype: torch.dtype, target: Target, shared: int) -> list[ConvConfig]:
    """Unmeasured: as any 1x1, with the images as rows."""
    return _implicit(spec, spec.n, dtype.itemsize, target, shared)
