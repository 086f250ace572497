"""3x3 convolution + BN + activation, then the expand with residual or projection shortcut, then perhaps the
next block's reduce, in one kernel: what follows the 3x3 is pointwise in space, so nothing is computed twice,
and the narrow middle activation never leaves the registers.

u [N, P, Q, C] → h = act_c(conv3x3(u, w_c) * scale_c + shift_c) [M, C1], then as in expand_reduce.py. w_c is
[C1, 9 * C] row-major.
"""

import triton
import triton.language as tl

from .activation import activate
from .dual import pixel_rows
from .expand_reduce import expand_chunks


@triton.jit
def shifted_block_kernel(
    u,
    w_c,
    scale_c,
    shift_c,
    w_e,
    scale_e,
    shift_e,
    residual,
    x,
    w_s,
    scale_s,
    y,
    w_r,
    scale_r,
    shift_r,
    z,
    M,
    H,
    W,
    P,
    Q,
    act_c_param,
    act_e_param,
    act_r_param,
    C: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    K: tl.constexpr,
    Z: tl.constexpr,
    STRIDE_H: tl.constexpr,  # of the shortcut
    STRIDE_W: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACT_C: tl.constexpr,
    ACT_E: tl.constexpr,
    ACT_R: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_C1: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    if WIDE:
        o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    p = (o_m // Q) % P
    q = o_m % Q
    p_u = u + o_m * C
    o_n = tl.arange(0, BLOCK_C1)
    m_n = o_n < C1
    p_w = w_c + o_n * (9 * C)
    acc = tl.zeros((BLOCK_M, BLOCK_C1), tl.float32)
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    for i in range(0, 9 * BLOCKS):
        tap = i // BLOCKS
        r = tap // 3 - 1
        s = tap % 3 - 1
        o_c = (i % BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
        m_u = m_m & (p >= -r) & (p < P - r) & (q >= -s) & (q < Q - s)
        if C % BLOCK_C == 0:
            m_a = m_u[:, None]
            m_b = m_n[None, :]
        else:
            m_a = m_u[:, None] & (o_c < C)[None, :]
            m_b = m_n[None, :] & (o_c < C)[:, None]
        a = tl.load(p_u[:, None] + ((r * Q + s) * C + o_c)[None, :], mask=m_a, other=0.0)
        b = tl.load(p_w[None, :] + (tap * C + o_c)[:, None], mask=m_b, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    acc = acc * tl.load(scale_c + o_n, mask=m_n, other=0.0)[None, :]
    acc += tl.load(shift_c + o_n, mask=m_n, other=0.0)[None, :]
    # Beyond C1 scale and shift are 0 and every activation has act(0) = 0: the padding stays zero.
    h = activate(acc, act_c_param, ACT_C).to(u.dtype.element_ty)
    p_x = x + pixel_rows(o_m, H, W, P, Q, STRIDE_H, STRIDE_W) * C0
    expand_chunks(
        h,
        o_m,
        m_m,
        w_e,
        scale_e,
        shift_e,
        residual,
        p_x,
        w_s,
        scale_s,
        y,
        w_r,
        scale_r,
        shift_r,
        z,
        act_e_param,
        act_r_param,
        C0,
        C1,
        K,
        Z,
        HAS_RESIDUAL,
        ACT_E,
        ACT_R,
        PRECISION,
        BLOCK_M,
        BLOCK_C1,
        BLOCK_E,
        BLOCK_Z,
        BLOCK_S,
    )
