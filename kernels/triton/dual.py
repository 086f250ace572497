"""act(scale * (ratio * conv1x1(x, w_x; stride) + conv1x1(h, w_h)) + shift): a block's projection shortcut and
its expand as one product over two inputs, so that the shortcut tensor is never written.

One accumulator serves both BNs with the weights as they are: it is multiplied by the ratio of the two scales
between the two sums. x [N, H, W, C0], h [M, C1] with M = N P Q, w_x [K, C0], w_h [K, C1], y [M, K]; ratio,
scale and shift fp32 [K].
"""

import triton
import triton.language as tl

from .activation import activate


@triton.jit
def pixel_rows(o_m, H, W, P, Q, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr):
    """The pixel of [N, H, W] that a strided 1x1 convolution reads for output pixel o_m of [N, P, Q]."""
    if STRIDE_H == 1 and STRIDE_W == 1:
        return o_m
    else:
        t = o_m // Q
        return ((t // P) * H + (t % P) * STRIDE_H) * W + (o_m % Q) * STRIDE_W


@triton.jit
def product(
    acc,
    p_a,  # [BLOCK_M] pointers to rows of C elements
    m_m,
    p_b,  # [BLOCK_N] pointers to rows of C elements
    m_n,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + a b^T."""
    for k0 in range(0, C, BLOCK_K):
        o_k = k0 + tl.arange(0, BLOCK_K)
        if C % BLOCK_K == 0:
            a = tl.load(p_a[:, None] + o_k[None, :], mask=m_m[:, None], other=0.0)
            b = tl.load(p_b[None, :] + o_k[:, None], mask=m_n[None, :], other=0.0)
        else:
            m_k = o_k < C
            a = tl.load(p_a[:, None] + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
            b = tl.load(p_b[None, :] + o_k[:, None], mask=m_n[None, :] & m_k[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def dual_kernel(
    x,
    w_x,
    h,
    w_h,
    ratio,
    scale,
    shift,
    y,
    M,
    H,
    W,
    P,
    Q,
    act_param,
    C0: tl.constexpr,
    C1: tl.constexpr,
    K: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    ACT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    N_TILES: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    i_m = tl.program_id(0) // N_TILES
    o_n = (tl.program_id(0) % N_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < K
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    if WIDE:
        o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    p_x = x + pixel_rows(o_m, H, W, P, Q, STRIDE_H, STRIDE_W) * C0
    acc = product(acc, p_x, m_m, w_x + o_n * C0, m_n, C0, BLOCK_K, PRECISION)
    acc = acc * tl.load(ratio + o_n, mask=m_n)[None, :]
    acc = product(acc, h + o_m * C1, m_m, w_h + o_n * C1, m_n, C1, BLOCK_K, PRECISION)
    z = acc * tl.load(scale + o_n, mask=m_n)[None, :] + tl.load(shift + o_n, mask=m_n)[None, :]
    z = activate(z, act_param, ACT)
    o_y = o_m[:, None] * K + o_n[None, :]
    tl.store(y + o_y, z.to(y.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])
