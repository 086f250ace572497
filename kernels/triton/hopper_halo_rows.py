"""y = act(scale * conv3x3(x, w) + shift [+ z]) for 64 -> 64 channels, stride 1, NHWC, heights of 8 * CLASSES: as
hopper_halo.py, without a view of shared memory that is larger than what it is made from.

Rows are taken by classes: class c holds the rows c, c + CLASSES, c + 2 CLASSES, … of an image, eight of them.
Output rows of class c read input rows of the classes c - 1, c and c + 1 and nothing else; class -1 is the last
class one row further up, class CLASSES the first one row further down, and what lies outside of the image is
zero by TMA. A box is one class's eight rows by 8 columns, [64, 64] in shared memory as wgmma takes it; three of
them, one a column shift, are a class's group. A strip of 8 columns makes CLASSES tiles from CLASSES + 2 groups:
each box serves almost three taps of the nine.

Two consumer groups of 4 warps take alternate tiles in turns, so a group of boxes is read by both: the barrier
that frees it counts three tiles, and the tiles at the ends of a strip count for those that are not there.
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
def producer(
    x_desc, w_desc, z_desc, x_buf, w_buf, y_buf, full, empty, z_full, z_empty, w_full, ticket, posted, taken,
    strips, CLASSES: gl.constexpr, ACROSS: gl.constexpr, GROUPS: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    mbarrier.expect(w_full, 9 * w_desc.block_type.nbytes)
    for i in gl.static_range(9):
        tma.async_copy_global_to_shared(w_desc, [0, i * 64], w_full, w_buf.index(i))
    step = 0
    done = 0
    k = 0
    strip = claim(ticket, posted, taken, k, 1, SLOTS)
    while strip < strips:
        n = strip // ACROSS
        q = strip % ACROSS * 8
        for c in range(-1, CLASSES + 1):
            group = step % GROUPS
            bar = full.index(group)
            mbarrier.wait(empty.index(group), ((step // GROUPS) & 1) ^ 1)
            mbarrier.expect(bar, 3 * x_desc.block_type.nbytes)
            # Class -1 is the last one from the row before, class CLASSES the first from the row after.
            wrapped = (c + CLASSES) % CLASSES
            from_row = (c + CLASSES) // CLASSES - 1
            for s in gl.static_range(3):
                tma.async_copy_global_to_shared(
                    x_desc, [n, from_row, wrapped, q + s - 1, 0], bar, x_buf.index(group * 3 + s)
                )
            step += 1
            if RESIDUAL:
                if c > 0:
                    slot = done % 2
                    mbarrier.wait(z_empty.index(slot), ((done // 2) & 1) ^ 1)
                    mbarrier.expect(z_full.index(slot), z_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(
                        z_desc, [n, 0, c - 1, q, 0], z_full.index(slot), y_buf.index(slot)
                    )
                    done += 1
        k += 1
        strip = claim(ticket, posted, taken, k, 1, SLOTS)


@gluon.jit
def consumer(
    GROUP: gl.constexpr, y_desc, scale, shift, slope, x_buf, w_buf, y_buf, full, empty, z_full, z_empty,
    w_full, order, ticket, posted, taken, strips, CLASSES: gl.constexpr, ACROSS: gl.constexpr,
    GROUPS: gl.constexpr, RESIDUAL: gl.constexpr, ACT: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = x_buf.dtype
    ROWS64: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    o_k = gl.arange(0, 64, gl.SliceLayout(0, ACC))
    factor = gl.expand_dims(gl.load(scale + o_k), 0)
    offset = gl.expand_dims(gl.load(shift + o_k), 0)
    turn = 0
    mbarrier.wait(w_full, 0)
    k = 0
    strip = claim(ticket, posted, taken, k, 4, SLOTS)
    while strip < strips:
        n = strip // ACROSS
        q = strip % ACROSS * 8
        # Tiles alternate between the groups over all strips.
        for c in range((GROUP + k * CLASSES) % 2, CLASSES, 2):
            step = k * (CLASSES + 2) + c
            acc = gl.zeros((64, 64), gl.float32, ACC)
            # Turns: a wait sees only a phase's parity.
            mbarrier.wait(order.index(GROUP), (turn & 1) ^ (1 - GROUP))
            for r in gl.static_range(3):
                group = (step + r) % GROUPS
                mbarrier.wait(full.index(group), ((step + r) // GROUPS) & 1)
                for s in gl.static_range(3):
                    rows = x_buf.index(group * 3 + s)._reinterpret(dtype, [64, 64], ROWS64)
                    w = w_buf.index(r * 3 + s).permute((1, 0))
                    acc = warpgroup_mma(rows, w, acc, use_acc=(r > 0 or s > 0), is_async=True)
            mbarrier.arrive(order.index(1 - GROUP), count=1)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            first = step % GROUPS
            second = (step + 1) % GROUPS
            third = (step + 2) % GROUPS
            mbarrier.arrive(empty.index(first), count=1)
            mbarrier.arrive(empty.index(first), count=2, pred=c == 0)
            mbarrier.arrive(empty.index(second), count=1)
            mbarrier.arrive(empty.index(second), count=1, pred=c == 0)
            mbarrier.arrive(empty.index(second), count=1, pred=c == CLASSES - 1)
            mbarrier.arrive(empty.index(third), count=1)
            mbarrier.arrive(empty.index(third), count=2, pred=c == CLASSES - 1)
            y = y_buf.index(GROUP)
            y2 = y._reinterpret(dtype, [64, 64], ROWS64)
            acc = acc * factor + offset
            if RESIDUAL:
                mbarrier.wait(z_full.index(GROUP), turn & 1)
                acc = acc + y2.load(ACC).to(gl.float32)
            else:
                tma.store_wait(0)
            y2.store(activate(acc, ACT, slope).to(dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(y_desc, [n, 0, c, q, 0], y)
            if RESIDUAL:
                tma.store_wait(0)
                mbarrier.arrive(z_empty.index(GROUP), count=1)
            turn += 1
        k += 1
        strip = claim(ticket, posted, taken, k, 4, SLOTS)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["strips"])
def halo_rows_kernel(
    counter, x_desc, w_desc, z_desc, y_desc, scale, shift, slope, strips, CLASSES: gl.constexpr,
    ACROSS: gl.constexpr, GROUPS: gl.constexpr, RESIDUAL: gl.constexpr, ACT: gl.constexpr,
    DYNAMIC: gl.constexpr, CONSUMER_REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr,
):  # fmt: skip
    """counter: int32 [1], zero. w [64, 576] in boxes [64, 64]; x, z, y [N, 8, CLASSES, W, 64] in boxes [1, 8, 1, 8,
    64]. strips = N * ACROSS, of 8 columns. GROUPS (4 or more) groups of three boxes are in flight."""
    dtype: gl.constexpr = x_desc.dtype
    x_buf = gl.allocate_shared_memory(dtype, [3 * GROUPS, 1, 8, 1, 8, 64], x_desc.layout)
    w_buf = gl.allocate_shared_memory(dtype, [9, 64, 64], w_desc.layout)
    y_buf = gl.allocate_shared_memory(dtype, [2, 1, 8, 1, 8, 64], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    z_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    z_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    order = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ticket = gl.allocate_shared_memory(gl.int32, [SLOTS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    posted = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(GROUPS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=3)
    for i in gl.static_range(2):
        mbarrier.init(order.index(i), count=1)
        mbarrier.init(z_full.index(i), count=1)
        mbarrier.init(z_empty.index(i), count=1)
        mbarrier.init(posted.index(i), count=1)
        mbarrier.init(taken.index(i), count=3)
    mbarrier.init(w_full, count=1)
    fence_async_shared()
    # fmt: off
    gl.warp_specialize([
        (consumer, (0, y_desc, scale, shift, slope, x_buf, w_buf, y_buf, full, empty, z_full, z_empty, w_full,
            order, ticket, posted, taken, strips, CLASSES, ACROSS, GROUPS, RESIDUAL, ACT)),
        (consumer, (1, y_desc, scale, shift, slope, x_buf, w_buf, y_buf, full, empty, z_full, z_empty, w_full,
            order, ticket, posted, taken, strips, CLASSES, ACROSS, GROUPS, RESIDUAL, ACT)),
        (producer, (x_desc, w_desc, z_desc, x_buf, w_buf, y_buf, full, empty, z_full, z_empty, w_full, ticket,
            posted, taken, strips, CLASSES, ACROSS, GROUPS, RESIDUAL)),
        # Both groups read every ticket: one closes.
        (schedule, (counter, ticket, posted, taken, strips, 1, 1, DYNAMIC, SLOTS)),
    ], [4, 1, 1], [CONSUMER_REGS, PRODUCER_REGS, PRODUCER_REGS])
    # fmt: on
