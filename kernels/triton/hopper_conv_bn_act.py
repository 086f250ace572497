"""y = act(scale * conv(x, w) + shift [+ z]) as an implicit GEMM over NHWC: persistent, warp-specialised,
TMA and wgmma.

One producer warp issues every TMA load; CONSUMERS groups of 4 or 8 warps multiply alternate tiles, so that
one group's epilogue hides under the other's products; one scheduler warp claims tiles (hopper_common.py).
y leaves by TMA from a staging buffer, into which the producer has fetched the residual z before.

An output tile is TN images x TH rows x TW columns (BM = TN * TH * TW) by BN channels. Stride 1 reads x as
[N, H, W, C] in boxes [TN, TH, TW, BK]. Stride 2 (H, W even) reads it as [N, H/2, 2, W/2, 2C] in boxes [TN,
TH, 1, TW, BK]: the row's parity is a dimension, the column's sits in the channel coordinate. What lies
outside is zero, by TMA: the padding.
w is [K, R * S * C] (KRSC). STATIONARY keeps the block's [BN, R * S * C] in shared memory for the kernel's
life.
SKIP (3x3, padding 1, stride 1, TH = TW = 1) leaves out the taps that lie wholly in the padding; static
tiles only, since a consumer must know how many ring steps the other one takes.
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
def tile_place(tile, columns, NTH: gl.constexpr, NTW: gl.constexpr):
    """(column block, tile along N, tile along H, tile along W)."""
    m = tile // columns
    mh = m // NTW
    return tile % columns, mh // NTH, mh % NTH, m % NTW


@gluon.jit
def taps(th, tw, R: gl.constexpr, S: gl.constexpr, NTH: gl.constexpr, NTW: gl.constexpr, SKIP: gl.constexpr):
    """The taps to visit: (first row, rows, first column, columns)."""
    r0 = 0
    s0 = 0
    rows = R
    cols = S
    if SKIP:
        r0 = gl.where(th == 0, 1, 0)
        s0 = gl.where(tw == 0, 1, 0)
        rows = R - r0 - gl.where(th == NTH - 1, 1, 0)
        cols = S - s0 - gl.where(tw == NTW - 1, 1, 0)
    return r0, rows, s0, cols


@gluon.jit
def ring_steps(
    tile, columns, R: gl.constexpr, S: gl.constexpr, KB: gl.constexpr, NTH: gl.constexpr, NTW: gl.constexpr,
    SKIP: gl.constexpr,
):  # fmt: skip
    """How many stages of the ring a tile takes."""
    _, _, th, tw = tile_place(tile, columns, NTH, NTW)
    _, rows, _, cols = taps(th, tw, R, S, NTH, NTW, SKIP)
    return rows * cols * KB


@gluon.jit
def load_x(
    x_desc, bar, dst, n, p, q, r, s, c, C: gl.constexpr, STRIDE: gl.constexpr, DILATION: gl.constexpr,
    PAD_H: gl.constexpr, PAD_W: gl.constexpr,
):  # fmt: skip
    """x at tap (r, s), channels from c on, of the tile whose first output pixel is (n, p, q)."""
    if STRIDE == 1:
        h = p + r * DILATION - PAD_H
        w = q + s * DILATION - PAD_W
        tma.async_copy_global_to_shared(x_desc, [n, h, w, c], bar, dst)
    else:
        # Input row 2p + (r - PAD) = 2 (p + (r - PAD) // 2) + parity; an even bias keeps the division's
        # operand positive.
        BIAS_H: gl.constexpr = PAD_H + PAD_H % 2
        BIAS_W: gl.constexpr = PAD_W + PAD_W % 2
        h = r * DILATION - PAD_H + BIAS_H
        w = s * DILATION - PAD_W + BIAS_W
        tma.async_copy_global_to_shared(
            x_desc, [n, p + h // 2 - BIAS_H // 2, h % 2, q + w // 2 - BIAS_W // 2, (w % 2) * C + c], bar, dst
        )  # fmt: skip


@gluon.jit
def load_residual(z_desc, y_buf, z_full, z_empty, done, n, p, q, k, SLOTS_Z: gl.constexpr):
    """The residual of the producer's tile number `done`, into the staging buffer that its result will
    leave from."""
    slot = done % SLOTS_Z
    mbarrier.wait(z_empty.index(slot), ((done // SLOTS_Z) & 1) ^ 1)
    mbarrier.expect(z_full.index(slot), z_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(z_desc, [n, p, q, k], z_full.index(slot), y_buf.index(slot))


@gluon.jit
def producer(
    x_desc, w_desc, z_desc, x_buf, w_buf, y_buf, full, empty, z_full, z_empty, w_full, ticket, posted,
    taken, tiles, columns, C: gl.constexpr, R: gl.constexpr, S: gl.constexpr, STRIDE: gl.constexpr,
    DILATION: gl.constexpr, PAD_H: gl.constexpr, PAD_W: gl.constexpr, TN: gl.constexpr, TH: gl.constexpr,
    TW: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, NTH: gl.constexpr, NTW: gl.constexpr,
    STAGES: gl.constexpr, RESIDUAL: gl.constexpr, STATIONARY: gl.constexpr, SLOTS_Z: gl.constexpr,
    SKIP: gl.constexpr,
):  # fmt: skip
    KB: gl.constexpr = (C + BK - 1) // BK
    if STATIONARY:
        mbarrier.expect(w_full, R * S * KB * w_desc.block_type.nbytes)
        for i in gl.static_range(R * S * KB):
            tma.async_copy_global_to_shared(
                w_desc, [(gl.program_id(0) % columns) * BN, i * BK], w_full, w_buf.index(i)
            )
    step = 0
    k = 0
    tile = claim(ticket, posted, taken, k, 1, SLOTS)
    while tile < tiles:
        pn, tn, th, tw = tile_place(tile, columns, NTH, NTW)
        r0, rows, s0, cols = taps(th, tw, R, S, NTH, NTW, SKIP)
        for tap in range(rows * cols):
            r = r0 + tap // cols
            s = s0 + tap % cols
            for kb in range(KB):
                stage = step % STAGES
                mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
                bar = full.index(stage)
                if STATIONARY:
                    mbarrier.expect(bar, x_desc.block_type.nbytes)
                else:
                    mbarrier.expect(bar, x_desc.block_type.nbytes + w_desc.block_type.nbytes)
                load_x(
                    x_desc, bar, x_buf.index(stage), tn * TN, th * TH, tw * TW, r, s, kb * BK,
                    C, STRIDE, DILATION, PAD_H, PAD_W,
                )  # fmt: skip
                if not STATIONARY:
                    at = ((r * S + s) * KB + kb) * BK
                    tma.async_copy_global_to_shared(w_desc, [pn * BN, at], bar, w_buf.index(stage))
                step += 1
        if RESIDUAL:
            load_residual(z_desc, y_buf, z_full, z_empty, k, tn * TN, th * TH, tw * TW, pn * BN, SLOTS_Z)
        k += 1
        tile = claim(ticket, posted, taken, k, 1, SLOTS)


@gluon.jit
def consumer(
    GROUP: gl.constexpr, y_desc, scale, shift, slope, x_buf, w_buf, y_buf, full, empty, z_full, z_empty,
    w_full, order, ticket, posted, taken, tiles, columns, R: gl.constexpr, S: gl.constexpr,
    KB: gl.constexpr, EXTRA: gl.constexpr, TN: gl.constexpr, TH: gl.constexpr, TW: gl.constexpr,
    BN: gl.constexpr, BK: gl.constexpr, NTH: gl.constexpr, NTW: gl.constexpr, STAGES: gl.constexpr,
    RESIDUAL: gl.constexpr, ACT: gl.constexpr, STATIONARY: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGED: gl.constexpr, WARPS: gl.constexpr, SKIP: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """Consumer group number GROUP. A tile takes EXTRA ring steps beside those of its taps (a second
    input)."""
    BM: gl.constexpr = TN * TH * TW
    dtype: gl.constexpr = x_buf.dtype
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    A: gl.constexpr = gl.NVMMASharedLayout(BK * 2, 16, 2)
    Y: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BN], dtype)
    o_k = gl.arange(0, BN, gl.SliceLayout(0, ACC))
    step = 0
    if GROUP == 1:
        step += ring_steps(gl.program_id(0), columns, R, S, KB, NTH, NTW, SKIP) + EXTRA
    turn = 0
    if STATIONARY:
        mbarrier.wait(w_full, 0)
    k = GROUP
    tile = claim(ticket, posted, taken, k, WARPS, SLOTS)
    while tile < tiles:
        pn, tn, th, tw = tile_place(tile, columns, NTH, NTW)
        acc = gl.zeros((BM, BN), gl.float32, ACC)
        if CONSUMERS == 2:
            # A wait sees only a phase's parity, so a group may not wait on a stage before that stage's
            # previous use is over (loads complete out of order; seen as launch failures). Turns: a group's
            # products start when the other's have ended.
            mbarrier.wait(order.index(GROUP), (turn & 1) ^ (1 - GROUP))
        for i in range(ring_steps(tile, columns, R, S, KB, NTH, NTW, SKIP) + EXTRA):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            a = x_buf.index(stage)._reinterpret(dtype, [BM, BK], A)
            if STATIONARY:
                b = w_buf.index(i)
            else:
                b = w_buf.index(stage)
            acc = warpgroup_mma(a, b.permute((1, 0)), acc, use_acc=i > 0, is_async=True)
            # One product stays in flight; the stage before its own is then free.
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=i > 0)
            step += 1
        if CONSUMERS == 2:
            mbarrier.arrive(order.index(1 - GROUP), count=1)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        if CONSUMERS == 2:
            # Past the other group's tile; only SKIP makes tiles differ, and there the tiles are static.
            other = tile
            if SKIP:
                other = tile + gl.num_programs(0)
            step += ring_steps(other, columns, R, S, KB, NTH, NTW, SKIP) + EXTRA
        if SCALED:
            acc = acc * gl.expand_dims(gl.load(scale + pn * BN + o_k), 0)
        acc = acc + gl.expand_dims(gl.load(shift + pn * BN + o_k), 0)
        slot = GROUP + CONSUMERS * (turn % STAGED)
        y = y_buf.index(slot)
        y2 = y._reinterpret(dtype, [BM, BN], Y)
        if RESIDUAL:
            mbarrier.wait(z_full.index(slot), (turn // STAGED) & 1)
            acc = acc + y2.load(ACC).to(gl.float32)
        else:
            tma.store_wait(STAGED - 1)
        y2.store(activate(acc, ACT, slope).to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(y_desc, [tn * TN, th * TH, tw * TW, pn * BN], y)
        if RESIDUAL:
            # The store before the last STAGED - 1 has read its buffer: back to the producer with it.
            tma.store_wait(STAGED - 1)
            freed = GROUP + CONSUMERS * ((turn + 1) % STAGED)
            mbarrier.arrive(z_empty.index(freed), count=1, pred=turn >= STAGED - 1)
        turn += 1
        k += CONSUMERS
        tile = claim(ticket, posted, taken, k, WARPS, SLOTS)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles", "columns"])
def conv_bn_act_kernel(
    counter, x_desc, w_desc, z_desc, y_desc, scale, shift, slope, tiles, columns, C: gl.constexpr,
    R: gl.constexpr, S: gl.constexpr, STRIDE: gl.constexpr, DILATION: gl.constexpr, PAD_H: gl.constexpr,
    PAD_W: gl.constexpr, TN: gl.constexpr, TH: gl.constexpr, TW: gl.constexpr, BN: gl.constexpr,
    BK: gl.constexpr, NTH: gl.constexpr, NTW: gl.constexpr, STAGES: gl.constexpr, RESIDUAL: gl.constexpr,
    ACT: gl.constexpr, STATIONARY: gl.constexpr, CONSUMERS: gl.constexpr, STAGED: gl.constexpr,
    SKIP: gl.constexpr, SCALED: gl.constexpr, DYNAMIC: gl.constexpr, CONSUMER_REGS: gl.constexpr,
    PRODUCER_REGS: gl.constexpr,
):  # fmt: skip
    """counter: int32 [columns if STATIONARY else 1], zero. scale, shift: fp32, padded to a multiple of BN.
    slope: fp32, leaky ReLU's. Without SCALED the weights carry their scale. tiles: all of them, columns =
    ceil(K / BN) of them side by side."""
    gl.static_assert(not (SKIP and (DYNAMIC or STATIONARY)))
    WARPS: gl.constexpr = gl.num_warps()
    KB: gl.constexpr = (C + BK - 1) // BK
    dtype: gl.constexpr = x_desc.dtype
    x_buf = gl.allocate_shared_memory(dtype, [STAGES] + x_desc.block_type.shape, x_desc.layout)  # noqa: RUF005
    KEPT: gl.constexpr = R * S * KB if STATIONARY else STAGES
    w_buf = gl.allocate_shared_memory(
        dtype,
        [KEPT] + w_desc.block_type.shape,  # noqa: RUF005
        w_desc.layout,
    )
    y_buf = gl.allocate_shared_memory(dtype, [CONSUMERS * STAGED] + y_desc.block_type.shape, y_desc.layout)  # noqa: RUF005
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    z_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS * STAGED, 1], mbarrier.MBarrierLayout())
    z_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS * STAGED, 1], mbarrier.MBarrierLayout())
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
    for i in gl.static_range(CONSUMERS * STAGED):
        mbarrier.init(z_full.index(i), count=1)
        mbarrier.init(z_empty.index(i), count=1)
    mbarrier.init(w_full, count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(posted.index(i), count=1)
        mbarrier.init(taken.index(i), count=2)
    fence_async_shared()
    own = columns if STATIONARY else 1
    # fmt: off
    if CONSUMERS == 1:
        gl.warp_specialize([
            (consumer, (0, y_desc, scale, shift, slope, x_buf, w_buf, y_buf, full, empty, z_full, z_empty,
                w_full, order, ticket, posted, taken, tiles, columns, R, S, KB, 0, TN, TH, TW, BN, BK, NTH,
                NTW, STAGES, RESIDUAL, ACT, STATIONARY, CONSUMERS, STAGED, WARPS, SKIP, SCALED)),
            (producer, (x_desc, w_desc, z_desc, x_buf, w_buf, y_buf, full, empty, z_full, z_empty, w_full,
                ticket, posted, taken, tiles, columns, C, R, S, STRIDE, DILATION, PAD_H, PAD_W, TN, TH, TW,
                BN, BK, NTH, NTW, STAGES, RESIDUAL, STATIONARY, CONSUMERS * STAGED, SKIP)),
            (schedule, (counter, ticket, posted, taken, tiles, own, CONSUMERS, DYNAMIC, SLOTS)),
        ], [1, 1], [PRODUCER_REGS, PRODUCER_REGS])
    else:
        gl.warp_specialize([
            (consumer, (0, y_desc, scale, shift, slope, x_buf, w_buf, y_buf, full, empty, z_full, z_empty,
                w_full, order, ticket, posted, taken, tiles, columns, R, S, KB, 0, TN, TH, TW, BN, BK, NTH,
                NTW, STAGES, RESIDUAL, ACT, STATIONARY, CONSUMERS, STAGED, WARPS, SKIP, SCALED)),
            (consumer, (1, y_desc, scale, shift, slope, x_buf, w_buf, y_buf, full, empty, z_full, z_empty,
                w_full, order, ticket, posted, taken, tiles, columns, R, S, KB, 0, TN, TH, TW, BN, BK, NTH,
                NTW, STAGES, RESIDUAL, ACT, STATIONARY, CONSUMERS, STAGED, WARPS, SKIP, SCALED)),
            (producer, (x_desc, w_desc, z_desc, x_buf, w_buf, y_buf, full, empty, z_full, z_empty, w_full,
                ticket, posted, taken, tiles, columns, C, R, S, STRIDE, DILATION, PAD_H, PAD_W, TN, TH, TW,
                BN, BK, NTH, NTW, STAGES, RESIDUAL, STATIONARY, CONSUMERS * STAGED, SKIP)),
            (schedule, (counter, ticket, posted, taken, tiles, own, CONSUMERS, DYNAMIC, SLOTS)),
        ], [WARPS, 1, 1], [CONSUMER_REGS, PRODUCER_REGS, PRODUCER_REGS])
    # fmt: on
