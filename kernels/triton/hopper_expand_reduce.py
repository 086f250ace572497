"""Two 1x1 convolutions back to back, the wide tensor between them written and never read again:

    out = act(scale_e * h w_e^T + shift_e + z)        h [M, C], z and out [M, K]
    y = act(scale_r * out w_r^T + shift_r)            y [M, CY]

or, PROJECT, with the block's projection shortcut of stride 1 instead of z: v w_p^T, v [M, CV]; the weights then carry
the expand's scales.

Everything is pointwise, so pixels are rows. A tile is 128 rows: two consumer groups of 4 warps take 64
each and share every weight stage (w_e [64, C] and w_r [CY, 64] of a 64-channel chunk of out), which stream
through the L2: they do not fit into shared memory. A chunk of out goes from accumulator to A operand
within the registers; it is added in place in its residual's slot and leaves from there. Residual slots
belong to one group each, so no turns are needed. y leaves from h's buffer where it is as wide (CY = C), else
from one of its own.
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
def load_weights(
    h_desc, v_desc, we_desc, wp_desc, wr_desc, h_buf, v_buf, we_buf, wp_buf, wr_buf, h_full, h_empty, w_full,
    w_empty, ticket, posted, taken, tiles, PROJECT: gl.constexpr, CHUNKS: gl.constexpr, SW: gl.constexpr,
    SH: gl.constexpr,
):  # fmt: skip
    """The producer of h, v and the weights: SH slots of h and v a group, SW stages of weights."""
    INPUT: gl.constexpr = h_desc.block_type.nbytes + (v_desc.block_type.nbytes if PROJECT else 0)
    WEIGHTS: gl.constexpr = (
        we_desc.block_type.nbytes + wr_desc.block_type.nbytes + (wp_desc.block_type.nbytes if PROJECT else 0)
    )
    step = 0
    k = 0
    tile = claim(ticket, posted, taken, k, 1, SLOTS)
    while tile < tiles:
        for g in gl.static_range(2):
            slot = g * SH + k % SH
            mbarrier.wait(h_empty.index(slot), ((k // SH) & 1) ^ 1)
            bar = h_full.index(slot)
            mbarrier.expect(bar, INPUT)
            tma.async_copy_global_to_shared(h_desc, [tile * 128 + g * 64, 0], bar, h_buf.index(slot))
            if PROJECT:
                tma.async_copy_global_to_shared(v_desc, [tile * 128 + g * 64, 0], bar, v_buf.index(slot))
        for c in range(CHUNKS):
            stage = step % SW
            bar = w_full.index(stage)
            mbarrier.wait(w_empty.index(stage), ((step // SW) & 1) ^ 1)
            mbarrier.expect(bar, WEIGHTS)
            tma.async_copy_global_to_shared(we_desc, [c * 64, 0], bar, we_buf.index(stage))
            if PROJECT:
                tma.async_copy_global_to_shared(wp_desc, [c * 64, 0], bar, wp_buf.index(stage))
            tma.async_copy_global_to_shared(wr_desc, [0, c * 64], bar, wr_buf.index(stage))
            step += 1
        k += 1
        tile = claim(ticket, posted, taken, k, 1, SLOTS)


@gluon.jit
def load_residual(
    z_desc, z_buf, z_full, z_empty, ticket, posted, taken, tiles, PROJECT: gl.constexpr, CHUNKS: gl.constexpr,
    SZ: gl.constexpr,
):  # fmt: skip
    """The producer of the residual, SZ slots a group, or of empty slots for what is computed without one."""
    step = 0
    k = 0
    tile = claim(ticket, posted, taken, k, 1, SLOTS)
    while tile < tiles:
        for c in range(CHUNKS):
            for g in gl.static_range(2):
                slot = g * SZ + step % SZ
                mbarrier.wait(z_empty.index(slot), ((step // SZ) & 1) ^ 1)
                if PROJECT:
                    mbarrier.arrive(z_full.index(slot), count=1)
                else:
                    mbarrier.expect(z_full.index(slot), z_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(
                        z_desc, [tile * 128 + g * 64, c * 64], z_full.index(slot), z_buf.index(slot)
                    )
            step += 1
        k += 1
        tile = claim(ticket, posted, taken, k, 1, SLOTS)


@gluon.jit
def store_results(
    out_desc, y_desc, z_buf, y_buf, out_full, z_empty, y_full, y_empty, ticket, posted, taken, tiles,
    CHUNKS: gl.constexpr, SZ: gl.constexpr, SY: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """The store warp: gives a slot back when its store has read it, for which it waits at once (EARLY) or one chunk
    later. With two slots a group, one chunk later is when the next but one should have been fetched."""
    step = 0
    k = 0
    tile = claim(ticket, posted, taken, k, 1, SLOTS)
    while tile < tiles:
        for c in range(CHUNKS):
            for g in gl.static_range(2):
                slot = g * SZ + step % SZ
                mbarrier.wait(out_full.index(slot), (step // SZ) & 1)
                tma.async_copy_shared_to_global(out_desc, [tile * 128 + g * 64, c * 64], z_buf.index(slot))
                if EARLY:
                    tma.store_wait(0)
                    mbarrier.arrive(z_empty.index(slot), count=1)
                else:
                    tma.store_wait(2)
                    mbarrier.arrive(z_empty.index(g * SZ + (step + SZ - 1) % SZ), count=1, pred=c > 0)
            step += 1
        for g in gl.static_range(2):
            slot = g * SY + k % SY
            mbarrier.wait(y_full.index(slot), (k // SY) & 1)
            tma.async_copy_shared_to_global(y_desc, [tile * 128 + g * 64, 0], y_buf.index(slot))
        tma.store_wait(0)
        for g in gl.static_range(2):
            if not EARLY:
                mbarrier.arrive(z_empty.index(g * SZ + (step + SZ - 1) % SZ), count=1)
            mbarrier.arrive(y_empty.index(g * SY + k % SY), count=1)
        k += 1
        tile = claim(ticket, posted, taken, k, 1, SLOTS)


@gluon.jit
def consumer(
    GROUP: gl.constexpr, scale_e, shift_e, slope_e, scale_r, shift_r, slope_r, h_buf, v_buf, z_buf, y_buf,
    we_buf, wp_buf, wr_buf, h_full, h_empty, w_full, w_empty, z_full, out_full, y_full, y_empty, ticket, posted,
    taken, tiles, CY: gl.constexpr, PROJECT: gl.constexpr, OWN: gl.constexpr, SY: gl.constexpr,
    CHUNKS: gl.constexpr, SW: gl.constexpr, SZ: gl.constexpr, SH: gl.constexpr, ACT_E: gl.constexpr,
    ACT_R: gl.constexpr,
):  # fmt: skip
    # At 256 channels the scales' registers would spill: the weights carry them there.
    SCALED: gl.constexpr = CY < 256
    dtype: gl.constexpr = h_buf.dtype
    E: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    Y: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CY, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, Y, 2)
    o_e = gl.arange(0, 64, gl.SliceLayout(0, E))
    o_r = gl.arange(0, CY, gl.SliceLayout(0, Y))
    step = 0
    k = 0
    tile = claim(ticket, posted, taken, k, 4, SLOTS)
    while tile < tiles:
        slot_h = GROUP * SH + k % SH
        h = h_buf.index(slot_h)
        mbarrier.wait(h_full.index(slot_h), (k // SH) & 1)
        y = gl.zeros((64, CY), gl.float32, Y)
        for c in range(CHUNKS):
            stage = step % SW
            mbarrier.wait(w_full.index(stage), (step // SW) & 1)
            w = we_buf.index(stage).permute((1, 0))
            e = warpgroup_mma(h, w, gl.zeros((64, 64), gl.float32, E), use_acc=False, is_async=True)
            if PROJECT:
                wp = wp_buf.index(stage).permute((1, 0))
                e = warpgroup_mma(v_buf.index(slot_h), wp, e, use_acc=True, is_async=True)
            offset = gl.expand_dims(gl.load(shift_e + c * 64 + o_e), 0)
            if SCALED and not PROJECT:
                factor = gl.expand_dims(gl.load(scale_e + c * 64 + o_e), 0)
            slot = GROUP * SZ + step % SZ
            mbarrier.wait(z_full.index(slot), (step // SZ) & 1)
            if not PROJECT:
                z = z_buf.index(slot).load(E)
            e = warpgroup_mma_wait(0, deps=(e,))
            if SCALED and not PROJECT:
                e = e * factor
            e = e + offset
            if not PROJECT:
                e = e + z.to(gl.float32)
            o = activate(e, ACT_E, slope_e).to(dtype)
            z_buf.index(slot).store(o)
            a = gl.convert_layout(o, A)
            y = warpgroup_mma(a, wr_buf.index(stage).permute((1, 0)), y, use_acc=c > 0, is_async=True)
            fence_async_shared()
            mbarrier.arrive(out_full.index(slot), count=1)
            # Nothing in flight over the loop's back edge: ptxas would serialise every wgmma (its warning
            # C7512).
            y, a = warpgroup_mma_wait(0, deps=(y, a))
            mbarrier.arrive(w_empty.index(stage), count=1)
            step += 1
        if SCALED:
            y = y * gl.expand_dims(gl.load(scale_r + o_r), 0)
        y = y + gl.expand_dims(gl.load(shift_r + o_r), 0)
        slot_y = GROUP * SY + k % SY
        if OWN:
            mbarrier.arrive(h_empty.index(slot_h), count=1)
            mbarrier.wait(y_empty.index(slot_y), ((k // SY) & 1) ^ 1)
        y_buf.index(slot_y).store(activate(y, ACT_R, slope_r).to(dtype))
        fence_async_shared()
        mbarrier.arrive(y_full.index(slot_y), count=1)
        k += 1
        tile = claim(ticket, posted, taken, k, 4, SLOTS)


@gluon.jit(do_not_specialize=["tiles"])
def expand_reduce_kernel(
    counter, h_desc, v_desc, z_desc, out_desc, y_desc, we_desc, wp_desc, wr_desc, scale_e, shift_e, slope_e,
    scale_r, shift_r, slope_r, tiles, C: gl.constexpr, CV: gl.constexpr, CY: gl.constexpr, K: gl.constexpr,
    SW: gl.constexpr, SZ: gl.constexpr, SH: gl.constexpr, ACT_E: gl.constexpr, ACT_R: gl.constexpr,
    EARLY: gl.constexpr, DYNAMIC: gl.constexpr, CONSUMER_REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr,
):  # fmt: skip
    """counter: int32 [1], zero. w_e [K, C], w_p [K, CV], w_r [CY, K]; K a multiple of 64, C and CY among 64, 128, 256;
    CV 0 (no projection: v and w_p are not read) or such a number (z is not read); tiles = ceil(M / 128). At CY = 256
    w_e and w_r carry their scales.
    Boxes: h [64, C]; v [64, CV]; y [64, CY]; z, out [64, 64]; w_e [64, C]; w_p [64, CV]; w_r [CY, 64]. SZ at least
    2."""
    dtype: gl.constexpr = h_desc.dtype
    PROJECT: gl.constexpr = CV > 0
    CHUNKS: gl.constexpr = K // 64
    OWN: gl.constexpr = CY != C
    SY: gl.constexpr = 1 if OWN else SH
    h_buf = gl.allocate_shared_memory(dtype, [2 * SH, 64, C], h_desc.layout)
    we_buf = gl.allocate_shared_memory(dtype, [SW, 64, C], we_desc.layout)
    wr_buf = gl.allocate_shared_memory(dtype, [SW, CY, 64], wr_desc.layout)
    if PROJECT:
        v_buf = gl.allocate_shared_memory(dtype, [2 * SH, 64, CV], v_desc.layout)
        wp_buf = gl.allocate_shared_memory(dtype, [SW, 64, CV], wp_desc.layout)
    else:
        v_buf = h_buf
        wp_buf = we_buf
    z_buf = gl.allocate_shared_memory(dtype, [2 * SZ, 64, 64], z_desc.layout)
    h_full = gl.allocate_shared_memory(gl.int64, [2 * SH, 1], mbarrier.MBarrierLayout())
    h_empty = gl.allocate_shared_memory(gl.int64, [2 * SH, 1], mbarrier.MBarrierLayout())
    y_full = gl.allocate_shared_memory(gl.int64, [2 * SY, 1], mbarrier.MBarrierLayout())
    if OWN:
        y_buf = gl.allocate_shared_memory(dtype, [2 * SY, 64, CY], y_desc.layout)
        y_empty = gl.allocate_shared_memory(gl.int64, [2 * SY, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(2 * SY):
            mbarrier.init(y_empty.index(i), count=1)
    else:
        y_buf = h_buf
        y_empty = h_empty
    w_full = gl.allocate_shared_memory(gl.int64, [SW, 1], mbarrier.MBarrierLayout())
    w_empty = gl.allocate_shared_memory(gl.int64, [SW, 1], mbarrier.MBarrierLayout())
    z_full = gl.allocate_shared_memory(gl.int64, [2 * SZ, 1], mbarrier.MBarrierLayout())
    out_full = gl.allocate_shared_memory(gl.int64, [2 * SZ, 1], mbarrier.MBarrierLayout())
    z_empty = gl.allocate_shared_memory(gl.int64, [2 * SZ, 1], mbarrier.MBarrierLayout())
    ticket = gl.allocate_shared_memory(gl.int32, [SLOTS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    posted = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * SH):
        mbarrier.init(h_full.index(i), count=1)
        mbarrier.init(h_empty.index(i), count=1)
    for i in gl.static_range(2 * SY):
        mbarrier.init(y_full.index(i), count=1)
    for i in gl.static_range(SW):
        mbarrier.init(w_full.index(i), count=1)
        mbarrier.init(w_empty.index(i), count=2)
    for i in gl.static_range(2 * SZ):
        mbarrier.init(z_full.index(i), count=1)
        mbarrier.init(out_full.index(i), count=1)
        mbarrier.init(z_empty.index(i), count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(posted.index(i), count=1)
        mbarrier.init(taken.index(i), count=5)
    fence_async_shared()
    # fmt: off
    gl.warp_specialize([
        (consumer, (0, scale_e, shift_e, slope_e, scale_r, shift_r, slope_r, h_buf, v_buf, z_buf, y_buf,
            we_buf, wp_buf, wr_buf, h_full, h_empty, w_full, w_empty, z_full, out_full, y_full, y_empty, ticket,
            posted, taken, tiles, CY, PROJECT, OWN, SY, CHUNKS, SW, SZ, SH, ACT_E, ACT_R)),
        (consumer, (1, scale_e, shift_e, slope_e, scale_r, shift_r, slope_r, h_buf, v_buf, z_buf, y_buf,
            we_buf, wp_buf, wr_buf, h_full, h_empty, w_full, w_empty, z_full, out_full, y_full, y_empty, ticket,
            posted, taken, tiles, CY, PROJECT, OWN, SY, CHUNKS, SW, SZ, SH, ACT_E, ACT_R)),
        (load_weights, (h_desc, v_desc, we_desc, wp_desc, wr_desc, h_buf, v_buf, we_buf, wp_buf, wr_buf, h_full,
            h_empty, w_full, w_empty, ticket, posted, taken, tiles, PROJECT, CHUNKS, SW, SH)),
        (load_residual, (z_desc, z_buf, z_full, z_empty, ticket, posted, taken, tiles, PROJECT, CHUNKS, SZ)),
        (store_results, (out_desc, y_desc, z_buf, y_buf, out_full, z_empty, y_full, y_empty, ticket, posted,
            taken, tiles, CHUNKS, SZ, SY, EARLY)),
        (schedule, (counter, ticket, posted, taken, tiles, 1, 1, DYNAMIC, SLOTS)),
    ], [4, 1, 1, 1, 1], [CONSUMER_REGS, PRODUCER_REGS, PRODUCER_REGS, PRODUCER_REGS, PRODUCER_REGS])
    # fmt: on
