"""y = act(scale * conv3x3(x, w) + shift [+ z]) for 64 -> 64 channels, stride 1, NHWC, with the halo loaded
three times (once a column shift) instead of nine (once a tap).

A tile is TH x 8 pixels; for column shift s it needs the box [TH + 2, 8, 64] of x: TH + 2 swizzle atoms of
8 rows x 128 bytes. Tap r is the same buffer read r atoms further on, an aligned start, so that the wgmma
descriptor stays legal. The view that this takes is larger than what it is made from: Triton 3.8 refuses it.

SWAP multiplies transposed, y^T [64, pixels] = w x^T: fewer reads of shared memory a product than pixels by
64 channels.
The weights stay in shared memory; two consumer groups take alternate tiles in turns.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_common import activate, claim, schedule

SLOTS = gl.constexpr(2)


@gluon.jit
def tile_place(tile, TH: gl.constexpr, NTH: gl.constexpr, NTW: gl.constexpr):
    """(image, first row, first column)."""
    return tile // (NTW * NTH), (tile // NTW) % NTH * TH, tile % NTW * 8


@gluon.jit
def producer(
    x_desc, x2_desc, w_desc, z_desc, x_buf, w_buf, y_buf, full, empty, z_full, z_empty, w_full, ticket,
    posted, taken, tiles, TH: gl.constexpr, NTH: gl.constexpr, NTW: gl.constexpr, STAGES: gl.constexpr,
    RESIDUAL: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    mbarrier.expect(w_full, 9 * w_desc.block_type.nbytes)
    for i in gl.static_range(9):
        tma.async_copy_global_to_shared(w_desc, [0, i * 64], w_full, w_buf.index(i))
    step = 0
    k = 0
    tile = claim(ticket, posted, taken, k, 1, SLOTS)
    while tile < tiles:
        n, p, q = tile_place(tile, TH, NTH, NTW)
        for s in range(3):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, x_desc.block_type.nbytes + x2_desc.block_type.nbytes)
            row = stage * (TH + 2)
            top = x_buf.index(row)._reinterpret(x_buf.dtype, [1, TH, 8, 64], x_desc.layout)
            rest = x_buf.index(row + TH)._reinterpret(x_buf.dtype, [1, 2, 8, 64], x2_desc.layout)
            tma.async_copy_global_to_shared(x_desc, [n, p - 1, q + s - 1, 0], bar, top)
            tma.async_copy_global_to_shared(x2_desc, [n, p - 1 + TH, q + s - 1, 0], bar, rest)
            step += 1
        if RESIDUAL:
            slot = k % CONSUMERS
            mbarrier.wait(z_empty.index(slot), ((k // CONSUMERS) & 1) ^ 1)
            mbarrier.expect(z_full.index(slot), z_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(z_desc, [n, p, q, 0], z_full.index(slot), y_buf.index(slot))
        k += 1
        tile = claim(ticket, posted, taken, k, 1, SLOTS)


@gluon.jit
def consumer(
    GROUP: gl.constexpr, y_desc, scale, shift, slope, x_buf, w_buf, y_buf, full, empty, z_full, z_empty,
    w_full, order, ticket, posted, taken, tiles, TH: gl.constexpr, NTH: gl.constexpr, NTW: gl.constexpr,
    STAGES: gl.constexpr, RESIDUAL: gl.constexpr, CONSUMERS: gl.constexpr, ACT: gl.constexpr,
    SWAP: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    BM: gl.constexpr = TH * 8
    dtype: gl.constexpr = x_buf.dtype
    ROWS64: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM if SWAP else 64, 16])
    CHANNEL_AXIS: gl.constexpr = 1 if SWAP else 0
    o_k = gl.arange(0, 64, gl.SliceLayout(CHANNEL_AXIS, ACC))
    factor = gl.expand_dims(gl.load(scale + o_k), CHANNEL_AXIS)
    offset = gl.expand_dims(gl.load(shift + o_k), CHANNEL_AXIS)
    step = GROUP * 3
    turn = 0
    mbarrier.wait(w_full, 0)
    k = GROUP
    tile = claim(ticket, posted, taken, k, WARPS, SLOTS)
    while tile < tiles:
        n, p, q = tile_place(tile, TH, NTH, NTW)
        if SWAP:
            acc = gl.zeros((64, BM), gl.float32, ACC)
        else:
            acc = gl.zeros((BM, 64), gl.float32, ACC)
        if CONSUMERS == 2:
            # Turns, as in hopper_conv_bn_act.py: a wait sees only a phase's parity.
            mbarrier.wait(order.index(GROUP), (turn & 1) ^ (1 - GROUP))
        for s in gl.static_range(3):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            for r in gl.static_range(3):
                rows = x_buf.index(stage * (TH + 2) + r)._reinterpret(dtype, [BM, 64], ROWS64)
                w = w_buf.index(r * 3 + s)
                if SWAP:
                    acc = warpgroup_mma(w, rows.permute((1, 0)), acc, use_acc=(s > 0 or r > 0), is_async=True)
                else:
                    acc = warpgroup_mma(rows, w.permute((1, 0)), acc, use_acc=(s > 0 or r > 0), is_async=True)
            if s > 0:
                acc = warpgroup_mma_wait(3, deps=(acc,))
                mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
            step += 1
        if CONSUMERS == 2:
            mbarrier.arrive(order.index(1 - GROUP), count=1)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        step += 3 * (CONSUMERS - 1)
        y = y_buf.index(GROUP)
        y2 = y._reinterpret(dtype, [BM, 64], ROWS64)
        if SWAP:
            y2 = y2.permute((1, 0))
        acc = acc * factor + offset
        if RESIDUAL:
            mbarrier.wait(z_full.index(GROUP), turn & 1)
            acc = acc + y2.load(ACC).to(gl.float32)
        else:
            tma.store_wait(0)
        y2.store(activate(acc, ACT, slope).to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(y_desc, [n, p, q, 0], y)
        if RESIDUAL:
            tma.store_wait(0)
            mbarrier.arrive(z_empty.index(GROUP), count=1)
        turn += 1
        k += CONSUMERS
        tile = claim(ticket, posted, taken, k, WARPS, SLOTS)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles"])
def halo_kernel(
    counter, x_desc, x2_desc, w_desc, z_desc, y_desc, scale, shift, slope, tiles, TH: gl.constexpr,
    NTH: gl.constexpr, NTW: gl.constexpr, STAGES: gl.constexpr, RESIDUAL: gl.constexpr,
    CONSUMERS: gl.constexpr, ACT: gl.constexpr, SWAP: gl.constexpr, DYNAMIC: gl.constexpr,
    CONSUMER_REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr,
):  # fmt: skip
    """counter: int32 [1], zero. w [64, 576] in boxes [64, 64]; x, z, y in boxes [1, TH, 8, 64], x2 in [1,
    2, 8, 64].
    tiles = N * NTH * NTW, the tiles of an image down and across."""
    WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = x_desc.dtype
    x_buf = gl.allocate_shared_memory(dtype, [STAGES * (TH + 2), 8, 64], gl.NVMMASharedLayout(128, 16, 2))
    w_buf = gl.allocate_shared_memory(dtype, [9, 64, 64], w_desc.layout)
    y_buf = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, TH, 8, 64], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    z_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    z_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    order = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ticket = gl.allocate_shared_memory(gl.int32, [SLOTS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    posted = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(order.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(z_full.index(i), count=1)
        mbarrier.init(z_empty.index(i), count=1)
    mbarrier.init(w_full, count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(posted.index(i), count=1)
        mbarrier.init(taken.index(i), count=2)
    fence_async_shared()
    # fmt: off
    if CONSUMERS == 1:
        gl.warp_specialize([
            (consumer, (0, y_desc, scale, shift, slope, x_buf, w_buf, y_buf, full, empty, z_full, z_empty,
                w_full, order, ticket, posted, taken, tiles, TH, NTH, NTW, STAGES, RESIDUAL, CONSUMERS, ACT,
                SWAP, WARPS)),
            (producer, (x_desc, x2_desc, w_desc, z_desc, x_buf, w_buf, y_buf, full, empty, z_full, z_empty,
                w_full, ticket, posted, taken, tiles, TH, NTH, NTW, STAGES, RESIDUAL, CONSUMERS)),
            (schedule, (counter, ticket, posted, taken, tiles, 1, CONSUMERS, DYNAMIC, SLOTS)),
        ], [1, 1], [PRODUCER_REGS, PRODUCER_REGS])
    else:
        gl.warp_specialize([
            (consumer, (0, y_desc, scale, shift, slope, x_buf, w_buf, y_buf, full, empty, z_full, z_empty,
                w_full, order, ticket, posted, taken, tiles, TH, NTH, NTW, STAGES, RESIDUAL, CONSUMERS, ACT,
                SWAP, WARPS)),
            (consumer, (1, y_desc, scale, shift, slope, x_buf, w_buf, y_buf, full, empty, z_full, z_empty,
                w_full, order, ticket, posted, taken, tiles, TH, NTH, NTW, STAGES, RESIDUAL, CONSUMERS, ACT,
                SWAP, WARPS)),
            (producer, (x_desc, x2_desc, w_desc, z_desc, x_buf, w_buf, y_buf, full, empty, z_full, z_empty,
                w_full, ticket, posted, taken, tiles, TH, NTH, NTW, STAGES, RESIDUAL, CONSUMERS)),
            (schedule, (counter, ticket, posted, taken, tiles, 1, CONSUMERS, DYNAMIC, SLOTS)),
        ], [WARPS, 1, 1], [CONSUMER_REGS, PRODUCER_REGS, PRODUCER_REGS])
    # fmt: on
