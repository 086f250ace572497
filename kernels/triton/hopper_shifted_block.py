"""The rest of a 64-channel bottleneck, from its 3x3 on, and the next block's first 1x1, in one kernel, NHWC:

    h = act_c(scale_c * conv3x3(x, w_c) + shift_c)      64 channels, registers only
    out = act_e(scale_e * h w_e^T + shift_e + z)        K channels, in chunks of 64; z the residual, or
                                                        (PROJECT) v w_p^T: the projection shortcut of 64
    channels v, scales in the weights y = act_r(scale_r * out w_r^T + shift_r)            REDUCED channels:
    0 (none), 64 or 128

A tile is 8 x 8 pixels. All weights stay in shared memory. Two consumer groups of 4 warps (or one) take
alternate tiles; h and each chunk of out go from accumulator to A operand without leaving the registers. A
residual chunk is added in place in its ring slot and leaves from there.

HALO: x comes as three column-shifted boxes of 10 rows x 8 pixels; a tap's row shift is a whole number of
1,024-byte swizzle atoms, so that one box serves three taps. The view that this takes, a slot seen from a
later atom on, is larger than what it is made from, which Triton 3.8 refuses: without HALO x comes as nine
boxes, one a tap, 72 KB a tile through the L2 instead of 30. At 56x56 and batch 256 that makes 1.8 GB of loads and
stores, 333 us at 5.5 TB/s, beside 343 us of DRAM traffic; with the halo 1.3 GB, 233 us. Classes of rows, as in
hopper_halo_rows.py, need nine boxes resident, 72 KB instead of 40: that leaves 2 slots for the residual, of which a
tile uses 5 for about 1.7 us each, 4.3 us where 3.6 are to be had.

PROJECT: v's tile takes the ring step of x after the 3x3's boxes. It goes into registers at once: were it held until
the last chunk has used it, the other group's v could only then be fetched, and every tile would wait for it.

Rings are shared by the groups. Turns keep a group from waiting on a slot whose previous phase is still
open, since an mbarrier wait sees only the phase's parity.
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

SLOTS = gl.constexpr(4)


@gluon.jit
def tile_place(tile, NTH: gl.constexpr, NTW: gl.constexpr):
    """(image, first row, first column) of an 8 x 8 tile."""
    return tile // (NTW * NTH), (tile // NTW) % NTH * 8, tile % NTW * 8


@gluon.jit
def load_input(
    x_desc, x2_desc, v_desc, wc_desc, we_desc, wr_desc, wp_desc, x_buf, wc_buf, we_buf, wr_buf, wp_buf,
    x_full, x_empty, w_full, ticket, posted, taken, tiles, NTH: gl.constexpr, NTW: gl.constexpr,
    CHUNKS: gl.constexpr, REDUCED: gl.constexpr, HALO: gl.constexpr, PROJECT: gl.constexpr,
    SX: gl.constexpr,
):  # fmt: skip
    """The producer of the weights, once, and of x."""
    R64: gl.constexpr = REDUCED // 64
    mbarrier.expect(w_full, (9 + CHUNKS * (1 + R64 + PROJECT)) * wc_desc.block_type.nbytes)
    for i in gl.static_range(9):
        tma.async_copy_global_to_shared(wc_desc, [0, i * 64], w_full, wc_buf.index(i))
    for i in gl.static_range(CHUNKS):
        tma.async_copy_global_to_shared(we_desc, [i * 64, 0], w_full, we_buf.index(i))
        for j in gl.static_range(R64):
            tma.async_copy_global_to_shared(wr_desc, [j * 64, i * 64], w_full, wr_buf.index(i * R64 + j))
        if PROJECT:
            tma.async_copy_global_to_shared(wp_desc, [i * 64, 0], w_full, wp_buf.index(i))
    step = 0
    k = 0
    tile = claim(ticket, posted, taken, k, 1, SLOTS)
    while tile < tiles:
        n, p, q = tile_place(tile, NTH, NTW)
        for s in gl.static_range(3 if HALO else 9):
            slot = step % SX
            bar = x_full.index(slot)
            mbarrier.wait(x_empty.index(slot), ((step // SX) & 1) ^ 1)
            if HALO:
                mbarrier.expect(bar, x_desc.block_type.nbytes + x2_desc.block_type.nbytes)
                top = x_buf.index(slot * 10)._reinterpret(x_buf.dtype, [1, 8, 8, 64], x_desc.layout)
                rest = x_buf.index(slot * 10 + 8)._reinterpret(x_buf.dtype, [1, 2, 8, 64], x2_desc.layout)
                tma.async_copy_global_to_shared(x_desc, [n, p - 1, q + s - 1, 0], bar, top)
                tma.async_copy_global_to_shared(x2_desc, [n, p + 7, q + s - 1, 0], bar, rest)
            else:
                mbarrier.expect(bar, x_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    x_desc, [n, p + s // 3 - 1, q + s % 3 - 1, 0], bar, x_buf.index(slot)
                )
            step += 1
        if PROJECT:
            slot = step % SX
            mbarrier.wait(x_empty.index(slot), ((step // SX) & 1) ^ 1)
            mbarrier.expect(x_full.index(slot), v_desc.block_type.nbytes)
            if HALO:
                v = x_buf.index(slot * 10)._reinterpret(x_buf.dtype, [1, 8, 8, 64], v_desc.layout)
            else:
                v = x_buf.index(slot)
            tma.async_copy_global_to_shared(v_desc, [n, p, q, 0], x_full.index(slot), v)
            step += 1
        k += 1
        tile = claim(ticket, posted, taken, k, 1, SLOTS)


@gluon.jit
def load_residual(
    z_desc, z_buf, z_full, z_empty, ticket, posted, taken, tiles, NTH: gl.constexpr, NTW: gl.constexpr,
    LOADED: gl.constexpr, EMPTY: gl.constexpr, SZ: gl.constexpr,
):  # fmt: skip
    """The producer of the residual's LOADED chunks, and of EMPTY slots for what is computed without one."""
    step = 0
    k = 0
    tile = claim(ticket, posted, taken, k, 1, SLOTS)
    while tile < tiles:
        n, p, q = tile_place(tile, NTH, NTW)
        for c in range(LOADED):
            slot = step % SZ
            mbarrier.wait(z_empty.index(slot), ((step // SZ) & 1) ^ 1)
            mbarrier.expect(z_full.index(slot), z_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(z_desc, [n, p, q, c * 64], z_full.index(slot), z_buf.index(slot))
            step += 1
        for _ in range(EMPTY):
            slot = step % SZ
            mbarrier.wait(z_empty.index(slot), ((step // SZ) & 1) ^ 1)
            mbarrier.arrive(z_full.index(slot), count=1)
            step += 1
        k += 1
        tile = claim(ticket, posted, taken, k, 1, SLOTS)


@gluon.jit
def store_slot(desc, n, p, q, c, z_buf, out_full, z_empty, step, SZ: gl.constexpr, SW: gl.constexpr):
    slot = step % SZ
    mbarrier.wait(out_full.index(slot), (step // SZ) & 1)
    tma.async_copy_shared_to_global(desc, [n, p, q, c], z_buf.index(slot))
    tma.store_wait(SW)
    mbarrier.arrive(z_empty.index((step + SZ - SW) % SZ), count=1, pred=step >= SW)


@gluon.jit
def store_results(
    out_desc, y_desc, z_buf, out_full, z_empty, ticket, posted, taken, tiles, NTH: gl.constexpr,
    NTW: gl.constexpr, CHUNKS: gl.constexpr, REDUCED: gl.constexpr, SZ: gl.constexpr, SW: gl.constexpr,
):  # fmt: skip
    """The store warp takes finished slots in ring order and gives a slot back when its store has read it, which it
    asks SW stores later."""
    step = 0
    k = 0
    tile = claim(ticket, posted, taken, k, 1, SLOTS)
    while tile < tiles:
        n, p, q = tile_place(tile, NTH, NTW)
        for c in range(CHUNKS):
            store_slot(out_desc, n, p, q, c * 64, z_buf, out_full, z_empty, step, SZ, SW)
            step += 1
        for j in gl.static_range(REDUCED // 64):
            store_slot(y_desc, n, p, q, j * 64, z_buf, out_full, z_empty, step, SZ, SW)
            step += 1
        k += 1
        tile = claim(ticket, posted, taken, k, 1, SLOTS)
    tma.store_wait(0)


@gluon.jit
def channels(vector, at, o_k):
    """[1, 64]: a scale or shift from channel `at` on. Loaded before a wait, its latency hides under it."""
    return gl.expand_dims(gl.load(vector + at + o_k), 0)


@gluon.jit
def consumer(
    GROUP: gl.constexpr, scale_c, shift_c, slope_c, scale_e, shift_e, slope_e, scale_r, shift_r, slope_r,
    x_buf, z_buf, wc_buf, we_buf, wr_buf, wp_buf, x_full, x_empty, z_full, out_full, w_full, turn_c, turn_e,
    ticket, posted, taken, tiles, CHUNKS: gl.constexpr, REDUCED: gl.constexpr, HALO: gl.constexpr,
    PROJECT: gl.constexpr, SX: gl.constexpr, SZ: gl.constexpr, CONSUMERS: gl.constexpr, ACT_C: gl.constexpr,
    ACT_E: gl.constexpr, ACT_R: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = x_buf.dtype
    ROWS64: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    BOXES: gl.constexpr = 3 if HALO else 9
    TAPS: gl.constexpr = 9 // BOXES
    R64: gl.constexpr = REDUCED // 64
    ENTRIES: gl.constexpr = CHUNKS + R64
    FIRST: gl.constexpr = 1 if GROUP == 0 else 0
    o_k = gl.arange(0, 64, gl.SliceLayout(0, ACC))
    step_x = GROUP * (BOXES + PROJECT)
    step_z = GROUP * ENTRIES
    turn = 0
    mbarrier.wait(w_full, 0)
    k = GROUP
    tile = claim(ticket, posted, taken, k, 4, SLOTS)
    while tile < tiles:
        # Always 0, which the compiler cannot know: it would hoist 68 weight descriptors out of the loop
        # and spill them, and with shared memory full the L1 is too small for spills (200 us of 550 on an
        # H100).
        zero = turn >> 24
        acc = gl.zeros((64, 64), gl.float32, ACC)
        if CONSUMERS > 1:
            mbarrier.wait(turn_c.index(GROUP), (turn & 1) ^ FIRST)
        for s in gl.static_range(BOXES):
            slot = step_x % SX
            mbarrier.wait(x_full.index(slot), (step_x // SX) & 1)
            for r in gl.static_range(TAPS):
                if HALO:
                    rows = x_buf.index(slot * 10 + r)._reinterpret(dtype, [64, 64], ROWS64)
                    w = wc_buf.index(r * 3 + s + zero)
                else:
                    rows = x_buf.index(slot)._reinterpret(dtype, [64, 64], ROWS64)
                    w = wc_buf.index(s + zero)
                acc = warpgroup_mma(rows, w.permute((1, 0)), acc, use_acc=(s > 0 or r > 0), is_async=True)
            if s > 0:
                acc = warpgroup_mma_wait(TAPS, deps=(acc,))
                mbarrier.arrive(x_empty.index((step_x + SX - 1) % SX), count=1)
            step_x += 1
        last = (step_x + SX - 1) % SX
        slot_v = step_x % SX
        if PROJECT:
            mbarrier.wait(x_full.index(slot_v), (step_x // SX) & 1)
            step_x += 1
        if CONSUMERS > 1:
            mbarrier.arrive(turn_c.index((GROUP + 1) % CONSUMERS), count=1)
        factor = channels(scale_c, 0, o_k)
        offset = channels(shift_c, 0, o_k)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(x_empty.index(last), count=1)
        step_x += (BOXES + PROJECT) * (CONSUMERS - 1)
        if PROJECT:
            if HALO:
                v_buf = x_buf.index(slot_v * 10)._reinterpret(dtype, [64, 64], ROWS64)
            else:
                v_buf = x_buf.index(slot_v)._reinterpret(dtype, [64, 64], ROWS64)
            v = gl.convert_layout(v_buf.load(ACC), A)
            mbarrier.arrive(x_empty.index(slot_v), count=1)
        h = gl.convert_layout(activate(acc * factor + offset, ACT_C, slope_c).to(dtype), A)
        none = gl.zeros((64, 64), gl.float32, ACC)
        e = warpgroup_mma(h, we_buf.index(zero).permute((1, 0)), none, use_acc=False, is_async=True)
        if PROJECT:
            e = warpgroup_mma(v, wp_buf.index(zero).permute((1, 0)), e, use_acc=True, is_async=True)
        y0 = none
        y1 = none
        a = h
        if CONSUMERS > 1:
            mbarrier.wait(turn_e.index(GROUP), (turn & 1) ^ FIRST)
        for c in gl.static_range(CHUNKS):
            slot = step_z % SZ
            factor = channels(scale_e, c * 64, o_k)
            offset = channels(shift_e, c * 64, o_k)
            mbarrier.wait(z_full.index(slot), (step_z // SZ) & 1)
            if CONSUMERS > 1 and c == ENTRIES - 1:
                mbarrier.arrive(turn_e.index((GROUP + 1) % CONSUMERS), count=1)
            chunk = z_buf.index(slot)._reinterpret(dtype, [64, 64], ROWS64)
            if not PROJECT:
                z = chunk.load(ACC)
            # In flight behind e are the reduce's products of the chunk before.
            if PROJECT:
                if R64 == 1 and c > 0:
                    e, h, v, y0, a = warpgroup_mma_wait(1, deps=(e, h, v, y0, a))
                elif R64 == 2 and c > 0:
                    e, h, v, y0, y1, a = warpgroup_mma_wait(2, deps=(e, h, v, y0, y1, a))
                else:
                    e, h, v = warpgroup_mma_wait(0, deps=(e, h, v))
            elif R64 == 1 and c > 0:
                e, h, y0, a = warpgroup_mma_wait(1, deps=(e, h, y0, a))
            elif R64 == 2 and c > 0:
                e, h, y0, y1, a = warpgroup_mma_wait(2, deps=(e, h, y0, y1, a))
            else:
                e, h = warpgroup_mma_wait(0, deps=(e, h))
            o = e * factor + offset
            if not PROJECT:
                o = o + z.to(gl.float32)
            o = activate(o, ACT_E, slope_e).to(dtype)
            chunk.store(o)
            if c < CHUNKS - 1:
                e = warpgroup_mma(
                    h, we_buf.index(c + 1 + zero).permute((1, 0)), none, use_acc=False, is_async=True
                )
                if PROJECT:
                    wp = wp_buf.index(c + 1 + zero).permute((1, 0))
                    e = warpgroup_mma(v, wp, e, use_acc=True, is_async=True)
            if R64 > 0:
                a = gl.convert_layout(o, A)
                w0 = wr_buf.index(c * R64 + zero).permute((1, 0))
                y0 = warpgroup_mma(a, w0, y0, use_acc=c > 0, is_async=True)
            if R64 > 1:
                w1 = wr_buf.index(c * R64 + 1 + zero).permute((1, 0))
                y1 = warpgroup_mma(a, w1, y1, use_acc=c > 0, is_async=True)
            fence_async_shared()
            mbarrier.arrive(out_full.index(slot), count=1)
            step_z += 1
        for j in gl.static_range(R64):
            slot = step_z % SZ
            factor = channels(scale_r, j * 64, o_k)
            offset = channels(shift_r, j * 64, o_k)
            mbarrier.wait(z_full.index(slot), (step_z // SZ) & 1)
            if CONSUMERS > 1 and j == R64 - 1:
                mbarrier.arrive(turn_e.index((GROUP + 1) % CONSUMERS), count=1)
            if R64 == 1:
                y0, a = warpgroup_mma_wait(0, deps=(y0, a))
            elif j == 0:
                y0, y1, a = warpgroup_mma_wait(0, deps=(y0, y1, a))
            y = activate((y0 if j == 0 else y1) * factor + offset, ACT_R, slope_r).to(dtype)
            z_buf.index(slot)._reinterpret(dtype, [64, 64], ROWS64).store(y)
            fence_async_shared()
            mbarrier.arrive(out_full.index(slot), count=1)
            step_z += 1
        step_z += ENTRIES * (CONSUMERS - 1)
        turn += 1
        k += CONSUMERS
        tile = claim(ticket, posted, taken, k, 4, SLOTS)


@gluon.jit(do_not_specialize=["tiles"])
def shifted_block_kernel(
    counter, x_desc, x2_desc, z_desc, out_desc, y_desc, wc_desc, we_desc, wr_desc, wp_desc, scale_c,
    shift_c, slope_c, scale_e, shift_e, slope_e, scale_r, shift_r, slope_r, tiles, NTH: gl.constexpr,
    NTW: gl.constexpr, CHUNKS: gl.constexpr, REDUCED: gl.constexpr, HALO: gl.constexpr,
    PROJECT: gl.constexpr, SX: gl.constexpr, SZ: gl.constexpr, SW: gl.constexpr, CONSUMERS: gl.constexpr,
    ACT_C: gl.constexpr, ACT_E: gl.constexpr, ACT_R: gl.constexpr, DYNAMIC: gl.constexpr,
    CONSUMER_REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr,
):  # fmt: skip
    """counter: int32 [1], zero. w_c [64, 576], w_e [64 * CHUNKS, 64], w_r [REDUCED, 64 * CHUNKS], w_p [64
    * CHUNKS, 64], all in boxes [64, 64]; images in boxes [1, 8, 8, 64], x2 [1, 2, 8, 64]; z is v's
    descriptor with PROJECT. tiles = N * NTH * NTW. SX slots of x, SZ of the residual ring."""
    dtype: gl.constexpr = x_desc.dtype
    R64: gl.constexpr = REDUCED // 64
    wc_buf = gl.allocate_shared_memory(dtype, [9, 64, 64], wc_desc.layout)
    we_buf = gl.allocate_shared_memory(dtype, [CHUNKS, 64, 64], we_desc.layout)
    if R64 > 0:
        wr_buf = gl.allocate_shared_memory(dtype, [CHUNKS * R64, 64, 64], wr_desc.layout)
    else:
        wr_buf = we_buf
    if PROJECT:
        wp_buf = gl.allocate_shared_memory(dtype, [CHUNKS, 64, 64], wp_desc.layout)
    else:
        wp_buf = we_buf
    if HALO:
        x_buf = gl.allocate_shared_memory(dtype, [SX * 10, 8, 64], gl.NVMMASharedLayout(128, 16, 2))
    else:
        x_buf = gl.allocate_shared_memory(dtype, [SX, 1, 8, 8, 64], x_desc.layout)
    z_buf = gl.allocate_shared_memory(dtype, [SZ, 1, 8, 8, 64], z_desc.layout)
    x_full = gl.allocate_shared_memory(gl.int64, [SX, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [SX, 1], mbarrier.MBarrierLayout())
    z_full = gl.allocate_shared_memory(gl.int64, [SZ, 1], mbarrier.MBarrierLayout())
    out_full = gl.allocate_shared_memory(gl.int64, [SZ, 1], mbarrier.MBarrierLayout())
    z_empty = gl.allocate_shared_memory(gl.int64, [SZ, 1], mbarrier.MBarrierLayout())
    turn_c = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    turn_e = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ticket = gl.allocate_shared_memory(gl.int32, [SLOTS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    posted = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(turn_c.index(i), count=1)
        mbarrier.init(turn_e.index(i), count=1)
    for i in gl.static_range(SX):
        mbarrier.init(x_full.index(i), count=1)
        mbarrier.init(x_empty.index(i), count=1)
    for i in gl.static_range(SZ):
        mbarrier.init(z_full.index(i), count=1)
        mbarrier.init(z_empty.index(i), count=1)
        mbarrier.init(out_full.index(i), count=1)
    mbarrier.init(w_full, count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(posted.index(i), count=1)
        mbarrier.init(taken.index(i), count=4)
    fence_async_shared()
    # fmt: off
    if CONSUMERS == 1:
        gl.warp_specialize([
            (consumer, (0, scale_c, shift_c, slope_c, scale_e, shift_e, slope_e, scale_r, shift_r, slope_r,
                x_buf, z_buf, wc_buf, we_buf, wr_buf, wp_buf, x_full, x_empty, z_full, out_full, w_full,
                turn_c, turn_e, ticket, posted, taken, tiles, CHUNKS, REDUCED, HALO, PROJECT, SX, SZ,
                CONSUMERS, ACT_C, ACT_E, ACT_R)),
            (load_input, (x_desc, x2_desc, z_desc, wc_desc, we_desc, wr_desc, wp_desc, x_buf, wc_buf,
                we_buf, wr_buf, wp_buf, x_full, x_empty, w_full, ticket, posted, taken, tiles, NTH, NTW,
                CHUNKS, REDUCED, HALO, PROJECT, SX)),
            (load_residual, (z_desc, z_buf, z_full, z_empty, ticket, posted, taken, tiles, NTH, NTW, 0 if
                PROJECT else CHUNKS, R64 + CHUNKS if PROJECT else R64, SZ)),
            (store_results, (out_desc, y_desc, z_buf, out_full, z_empty, ticket, posted, taken, tiles, NTH,
                NTW, CHUNKS, REDUCED, SZ, SW)),
            (schedule, (counter, ticket, posted, taken, tiles, 1, CONSUMERS, DYNAMIC, SLOTS)),
        ], [1, 1, 1, 1], [PRODUCER_REGS, PRODUCER_REGS, PRODUCER_REGS, PRODUCER_REGS])
    else:
        gl.warp_specialize([
            (consumer, (0, scale_c, shift_c, slope_c, scale_e, shift_e, slope_e, scale_r, shift_r, slope_r,
                x_buf, z_buf, wc_buf, we_buf, wr_buf, wp_buf, x_full, x_empty, z_full, out_full, w_full,
                turn_c, turn_e, ticket, posted, taken, tiles, CHUNKS, REDUCED, HALO, PROJECT, SX, SZ,
                CONSUMERS, ACT_C, ACT_E, ACT_R)),
            (consumer, (1, scale_c, shift_c, slope_c, scale_e, shift_e, slope_e, scale_r, shift_r, slope_r,
                x_buf, z_buf, wc_buf, we_buf, wr_buf, wp_buf, x_full, x_empty, z_full, out_full, w_full,
                turn_c, turn_e, ticket, posted, taken, tiles, CHUNKS, REDUCED, HALO, PROJECT, SX, SZ,
                CONSUMERS, ACT_C, ACT_E, ACT_R)),
            (load_input, (x_desc, x2_desc, z_desc, wc_desc, we_desc, wr_desc, wp_desc, x_buf, wc_buf,
                we_buf, wr_buf, wp_buf, x_full, x_empty, w_full, ticket, posted, taken, tiles, NTH, NTW,
                CHUNKS, REDUCED, HALO, PROJECT, SX)),
            (load_residual, (z_desc, z_buf, z_full, z_empty, ticket, posted, taken, tiles, NTH, NTW, 0 if
                PROJECT else CHUNKS, R64 + CHUNKS if PROJECT else R64, SZ)),
            (store_results, (out_desc, y_desc, z_buf, out_full, z_empty, ticket, posted, taken, tiles, NTH,
                NTW, CHUNKS, REDUCED, SZ, SW)),
            (schedule, (counter, ticket, posted, taken, tiles, 1, CONSUMERS, DYNAMIC, SLOTS)),
        ], [4, 1, 1, 1, 1], [CONSUMER_REGS, PRODUCER_REGS, PRODUCER_REGS, PRODUCER_REGS, PRODUCER_REGS])
    # fmt: on
