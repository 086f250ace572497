"""The stem in one kernel: max_pool3x3/2(relu(conv7x7/2(x, w) + shift)), 3 -> 64 channels; the convolution's
output is never written. x is NHWC or NCHW (PLANAR), in the compute type or uint8; y is NHWC.

Im2col without staging. For filter row r the 7 taps x 3 channels of output column q are 21 adjacent
elements of input row 2p - 3 + r, from 6q - 9 on. The kernel takes the 24 from 6q - 10 on (even: 4-byte
loads) with zero weights for the three others: 3 groups of 8, K = 7 * 24 = 168, padded to 11 steps of 16; in
the padding stand ones, and in the weights there the shift, as a sum of 16-bit numbers: it takes no registers
then. PLANAR, the three groups of a filter row are the three channels, each 8 elements from 2q - 4 on, the
first with zero weight. (An infinity or NaN of the image meets those zero weights too, and so reaches one
convolution column further than it should.) Loads go from global memory straight into the registers of
wgmma's A operand, 4 a warp and step, all at immediate offsets from one base; only the weights are in shared
memory.

uint8 images are normalised in registers, x * factor[c] + offset[c], rounded to the compute type as a separate
pass would store it; outside of the image stays exactly zero.

The pool happens in registers. Rows of warp w are pooled columns 14w - 1 … 14w + 14 (16 rows, 14 results:
four warps make 56 columns). One product holds the even convolution columns 2 pw, another the odd ones 2 pw
+ 1; convolution rows are kept as a running maximum in 16 bits (what the separate convolution would have
stored), and the missing neighbour 2 pw - 1 is the odd product one row up: a rotation by 4 lanes. ReLU
commutes with the maximum and comes last.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

STEPS = gl.constexpr(11)


@gluon.jit
def pin(v):
    """Defines the packed registers here: the volatile move keeps LLVM from sinking the packing of pairs in
    between the products, which makes ptxas serialise them."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [v], dtype=v.dtype, is_pure=False, pack=2)


@gluon.jit
def row_above(v):
    """Of packed pairs: the value that the lane 4 below holds, cyclically; one row up among 8."""
    return gl.inline_asm_elementwise(
        "{ .reg .u32 l; mov.u32 l, %laneid; add.u32 l, l, 28; shfl.sync.idx.b32 $0, $1, l, 31, 0xffffffff; }",
        "=r,r",
        [v],
        dtype=v.dtype,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def max16(a, b):
    """Maximum of packed pairs; a NaN stays one."""
    if a.dtype == gl.bfloat16:
        out = gl.inline_asm_elementwise(
            "max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        out = gl.inline_asm_elementwise(
            "max.NaN.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.float16, is_pure=True, pack=2
        )
    return out


@gluon.jit
def row_of_eight(v):
    """0 … 7 along axis 1 of v [4, 8, C]."""
    i = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, v.type.layout)))
    return gl.expand_dims(gl.expand_dims(i, 0), 2)


@gluon.jit
def halves(v):
    """[64, 64] in the accumulator's layout → rows 0-7 and 8-15 of every warp's 16, each [4, 8, 64]:
    registers renamed."""
    return gl.split(gl.permute(gl.reshape(v, (4, 2, 8, 64)), (0, 2, 3, 1)))


@gluon.jit
def lane_pairs(k):
    """0 … 3: which pairs of elements 2t, 2t + 1 of k [16] are a lane's. What depends on them takes one register."""
    return gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, gl.reshape(k, (2, 4, 2)).type.layout)))


@gluon.jit
def for_elements(even, odd, k, A: gl.constexpr):
    """[16]: `even` and `odd` [4], of a lane's pairs, in turns."""
    k3 = gl.reshape(k, (2, 4, 2))
    even = gl.expand_dims(gl.expand_dims(even, 0), 2)
    odd = gl.expand_dims(gl.expand_dims(odd, 0), 2)
    return gl.convert_layout(gl.reshape(gl.where(k3 % 2 == 0, even, odd), (16,)), gl.SliceLayout(0, A))


