"""conv1x1(x, w) of stride 1, NHWC, and the batch statistics of each of its channels, from the accumulators.

GEMM view: x [M, C], w [K, C], y [M, K], all row-major; M is the number of pixels. A program walks a chunk of
rows and leaves that chunk's mean and sum of squared deviations per channel, in fp32 and before y is rounded;
`bn_stats_merge_kernel` of `bn_act.py` merges the chunks. The split into chunks and every order of summation
are fixed: two runs give the same bits.

Within a chunk the sums are of acc - shift with the mean of the chunk's first tile as shift (Chan, Golub and
LeVeque, 1983, "Algorithms for Computing the Sample Variance"). A mean of one in t of the values lies within
sqrt((t - 1) var) of the mean of all, so the sums' condition number is at most t, the tiles of a chunk,
whatever the data.
"""

import triton
import triton.language as tl

from .dual import product


@triton.jit
def conv_stats_kernel(
    x,  # descriptor in boxes [BLOCK_M, BLOCK_K], or pointer; so are w ([BLOCK_N, BLOCK_K]) and y
    w,
    y,
    part_mean,  # [chunks, K]
    part_m2,
    M,
    CHUNK,  # rows a program, a multiple of BLOCK_M
    C: tl.constexpr,
    K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WIDE: tl.constexpr,  # 64-bit offsets from the pointers
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,  # of the tile loop where one product is the whole reduction
):
    N_TILES: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    # Column tiles vary fastest: those that share rows of x run together and read them from the L2.
    i_chunk = tl.program_id(0) // N_TILES
    o_n = tl.program_id(0) % N_TILES * BLOCK_N
    o_k = o_n + tl.arange(0, BLOCK_N)
    m_k = o_k < K
    STATIONARY: tl.constexpr = DESCRIPTORS and C <= BLOCK_K
    if STATIONARY:
        b_w = w.load([o_n, 0])
    elif not DESCRIPTORS:
        p_w = w + o_k * C

    # Rows r and r + 8 of a matrix-product fragment are one thread's: adding them first takes no exchange
    # between threads and halves the registers that the sums hold. Threads meet once a chunk.
    shift = tl.zeros((BLOCK_N,), tl.float32)
    s1 = tl.zeros((BLOCK_M // 16, 8, BLOCK_N), tl.float32)
    s2 = tl.zeros((BLOCK_M // 16, 8, BLOCK_N), tl.float32)
    start = i_chunk * CHUNK
    end = min(start + CHUNK, M)
    # One product a tile is pipelined over the tiles; a loop of them is made one loop with that over the tiles.
    for row in tl.range(
        start, end, BLOCK_M, num_stages=STAGES if STATIONARY else None, flatten=DESCRIPTORS and not STATIONARY
    ):
        o_m = row + tl.arange(0, BLOCK_M)
        m_m = o_m < M
        if WIDE:
            o_m = o_m.to(tl.int64)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if STATIONARY:
            acc = tl.dot(x.load([row, 0]), b_w.T, acc, input_precision=PRECISION)
        elif DESCRIPTORS:
            for k0 in range(0, C, BLOCK_K):
                acc = tl.dot(x.load([row, k0]), w.load([o_n, k0]).T, acc, input_precision=PRECISION)
        else:
            acc = product(acc, x + o_m * C, m_m, p_w, m_k, C, BLOCK_K, PRECISION)
        b_y = acc.to(y.dtype if DESCRIPTORS else y.dtype.element_ty)
        if DESCRIPTORS:
            y.store([row, o_n], b_y)
        else:
            tl.store(y + o_m[:, None] * K + o_k[None, :], b_y, mask=m_m[:, None] & m_k[None, :])
        if row == start:
            shift = tl.sum(tl.where(m_m[:, None], acc, 0.0), axis=0) / min(end - start, BLOCK_M)
        away = tl.where(m_m[:, None], acc - shift[None, :], 0.0)
        away = tl.reshape(away, (BLOCK_M // 16, 2, 8, BLOCK_N))
        s1 += tl.sum(away, axis=1)
        s2 += tl.sum(away * away, axis=1)

    count = end - start
    all_s1 = tl.sum(tl.sum(s1, axis=1), axis=0)
    all_s2 = tl.sum(tl.sum(s2, axis=1), axis=0)
    off = all_s1 / count
    o_part = i_chunk * K + o_k
    tl.store(part_mean + o_part, shift + off, mask=m_k)
    tl.store(part_m2 + o_part, all_s2 - all_s1 * off, mask=m_k)
