"""act(scale * conv(x, w) + shift + residual), NHWC: implicit GEMM, persistent 1x1 forms, and depthwise.

GEMM view: rows are output pixels (M = N P Q), columns output channels, the reduction runs over (r, s, c).
x [N, H, W, C], w [K, R * S * CS] row-major, scale and shift fp32 [K], residual and y [N, P, Q, K].
A *slice* is a run of output channels that reads one run of input channels: everything when dense, one group,
or several small groups at once with a block-diagonal weight. Its zeros are multiplied too, so a NaN or an
infinity in one group reaches the groups that share its slice.

Persistent forms take DYNAMIC tiles: equal shares let the slowest multiprocessor finish last (up to 8 % of a
memory-bound layer on an H100). A program walks through its part of a *round* of tiles in one pipelined loop, which
a claim for every tile would end. The first round, 7/8 of the tiles, is shared out evenly; of every later one, about
half of what is left, a program claims its part from a counter when it comes to it (factoring: Hummel, Schonberg and
Flynn, 1992, "Factoring: a method for scheduling parallel loops"), down to 1/32 of an even share. Counters, one for
each column of resident weights, are zero before a launch and after it. (The other kernels of this folder launch a
program a tile, which the GPU itself hands out as programs end.)
"""

import triton
import triton.language as tl

from .activation import activate


