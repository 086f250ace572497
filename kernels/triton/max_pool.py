"""Max pool over windows, NHWC; what lies in the padding does not count, NaN wins, as in PyTorch."""

import triton
import triton.language as tl


@triton.jit
def max_pool_kernel(
    x,
    y,
    M,
    H,
    W,
    P,
    Q,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_m = tl.program_id(0) // C_TILES
    o_c = (tl.program_id(0) % C_TILES) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    if WIDE:
        o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    t = o_m // Q
    h0 = (t % P) * STRIDE_H - PAD_H
    w0 = (o_m % Q) * STRIDE_W - PAD_W
    p_x = x + (((t // P) * H + h0) * W + w0) * C
    best = tl.full((BLOCK_M, BLOCK_C), float("-inf"), tl.float32)
    for tap in tl.static_range(R * S):
        r = tap // S * DIL_H
        s = tap % S * DIL_W
        m = m_m & (h0 >= -r) & (h0 < H - r) & (w0 >= -s) & (w0 < W - s)
        a = tl.load(
            p_x[:, None] + ((r * W + s) * C + o_c)[None, :],
            mask=m[:, None] & m_c[None, :],
            other=float("-inf"),
        )
        best = tl.maximum(best, a.to(tl.float32), propagate_nan=tl.PropagateNan.ALL)
    o_y = o_m[:, None] * C + o_c[None, :]
    tl.store(y + o_y, best.to(y.dtype.element_ty), mask=m_m[:, None] & m_c[None, :])