@gluon.jit
def load_step(
    row, p, e0, m8, k, k8, norm, i: gl.constexpr, ODD: gl.constexpr, H: gl.constexpr, W: gl.constexpr,
    PLANAR: gl.constexpr, NORMALIZE: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """A operand [64, 16] of step i: two groups of 8 elements; group g is number g % 3 of filter row g // 3
    (there is no row 7: ones). row: pointers [64, 16] to input row 2p - 3, element e0 + k; every address is
    such a pointer plus a constant. ODD: the window of the odd column. norm: (factor, offset) [16] of each of
    the three groups of a row."""
    LINE: gl.constexpr = W if PLANAR else 3 * W
    # From a group of a filter row to the next: in memory, and along the line that must not be left.
    STEP: gl.constexpr = H * W if PLANAR else 8
    ALONG: gl.constexpr = 0 if PLANAR else 8
    AT: gl.constexpr = (2 if PLANAR else 6) * ODD
    ra: gl.constexpr = (2 * i) // 3
    ga: gl.constexpr = (2 * i) % 3
    rb: gl.constexpr = (2 * i + 1) // 3
    gb: gl.constexpr = (2 * i + 1) % 3
    h = 2 * p - 3
    e = gl.expand_dims(e0, 1) + gl.expand_dims(k + k8 * (ALONG * (gb - ga) - 8) + (ALONG * ga + AT), 0)
    offset = gl.expand_dims(k8 * ((rb - ra) * LINE + STEP * (gb - ga)) + (ra * LINE + STEP * ga + AT), 0)
    offset = offset + gl.expand_dims(m8 * (32 if PLANAR else 96), 1)
    inside = (e >= 0) & (e < LINE)
    if rb == ra:
        inside = inside & ((h + ra >= 0) & (h + ra < H))
    elif rb == 7:
        inside = inside & gl.expand_dims((k8 == 0) & ((h + ra >= 0) & (h + ra < H)), 0)
    else:
        hk = h + ra + k8 * (rb - ra)
        inside = inside & gl.expand_dims((hk >= 0) & (hk < H), 0)
    if NORMALIZE:
        a = gl.load(row + offset, mask=inside, other=0).to(gl.float32)
        factor = gl.where(k8 == 0, norm[2 * ga], norm[2 * gb])
        shift = gl.where(k8 == 0, norm[2 * ga + 1], norm[2 * gb + 1])
        a = (a * gl.expand_dims(factor, 0) + gl.expand_dims(shift, 0)).to(dtype)
        a = gl.where(inside, a, 0.0).to(dtype)
    else:
        a = gl.load(row + offset, mask=inside, other=0.0)
    if rb == 7:
        a = gl.where(gl.expand_dims(k8 == 1, 0), 1.0, a).to(dtype)
    return a


@gluon.jit
def products(
    acc, row, p, e0, m8, k, k8, norm, w_buf, FIRST: gl.constexpr, LAST: gl.constexpr, ODD: gl.constexpr,
    H: gl.constexpr, W: gl.constexpr, PLANAR: gl.constexpr, NORMALIZE: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """acc + the steps [FIRST, LAST) of the reduction."""
    loaded = ()
    for i in gl.static_range(FIRST, LAST):
        loaded = loaded + (load_step(row, p, e0, m8, k, k8, norm, i, ODD, H, W, PLANAR, NORMALIZE, dtype),)  # noqa: RUF005
    a = ()
    for i in gl.static_range(LAST - FIRST):
        a = a + (pin(loaded[i]),)  # noqa: RUF005
    for i in gl.static_range(LAST - FIRST):
        w = w_buf.index(FIRST + i).permute((1, 0))
        acc = warpgroup_mma(a[i], w, acc, use_acc=FIRST + i > 0, is_async=True)
    return warpgroup_mma_wait(0, deps=(acc,))


@gluon.jit
def conv_columns(
    row, p, e0, m8, k, k8, norm, w_buf, ODD: gl.constexpr, H: gl.constexpr, W: gl.constexpr, PLANAR: gl.constexpr,
    NORMALIZE: gl.constexpr, ACC: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """Convolution row p at the even (or ODD) columns of the 64 pooled ones: [64, 64]."""
    acc = gl.zeros((64, 64), gl.float32, ACC)
    if NORMALIZE:
        # It takes registers: with all steps at once, and on Triton 3.6 with four, they spill.
        acc = products(acc, row, p, e0, m8, k, k8, norm, w_buf, 0, 3, ODD, H, W, PLANAR, NORMALIZE, dtype)
        acc = products(acc, row, p, e0, m8, k, k8, norm, w_buf, 3, 6, ODD, H, W, PLANAR, NORMALIZE, dtype)
        acc = products(acc, row, p, e0, m8, k, k8, norm, w_buf, 6, 9, ODD, H, W, PLANAR, NORMALIZE, dtype)
        acc = products(acc, row, p, e0, m8, k, k8, norm, w_buf, 9, STEPS, ODD, H, W, PLANAR, NORMALIZE, dtype)
    else:
        acc = products(acc, row, p, e0, m8, k, k8, norm, w_buf, 0, STEPS, ODD, H, W, PLANAR, NORMALIZE, dtype)
    return acc


@gluon.jit
def conv_row(
    x, p, e0, m8, k, k8, norm, w_buf, H: gl.constexpr, W: gl.constexpr, PLANAR: gl.constexpr,
    NORMALIZE: gl.constexpr, ACC: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """Convolution row p plus shift, in 16 bits: even columns, odd columns."""
    row = x + (2 * p - 3) * (W if PLANAR else 3 * W)
    even = conv_columns(row, p, e0, m8, k, k8, norm, w_buf, 0, H, W, PLANAR, NORMALIZE, ACC, dtype)
    odd = conv_columns(row, p, e0, m8, k, k8, norm, w_buf, 1, H, W, PLANAR, NORMALIZE, ACC, dtype)
    return even.to(dtype), odd.to(dtype)


@gluon.jit
def stem_pool_kernel(
    x, w, norm, y, H: gl.constexpr, W: gl.constexpr, ROWS: gl.constexpr, PLANAR: gl.constexpr,
    NORMALIZE: gl.constexpr,
):  # fmt: skip
    """x [N, H, W, 3] or PLANAR [N, 3, H, W], y [N, P2, Q2, 64], w [11, 64, 16] with BN's scale and shift, norm:
    fp32 factor [3] and offset [3], read if NORMALIZE. A program of 4 warps makes ROWS pooled rows of 56 pooled
    columns; the grid is N * ceil(P2 / ROWS) * ceil(Q2 / 56)."""
    dtype: gl.constexpr = w.dtype.element_ty
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    WEIGHTS: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    P1: gl.constexpr = (H + 1) // 2
    Q1: gl.constexpr = (W + 1) // 2
    PH: gl.constexpr = (P1 + 1) // 2
    PW: gl.constexpr = (Q1 + 1) // 2
    DOWN: gl.constexpr = (PH + ROWS - 1) // ROWS
    ACROSS: gl.constexpr = (PW + 55) // 56
    w_buf = gl.allocate_shared_memory(dtype, [STEPS, 64, 16], gl.NVMMASharedLayout(32, 16, 2))
    o_n = gl.arange(0, 64, gl.SliceLayout(1, WEIGHTS))
    o_w = gl.arange(0, 16, gl.SliceLayout(0, WEIGHTS))
    for i in gl.static_range(STEPS):
        w_buf.index(i).store(gl.load(w + i * 1024 + gl.expand_dims(o_n, 1) * 16 + gl.expand_dims(o_w, 0)))
    fence_async_shared()
    pid = gl.program_id(0)
    left = pid % ACROSS * 56
    strip = pid // ACROSS
    n = strip // DOWN
    top = strip % DOWN * ROWS
    bottom = gl.minimum(top + ROWS, PH)
    m = gl.arange(0, 64, gl.SliceLayout(1, A))
    k = gl.arange(0, 16, gl.SliceLayout(0, A))
    k8 = k // 8
    pixels = left + (m // 16) * 14 + (m % 16) - 1
    # Rows 8 to 15 of a warp and elements 8 to 15 lie a constant after the others: one base serves a thread.
    m8 = m % 16 // 8
    if PLANAR:
        e0 = pixels * 4 - 4
        first = e0 - m8 * 32
    else:
        e0 = pixels * 12 - 10
        first = e0 - m8 * 96
    norms = ()
    if NORMALIZE:
        # (factor, offset) of the three channels, as seen from a lane's pairs of elements 2t, 2t + 1: NHWC, number i is
        # that of channel (2t + i) % 3, and element 1 of a filter row is tap 0's first; group g begins with 2g + 2.
        pair = 2 * lane_pairs(k)
        seen = ()
        for i in gl.static_range(3):
            channel = pair * 0 + i if PLANAR else (pair + i) % 3
            seen = seen + (gl.load(norm + channel), gl.load(norm + 3 + channel))  # noqa: RUF005
        for g in gl.static_range(3):
            for i in gl.static_range(2):
                even = seen[2 * (g if PLANAR else (2 * g + 2) % 3) + i]
                odd = seen[2 * (g if PLANAR else (2 * g + 3) % 3) + i]
                norms = norms + (for_elements(even, odd, k, A),)  # noqa: RUF005
    image = x + n.to(gl.int64) * (H * W * 3)
    window = image + (gl.expand_dims(first, 1) + gl.expand_dims(k - k8 * 8, 0))
    # The odd column beside pooled column 0 is convolution column -1: padding. So is the last one where the
    # number of columns is odd.
    o_c = gl.arange(0, 64, gl.SliceLayout(1, ACC))
    padding = (o_c == 0) & (left == 0)
    if Q1 % 2 == 1:
        padding = padding | (left + (o_c // 16) * 14 + (o_c % 16) - 1 == PW - 1)
    padding = gl.expand_dims(padding, 1)
    o_m = gl.arange(0, 64, gl.SliceLayout(1, STORED))
    o_k = gl.arange(0, 64, gl.SliceLayout(0, STORED))
    pw = left + (o_m // 16) * 14 + (o_m % 16) - 1
    kept = gl.expand_dims((o_m % 16 >= 1) & (o_m % 16 <= 14) & (pw < PW), 1)
    lowest = gl.full((64, 64), float("-inf"), dtype, ACC)
    zero = gl.full((64, 64), 0.0, dtype, ACC)
    even, odd = conv_row(
        window, 2 * top - 1, e0, m8, k, k8, norms, w_buf, H, W, PLANAR, NORMALIZE, ACC, dtype
    )
    if top == 0:
        even = lowest
        odd = lowest
    for ph in range(top, bottom):
        e, o = conv_row(window, 2 * ph, e0, m8, k, k8, norms, w_buf, H, W, PLANAR, NORMALIZE, ACC, dtype)
        best_e = max16(even, e)
        best_o = max16(odd, o)
        even, odd = conv_row(
            window, 2 * ph + 1, e0, m8, k, k8, norms, w_buf, H, W, PLANAR, NORMALIZE, ACC, dtype
        )
        if P1 % 2 == 1:
            if 2 * ph + 1 == P1:
                even = lowest
                odd = lowest
        best_e = max16(best_e, even)
        best_o = gl.where(padding, lowest, max16(best_o, odd))
        b0, b1 = halves(max16(max16(best_e, best_o), zero))
        o0, o1 = halves(best_o)
        r0 = row_above(o0)
        r1 = row_above(o1)
        b0 = max16(b0, r0)
        # Row 8's upper neighbour is row 7, in the other half.
        b1 = max16(b1, gl.where(row_of_eight(r0) == 0, r0, r1))
        out = gl.reshape(gl.permute(gl.join(b0, b1), (0, 3, 1, 2)), (64, 64))
        out = gl.convert_layout(out, STORED)
        at = y + (n * PH + ph).to(gl.int64) * (PW * 64)
        gl.store(at + gl.expand_dims(pw * 64, 1) + gl.expand_dims(o_k, 0), out, mask=kept)