@triton.jit
def part_of(ticket, tiles, programs, DYNAMIC: tl.constexpr):
    """(begin, end, parts): ticket number `ticket` stands for the tiles begin, begin + programs, … below `end`, or for
    none, where begin >= tiles; `parts` counts the tickets that stand for some, up to the end of this one's round."""
    size = max(tiles // 8 * 7 // programs, 1) if DYNAMIC else tl.cdiv(tiles, programs)
    least = max(tiles // (32 * programs), 1)
    first = 0
    start = 0
    parts = min(tiles, programs)
    while ticket >= first + programs:
        first += programs
        start += size * programs
        parts += min(max(tiles - start, 0), programs)
        size = max((tiles - start) // (2 * programs), least)
    return start + ticket - first, min(start + size * programs, tiles), parts


@triton.jit
def claim_part(counter, tiles, programs):
    """(begin, end) of the next part. Who claims last zeroes the counter: there are as many claims as parts, since
    each program's last claim finds none and its first part takes none."""
    claimed = tl.atomic_add(counter, 1, sem="relaxed")
    begin, end, parts = part_of(programs + claimed, tiles, programs, True)
    if begin >= tiles:
        if claimed == parts - 1:
            tl.atomic_xchg(counter, 0, sem="relaxed")
    return begin, end


@triton.jit
def conv_bn_act_kernel(
    x,
    w,
    scale,
    shift,
    residual,
    y,
    M,
    H,
    W,
    P,
    Q,
    act_param,
    C: tl.constexpr,
    K: tl.constexpr,
    CS: tl.constexpr,  # input channels a slice
    KS: tl.constexpr,  # output channels a slice
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    ACT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    WIDE: tl.constexpr,  # 64-bit offsets
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    SLICE_TILES: tl.constexpr = (KS + BLOCK_N - 1) // BLOCK_N
    N_TILES: tl.constexpr = (K // KS) * SLICE_TILES
    # Column tiles vary fastest: the tiles that share rows of x run together and read them from the L2.
    i_m = tl.program_id(0) // N_TILES
    i_n = tl.program_id(0) % N_TILES
    i_slice = i_n // SLICE_TILES
    o_s = (i_n % SLICE_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_s < KS
    o_n = i_slice * KS + o_s
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    if WIDE:
        o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)

    POINTWISE: tl.constexpr = R * S == 1 and PAD_H == 0 and PAD_W == 0
    REDUCTION: tl.constexpr = R * S * CS
    if POINTWISE and STRIDE_H == 1 and STRIDE_W == 1:
        p_x = x + o_m * C + i_slice * CS
        h0 = o_m
        w0 = o_m
    else:
        t = o_m // Q
        h0 = (t % P) * STRIDE_H - PAD_H
        w0 = (o_m % Q) * STRIDE_W - PAD_W
        p_x = x + (((t // P) * H + h0) * W + w0) * C + i_slice * CS
    p_w = w + o_n * REDUCTION

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if CS % BLOCK_K == 0:
        # A step stays inside one tap: its pixel mask does not vary along the channels.
        BLOCKS: tl.constexpr = CS // BLOCK_K
        o_c = tl.arange(0, BLOCK_K)
        for i in range(0, R * S * BLOCKS):
            c0 = (i % BLOCKS) * BLOCK_K
            if POINTWISE:
                m_x = m_m
                o_tap = c0
            else:
                r = (i // BLOCKS) // S * DIL_H
                s = (i // BLOCKS) % S * DIL_W
                m_x = m_m & (h0 >= -r) & (h0 < H - r) & (w0 >= -s) & (w0 < W - s)
                o_tap = (r * W + s) * C + c0
            a = tl.load(p_x[:, None] + (o_tap + o_c)[None, :], mask=m_x[:, None], other=0.0)
            b = tl.load(p_w[None, :] + (i * BLOCK_K + o_c)[:, None], mask=m_n[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        for k0 in range(0, REDUCTION, BLOCK_K):
            o_k = k0 + tl.arange(0, BLOCK_K)
            m_k = o_k < REDUCTION
            m_x = m_m[:, None] & m_k[None, :]
            if POINTWISE:
                o_tap = o_k
            else:
                r = (o_k // CS) // S * DIL_H
                s = (o_k // CS) % S * DIL_W
                h = h0[:, None] + r[None, :]
                v = w0[:, None] + s[None, :]
                m_x = m_x & (h >= 0) & (h < H) & (v >= 0) & (v < W)
                o_tap = (r * W + s) * C + o_k % CS
            a = tl.load(p_x[:, None] + o_tap[None, :], mask=m_x, other=0.0)
            b = tl.load(p_w[None, :] + o_k[:, None], mask=m_k[:, None] & m_n[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)

    z = acc * tl.load(scale + o_n, mask=m_n)[None, :] + tl.load(shift + o_n, mask=m_n)[None, :]
    o_y = o_m[:, None] * K + o_n[None, :]
    m_y = m_m[:, None] & m_n[None, :]
    if HAS_RESIDUAL:
        z += tl.load(residual + o_y, mask=m_y).to(tl.float32)
    tl.store(y + o_y, activate(z, act_param, ACT).to(y.dtype.element_ty), mask=m_y)


@triton.jit
def pointwise_stationary_kernel(
    d_x,  # descriptors: [M, C] in boxes [BLOCK_M, BLOCK_C]
    d_w,  # [K, C] in [BLOCK_N, BLOCK_C]
    d_residual,  # [M, K] in [BLOCK_M, BLOCK_N]
    d_y,
    scale,
    shift,
    counter,  # int32 [columns]
    M,
    act_param,
    K: tl.constexpr,
    ACT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    DYNAMIC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """1x1 with its weights resident: the whole reduction is one dot, so the persistent tile loop is innermost
    and x and the residual of the next tiles are prefetched (`num_stages` on tl.range pipelines any load)."""
    N_TILES: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    i_n = tl.program_id(0) % N_TILES
    o_n = i_n * BLOCK_N
    o_k = o_n + tl.arange(0, BLOCK_N)
    b = d_w.load([o_n, 0])
    b_scale = tl.load(scale + o_k, mask=o_k < K)
    b_shift = tl.load(shift + o_k, mask=o_k < K)
    tiles = tl.cdiv(M, BLOCK_M)
    programs = tl.num_programs(0) // N_TILES
    begin, end, _ = part_of(tl.program_id(0) // N_TILES, tiles, programs, DYNAMIC)
    while begin < tiles:
        for i_m in tl.range(begin, end, programs, num_stages=STAGES):
            a = d_x.load([i_m * BLOCK_M, 0])
            z = tl.dot(a, b.T, input_precision=PRECISION) * b_scale[None, :] + b_shift[None, :]
            if HAS_RESIDUAL:
                z += d_residual.load([i_m * BLOCK_M, o_n]).to(tl.float32)
            d_y.store([i_m * BLOCK_M, o_n], activate(z, act_param, ACT).to(d_y.dtype))
        if DYNAMIC:
            begin, end = claim_part(counter + i_n, tiles, programs)
        else:
            begin = tiles


@triton.jit
def pointwise_persistent_kernel(
    d_x,  # descriptors: [M, C] in boxes [BLOCK_M, BLOCK_K]
    d_w,  # [K, C] in [BLOCK_N, BLOCK_K]
    d_residual,  # [M, K] in [BLOCK_M, BLOCK_N]
    d_y,
    scale,
    shift,
    counter,  # int32 [1]
    M,
    act_param,
    C: tl.constexpr,
    K: tl.constexpr,
    ACT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    DYNAMIC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """1x1 with a loop over the reduction in the persistent tile loop, both pipelined as one (`flatten`)."""
    N_TILES: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    m_tiles = tl.cdiv(M, BLOCK_M)
    tiles = m_tiles * N_TILES
    programs = tl.num_programs(0)
    begin, end, _ = part_of(tl.program_id(0), tiles, programs, DYNAMIC)
    while begin < tiles:
        for tile in tl.range(begin, end, programs, flatten=True):
            group = tile // (GROUP_M * N_TILES)
            rows = min(m_tiles - group * GROUP_M, GROUP_M)
            i_m = group * GROUP_M + (tile % (GROUP_M * N_TILES)) % rows
            o_n = (tile % (GROUP_M * N_TILES)) // rows * BLOCK_N
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k0 in range(0, C, BLOCK_K):
                a = d_x.load([i_m * BLOCK_M, k0])
                b = d_w.load([o_n, k0])
                acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
            o_k = o_n + tl.arange(0, BLOCK_N)
            z = acc * tl.load(scale + o_k, mask=o_k < K)[None, :]
            z += tl.load(shift + o_k, mask=o_k < K)[None, :]
            if HAS_RESIDUAL:
                z += d_residual.load([i_m * BLOCK_M, o_n]).to(tl.float32)
            d_y.store([i_m * BLOCK_M, o_n], activate(z, act_param, ACT).to(d_y.dtype))
        if DYNAMIC:
            begin, end = claim_part(counter, tiles, programs)
        else:
            begin = tiles


@triton.jit
def depthwise_kernel(
    x,
    w,  # [R * S, C]
    scale,
    shift,
    residual,
    y,
    M,
    H,
    W,
    P,
    Q,
    act_param,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    ACT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One input channel an output channel: no matrix product, so fp32 multiply-adds; memory limits it."""
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
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for tap in range(0, R * S):
        r = tap // S * DIL_H
        s = tap % S * DIL_W
        m_x = m_m & (h0 >= -r) & (h0 < H - r) & (w0 >= -s) & (w0 < W - s)
        o_tap = (r * W + s) * C
        a = tl.load(p_x[:, None] + (o_tap + o_c)[None, :], mask=m_x[:, None] & m_c[None, :], other=0.0)
        b = tl.load(w + tap * C + o_c, mask=m_c, other=0.0)
        acc += a.to(tl.float32) * b.to(tl.float32)[None, :]
    z = acc * tl.load(scale + o_c, mask=m_c)[None, :] + tl.load(shift + o_c, mask=m_c)[None, :]
    o_y = o_m[:, None] * C + o_c[None, :]
    m_y = m_m[:, None] & m_c[None, :]
    if HAS_RESIDUAL:
        z += tl.load(residual + o_y, mask=m_y).to(tl.float32)
    tl.store(y + o_y, activate(z, act_param, ACT).to(y.dtype.element_ty), mask=m_y)
