"""The stem in one kernel: convolution with few input channels + BN + activation + 3x3/2 max pool. x is NHWC or
NCHW (PLANAR), y NHWC.

pool(act(conv(x, w) * scale + shift)): the convolution's output, a ResNet's largest tensor, is not written.
Filter row r of an output pixel reads S * C contiguous elements of x, or S of each of C planes: a segment. The
reduction runs over SEGMENTS of them, filled up to SEGMENT elements, where w [K, SEGMENTS * SEGMENT] is zero; a
segment starts SHIFT elements early where that aligns the loads. (A NaN or infinity in x reaches that much
further.)
A program walks down STRIP pooled rows and keeps the maximum over the shared convolution row, so a pooled row
costs two convolution rows at three columns a pixel: 1.5 times the products of the convolution alone.

uint8 images are normalised on load, x * factor[c] + offset[c]; outside the image stays exactly zero.
"""

import triton
import triton.language as tl

from .activation import activate


@triton.jit
def _conv_row(
    p_x,  # the image
    p_w,  # [BLOCK_N] pointers to rows of weights
    m_n,
    b,  # [BLOCK_K, BLOCK_N]: the first weights; all of them where BLOCK_K is the whole reduction
    b_scale,
    b_shift,
    b_factor,
    b_offset,
    factor,
    offset,
    p1,  # the convolution's output row
    o_q2,  # [BLOCK_Q] pooled columns
    H,
    W,
    P1,
    Q1,
    act_param,
    C: tl.constexpr,
    R: tl.constexpr,
    PLANAR: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENT: tl.constexpr,
    SHIFT: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    ACT: tl.constexpr,
    MONOTONE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_Q, BLOCK_N]: the maximum over three neighbouring columns of convolution row p1; -inf outside."""
    # Planes are read one pixel after the other, else all channels of a pixel lie side by side.
    PLANES: tl.constexpr = C if PLANAR else 1
    PIXEL: tl.constexpr = 1 if PLANAR else C
    best = tl.full((o_q2.shape[0], b.shape[1]), float("-inf"), tl.float32)
    for j in tl.static_range(3):
        q1 = 2 * o_q2 - 1 + j
        o_q = q1 * (STRIDE_W * PIXEL) - (PAD_W * PIXEL + SHIFT)
        z = tl.zeros((o_q2.shape[0], b.shape[1]), tl.float32)
        for k0 in range(0, SEGMENTS * SEGMENT, BLOCK_K):
            o_k = tl.arange(0, BLOCK_K)
            r = (k0 + o_k) // SEGMENT // PLANES
            plane = (k0 + o_k) // SEGMENT % PLANES
            h = p1 * STRIDE_H - PAD_H + r
            o_e = o_q[:, None] + (o_k % SEGMENT)[None, :]
            m = (o_e >= 0) & (o_e < W * PIXEL) & ((h >= 0) & (h < H) & (r < R))[None, :]
            a = tl.load(p_x + (((plane * H + h) * (W * PIXEL))[None, :] + o_e), mask=m, other=0)
            if NORMALIZE:
                if BLOCK_K < SEGMENTS * SEGMENT:
                    b_factor = tl.load(factor + k0 + o_k)
                    b_offset = tl.load(offset + k0 + o_k)
                a = tl.where(m, a.to(tl.float32) * b_factor[None, :] + b_offset[None, :], 0.0)
            if BLOCK_K < SEGMENTS * SEGMENT:
                b = tl.load(p_w[None, :] + (k0 + o_k)[:, None], mask=m_n[None, :], other=0.0)
            z = tl.dot(a.to(b.dtype), b, z, input_precision=PRECISION)
        z = z * b_scale[None, :] + b_shift[None, :]
        if not MONOTONE:
            z = activate(z, act_param, ACT)
        z = tl.where(((q1 >= 0) & (q1 < Q1))[:, None], z, float("-inf"))
        best = tl.maximum(best, z, propagate_nan=tl.PropagateNan.ALL)
    return tl.where((p1 >= 0) & (p1 < P1), best, float("-inf"))


@triton.jit
def stem_pool_kernel(
    x,
    w,
    scale,
    shift,
    factor,  # [SEGMENTS * SEGMENT]; not read unless NORMALIZE
    offset,
    y,
    H,
    W,
    P1,
    Q1,
    P2,
    Q2,
    act_param,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    PLANAR: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENT: tl.constexpr,
    SHIFT: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    ACT: tl.constexpr,
    MONOTONE: tl.constexpr,  # activations that rise come after the maximum
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # a multiple of SEGMENT; all of SEGMENTS * SEGMENT keeps the weights resident
):
    q_tiles = tl.cdiv(Q2, BLOCK_Q)
    strips = tl.cdiv(P2, STRIP)
    i_q = tl.program_id(0) % q_tiles
    i_s = (tl.program_id(0) // q_tiles) % strips
    i_n = (tl.program_id(0) // (q_tiles * strips)).to(tl.int64)
    o_q2 = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < K
    o_k = tl.arange(0, BLOCK_K)
    p_w = w + o_n * (SEGMENTS * SEGMENT)
    b = tl.load(p_w[None, :] + o_k[:, None], mask=m_n[None, :], other=0.0)
    b_scale = tl.load(scale + o_n, mask=m_n, other=0.0)
    b_shift = tl.load(shift + o_n, mask=m_n, other=0.0)
    b_factor = b_scale
    b_offset = b_scale
    if NORMALIZE:
        b_factor = tl.load(factor + o_k)
        b_offset = tl.load(offset + o_k)
    p_x = x + i_n * H * W * C
    p_y = y + i_n * P2 * Q2 * K
    first = i_s * STRIP
    # The maximum over the rows of the pooled row at hand.
    above = tl.full((BLOCK_Q, BLOCK_N), float("-inf"), tl.float32)
    for i in range(2 * first - 1, 2 * min(first + STRIP, P2)):
        row = _conv_row(
            p_x,
            p_w,
            m_n,
            b,
            b_scale,
            b_shift,
            b_factor,
            b_offset,
            factor,
            offset,
            i,
            o_q2,
            H,
            W,
            P1,
            Q1,
            act_param,
            C,
            R,
            PLANAR,
            SEGMENTS,
            SEGMENT,
            SHIFT,
            STRIDE_H,
            STRIDE_W,
            PAD_H,
            PAD_W,
            ACT,
            MONOTONE,
            NORMALIZE,
            PRECISION,
            BLOCK_K,
        )
        above = tl.maximum(above, row, propagate_nan=tl.PropagateNan.ALL)
        # Odd rows close a pooled row and open the next one; the one above the strip only opens.
        if (i & 1) == 1 and i > 2 * first:
            z = above
            if MONOTONE:
                z = activate(z, act_param, ACT)
            o_y = ((i // 2) * Q2 + o_q2)[:, None] * K + o_n[None, :]
            tl.store(p_y + o_y, z.to(y.dtype.element_ty), mask=(o_q2 < Q2)[:, None] & m_n[None, :])
            above = row
