"""Mean over all pixels, NHWC: x [N, HW, C] → y [N, C]. The fc is conv_bn_act.py on one pixel an image."""

import triton
import triton.language as tl


@triton.jit
def global_avg_pool_kernel(
    x, y, HW, C: tl.constexpr, WIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_n = tl.program_id(0) // C_TILES
    o_c = (tl.program_id(0) % C_TILES) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    if WIDE:
        i_n = i_n.to(tl.int64)
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for p in range(0, HW, BLOCK_P):
        o_p = p + tl.arange(0, BLOCK_P)
        m = (o_p < HW)[:, None] & m_c[None, :]
        acc += tl.load(x + i_n * HW * C + o_p[:, None] * C + o_c[None, :], mask=m, other=0.0).to(tl.float32)
    tl.store(y + i_n * C + o_c, (tl.sum(acc, axis=0) / HW).to(y.dtype.element_ty), mask=m_c)
