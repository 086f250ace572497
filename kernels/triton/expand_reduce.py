"""A block's 1x1 expand with its residual and activation, chained in registers into the next block's reduce.

y = act_e(conv1x1(h, w_e) * scale_e + shift_e + r),  z = act_r(conv1x1(y, w_r) * scale_r + shift_r),
where r is a tensor or the block's projection shortcut conv1x1(x, w_s; stride) * scale_s (its shift is part of
shift_e).

h [M, C1], residual and y [M, K], z [M, Z], x [N, H, W, C0]; weights row-major [out, in].
The tile of y goes to memory and, as the A operand, straight into the second product: z costs no read of y.
"""

import triton
import triton.language as tl

from .activation import activate
from .dual import pixel_rows, product


@triton.jit
def expand_chunks(
    a,  # [BLOCK_M, BLOCK_C1]: the middle activation, zero beyond C1
    o_m,
    m_m,
    w_e,
    scale_e,
    shift_e,
    residual,
    p_x,  # [BLOCK_M] pointers to the shortcut's input pixels
    w_s,
    scale_s,
    y,
    w_r,
    scale_r,
    shift_r,
    z,
    act_e_param,
    act_r_param,
    C0: tl.constexpr,  # 0: no shortcut
    C1: tl.constexpr,
    K: tl.constexpr,
    Z: tl.constexpr,  # 0: no reduce
    HAS_RESIDUAL: tl.constexpr,
    ACT_E: tl.constexpr,
    ACT_R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C1: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    o_c = tl.arange(0, BLOCK_C1)
    o_z = tl.arange(0, BLOCK_Z)
    m_z = o_z < Z
    acc_z = tl.zeros((BLOCK_M, BLOCK_Z), tl.float32)
    for k0 in range(0, K, BLOCK_E):
        o_e = k0 + tl.arange(0, BLOCK_E)
        m_e = o_e < K
        b = tl.load(
            w_e + o_e[None, :] * C1 + o_c[:, None], mask=m_e[None, :] & (o_c < C1)[:, None], other=0.0
        )
        e = tl.dot(a, b, input_precision=PRECISION)
        e = e * tl.load(scale_e + o_e, mask=m_e, other=0.0)[None, :]
        e += tl.load(shift_e + o_e, mask=m_e, other=0.0)[None, :]
        if C0 > 0:
            s = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
            s = product(s, p_x, m_m, w_s + o_e * C0, m_e, C0, BLOCK_S, PRECISION)
            e += s * tl.load(scale_s + o_e, mask=m_e, other=0.0)[None, :]
        o_y = o_m[:, None] * K + o_e[None, :]
        m_y = m_m[:, None] & m_e[None, :]
        if HAS_RESIDUAL:
            e += tl.load(residual + o_y, mask=m_y, other=0.0).to(tl.float32)
        e_out = activate(e, act_e_param, ACT_E).to(y.dtype.element_ty)
        tl.store(y + o_y, e_out, mask=m_y)
        if Z > 0:
            b_r = tl.load(w_r + o_z[None, :] * K + o_e[:, None], mask=m_z[None, :] & m_e[:, None], other=0.0)
            acc_z = tl.dot(e_out, b_r, acc_z, input_precision=PRECISION)
    if Z > 0:
        acc_z = acc_z * tl.load(scale_r + o_z, mask=m_z)[None, :] + tl.load(shift_r + o_z, mask=m_z)[None, :]
        tl.store(
            z + o_m[:, None] * Z + o_z[None, :],
            activate(acc_z, act_r_param, ACT_R).to(z.dtype.element_ty),
            mask=m_m[:, None] & m_z[None, :],
        )


@triton.jit
def expand_reduce_kernel(
    h,
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
    act_e_param,
    act_r_param,
    C0: tl.constexpr,
    C1: tl.constexpr,
    K: tl.constexpr,
    Z: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACT_E: tl.constexpr,
    ACT_R: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C1: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    if WIDE:
        o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = tl.arange(0, BLOCK_C1)
    a = tl.load(h + o_m[:, None] * C1 + o_c[None, :], mask=m_m[:, None] & (o_c < C1)[None, :], other=0.0)
    p_x = x + pixel_rows(o_m, H, W, P, Q, STRIDE_H, STRIDE_W) * C0
    expand_chunks(
        a,
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
