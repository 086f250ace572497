"""y = act(x w^T + h v^T + shift): a stage's first expand (over h) and its projection shortcut (over x,
stride 1 or 2) as one GEMM over two inputs. The shortcut tensor is never written, nor read.

The consumers are conv_bn_act's; the ring carries x's channel slabs first, then h's, in stages of one size.
w and v carry their BN's scale: one accumulator takes both. Rows of x at stride 2 come through the view
[1, rows, 2, W/2, 2C].
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .hopper_common import claim, schedule
from .hopper_conv_bn_act import consumer, load_x, tile_place

SLOTS = gl.constexpr(2)


@gluon.jit
def producer(
    x_desc, w_desc, h_desc, v_desc, x_buf, w_buf, full, empty, ticket, posted, taken, tiles, columns,
    C: gl.constexpr, CH: gl.constexpr, STRIDE: gl.constexpr, TN: gl.constexpr, TH: gl.constexpr,
    TW: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, NTH: gl.constexpr, NTW: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    step = 0
    k = 0
    tile = claim(ticket, posted, taken, k, 1, SLOTS)
    while tile < tiles:
        pn, tn, th, tw = tile_place(tile, columns, NTH, NTW)
        n, p, q = tn * TN, th * TH, tw * TW
        for kb in range(C // BK):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, x_desc.block_type.nbytes + w_desc.block_type.nbytes)
            load_x(x_desc, bar, x_buf.index(stage), n, p, q, 0, 0, kb * BK, C, STRIDE, 1, 0, 0)
            tma.async_copy_global_to_shared(w_desc, [pn * BN, kb * BK], bar, w_buf.index(stage))
            step += 1
        for kb in range(CH // BK):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, h_desc.block_type.nbytes + v_desc.block_type.nbytes)
            dst = x_buf.index(stage)._reinterpret(x_buf.dtype, h_desc.block_type.shape, h_desc.layout)
            tma.async_copy_global_to_shared(h_desc, [n, p, q, kb * BK], bar, dst)
            tma.async_copy_global_to_shared(v_desc, [pn * BN, kb * BK], bar, w_buf.index(stage))
            step += 1
        k += 1
        tile = claim(ticket, posted, taken, k, 1, SLOTS)


@gluon.jit(do_not_specialize=["tiles", "columns"])
def dual_kernel(
    counter, x_desc, w_desc, h_desc, v_desc, y_desc, shift, slope, tiles, columns, C: gl.constexpr,
    CH: gl.constexpr, STRIDE: gl.constexpr, TN: gl.constexpr, TH: gl.constexpr, TW: gl.constexpr,
    BN: gl.constexpr, BK: gl.constexpr, NTH: gl.constexpr, NTW: gl.constexpr, STAGES: gl.constexpr,
    ACT: gl.constexpr, CONSUMERS: gl.constexpr, STAGED: gl.constexpr, DYNAMIC: gl.constexpr,
    CONSUMER_REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr,
):  # fmt: skip
    """counter: int32 [1], zero. w [K, C], v [K, CH], shift: fp32, padded to a multiple of BN."""
    WARPS: gl.constexpr = gl.num_warps()
    KB: gl.constexpr = C // BK
    EXTRA: gl.constexpr = CH // BK
    dtype: gl.constexpr = x_desc.dtype
    x_buf = gl.allocate_shared_memory(dtype, [STAGES] + x_desc.block_type.shape, x_desc.layout)  # noqa: RUF005
    w_buf = gl.allocate_shared_memory(dtype, [STAGES] + w_desc.block_type.shape, w_desc.layout)  # noqa: RUF005
    y_buf = gl.allocate_shared_memory(dtype, [CONSUMERS * STAGED] + y_desc.block_type.shape, y_desc.layout)  # noqa: RUF005
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    order = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ticket = gl.allocate_shared_memory(gl.int32, [SLOTS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    posted = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(order.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(posted.index(i), count=1)
        mbarrier.init(taken.index(i), count=2)
    fence_async_shared()
    # Neither a residual nor resident weights: `order` stands in for barriers that the consumer does not
    # touch.
    # fmt: off
    if CONSUMERS == 1:
        gl.warp_specialize([
            (consumer, (0, y_desc, shift, shift, slope, x_buf, w_buf, y_buf, full, empty, order, order,
                order, order, ticket, posted, taken, tiles, columns, 1, 1, KB, EXTRA, TN, TH, TW, BN, BK,
                NTH, NTW, STAGES, 0, ACT, 0, CONSUMERS, STAGED, WARPS, 0, 0)),
            (producer, (x_desc, w_desc, h_desc, v_desc, x_buf, w_buf, full, empty, ticket, posted, taken,
                tiles, columns, C, CH, STRIDE, TN, TH, TW, BN, BK, NTH, NTW, STAGES)),
            (schedule, (counter, ticket, posted, taken, tiles, 1, CONSUMERS, DYNAMIC, SLOTS)),
        ], [1, 1], [PRODUCER_REGS, PRODUCER_REGS])
    else:
        gl.warp_specialize([
            (consumer, (0, y_desc, shift, shift, slope, x_buf, w_buf, y_buf, full, empty, order, order,
                order, order, ticket, posted, taken, tiles, columns, 1, 1, KB, EXTRA, TN, TH, TW, BN, BK,
                NTH, NTW, STAGES, 0, ACT, 0, CONSUMERS, STAGED, WARPS, 0, 0)),
            (consumer, (1, y_desc, shift, shift, slope, x_buf, w_buf, y_buf, full, empty, order, order,
                order, order, ticket, posted, taken, tiles, columns, 1, 1, KB, EXTRA, TN, TH, TW, BN, BK,
                NTH, NTW, STAGES, 0, ACT, 0, CONSUMERS, STAGED, WARPS, 0, 0)),
            (producer, (x_desc, w_desc, h_desc, v_desc, x_buf, w_buf, full, empty, ticket, posted, taken,
                tiles, columns, C, CH, STRIDE, TN, TH, TW, BN, BK, NTH, NTW, STAGES)),
            (schedule, (counter, ticket, posted, taken, tiles, 1, CONSUMERS, DYNAMIC, SLOTS)),
        ], [WARPS, 1, 1], [CONSUMER_REGS, PRODUCER_REGS, PRODUCER_REGS])
    # fmt: on
