"""Batch normalisation for training: statistics, act(x * scale + shift + residual), and the backward of both.

x is [M, C] in memory (channels last, M = N * pixels) or [N, C, HW]; parameters and statistics are [C], fp32
(fp64 for fp64 x). Reductions have two stages, a fixed split of the rows and a fixed order of the parts: two
runs give the same bits. Ioffe and Szegedy, 2015, "Batch Normalization".
"""

import triton
import triton.language as tl

from .activation import activate, activate_grad


@triton.jit
def _offsets(o_m, o_c, C, HW, CHANNELS_LAST: tl.constexpr):
    """Element offsets [BLOCK_M, BLOCK_C] of rows o_m and channels o_c."""
    if CHANNELS_LAST:
        return o_m[:, None] * C + o_c[None, :]
    else:
        return ((o_m // HW) * (C * HW) + o_m % HW)[:, None] + o_c[None, :] * HW


@triton.jit
def _rows(start, BLOCK_M: tl.constexpr, WIDE: tl.constexpr):
    o_m = start + tl.arange(0, BLOCK_M)
    if WIDE:
        o_m = o_m.to(tl.int64)
    return o_m


@triton.jit
def bn_stats_kernel(
    x,
    part_mean,  # [chunks, C]
    part_m2,
    M,
    C,
    HW,
    CHUNK,  # rows a program, a multiple of BLOCK_M
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and sum of squared deviations of a chunk of rows (Welford, 1962, row by row in registers)."""
    c_tiles = tl.cdiv(C, BLOCK_C)
    i_chunk = tl.program_id(0) // c_tiles
    o_c = (tl.program_id(0) % c_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    ACC: tl.constexpr = part_mean.dtype.element_ty
    count = tl.zeros((BLOCK_M, 1), ACC)
    mean = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    m2 = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    start = i_chunk * CHUNK
    for row in range(start, min(start + CHUNK, M), BLOCK_M):
        o_m = _rows(row, BLOCK_M, WIDE)
        m_m = (o_m < M)[:, None]
        b_x = tl.load(x + _offsets(o_m, o_c, C, HW, CHANNELS_LAST), mask=m_m & m_c[None, :], other=0.0)
        count += tl.where(m_m, 1.0, 0.0).to(ACC)
        delta = tl.where(m_m, b_x.to(ACC) - mean, 0.0)
        mean += delta / tl.maximum(count, 1.0)
        m2 += delta * (b_x.to(ACC) - mean)
    # The rows of the block are merged by Chan et al., 1979: M2 = sum M2_i + n_i (mean_i - mean)^2.
    total = tl.sum(count, axis=0)
    all_mean = tl.sum(mean * count, axis=0) / total
    away = mean - all_mean[None, :]
    o_part = i_chunk * C + o_c
    tl.store(part_mean + o_part, all_mean, mask=m_c)
    tl.store(part_m2 + o_part, tl.sum(m2 + count * away * away, axis=0), mask=m_c)


@triton.jit
def bn_stats_merge_kernel(
    part_mean, part_m2, mean, var, M, C, CHUNK, chunks, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Biased variance from the chunks' statistics."""
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    ACC: tl.constexpr = mean.dtype.element_ty
    acc = tl.zeros((BLOCK_J, BLOCK_C), ACC)
    for j in range(0, chunks, BLOCK_J):
        o_j = j + tl.arange(0, BLOCK_J)
        weight = tl.maximum(tl.minimum(M - o_j * CHUNK, CHUNK), 0).to(ACC)[:, None]
        m = (o_j < chunks)[:, None] & m_c[None, :]
        acc += weight * tl.load(part_mean + o_j[:, None] * C + o_c[None, :], mask=m, other=0.0)
    all_mean = tl.sum(acc, axis=0) / M
    acc = tl.zeros((BLOCK_J, BLOCK_C), ACC)
    for j in range(0, chunks, BLOCK_J):
        o_j = j + tl.arange(0, BLOCK_J)
        weight = tl.maximum(tl.minimum(M - o_j * CHUNK, CHUNK), 0).to(ACC)[:, None]
        o = o_j[:, None] * C + o_c[None, :]
        m = (o_j < chunks)[:, None] & m_c[None, :]
        away = tl.load(part_mean + o, mask=m, other=0.0) - all_mean[None, :]
        acc += tl.where(m, tl.load(part_m2 + o, mask=m, other=0.0) + weight * away * away, 0.0)
    tl.store(mean + o_c, all_mean, mask=m_c)
    tl.store(var + o_c, tl.sum(acc, axis=0) / M, mask=m_c)


@triton.jit
def _double(bits):
    """An fp64 number from its bits: a float argument arrives as fp32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def bn_finalize_kernel(
    mean,
    var,
    weight,
    bias,
    running_mean,
    running_var,
    invstd,
    scale,
    shift,
    C,
    M,
    momentum_bits,
    eps_bits,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RUNNING: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """invstd = 1 / sqrt(var + eps), scale = weight * invstd, shift = bias - mean * scale, and the running
    statistics, whose variance is unbiased: var * M / (M - 1)."""
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    ACC: tl.constexpr = mean.dtype.element_ty
    b_mean = tl.load(mean + o_c, mask=m_c, other=0.0)
    b_var = tl.load(var + o_c, mask=m_c, other=1.0)
    spread = b_var + _double(eps_bits).to(ACC)
    if ACC == tl.float32:
        b_invstd = 1.0 / tl.sqrt_rn(spread)
    else:
        b_invstd = 1.0 / tl.sqrt(spread)
    b_scale = b_invstd
    if HAS_WEIGHT:
        b_scale = tl.load(weight + o_c, mask=m_c, other=0.0).to(ACC) * b_invstd
    b_shift = -b_mean * b_scale
    if HAS_BIAS:
        b_shift = tl.load(bias + o_c, mask=m_c, other=0.0).to(ACC) - b_mean * b_scale
    tl.store(invstd + o_c, b_invstd, mask=m_c)
    tl.store(scale + o_c, b_scale, mask=m_c)
    tl.store(shift + o_c, b_shift, mask=m_c)
    if HAS_RUNNING:
        momentum = _double(momentum_bits).to(ACC)
        unbiased = (M.to(tl.float64) / (M - 1).to(tl.float64)).to(ACC)
        b_rm = tl.load(running_mean + o_c, mask=m_c, other=0.0).to(ACC)
        b_rv = tl.load(running_var + o_c, mask=m_c, other=0.0).to(ACC)
        b_rm += momentum * (b_mean - b_rm)
        b_rv += momentum * (b_var * unbiased - b_rv)
        tl.store(running_mean + o_c, b_rm.to(running_mean.dtype.element_ty), mask=m_c)
        tl.store(running_var + o_c, b_rv.to(running_var.dtype.element_ty), mask=m_c)


@triton.jit
def bn_act_fwd_kernel(
    x,
    residual,
    scale,
    shift,
    out,
    M,
    C,
    HW,
    ACT: tl.constexpr,
    ACT_PARAM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = act(x * scale + shift + residual)."""
    c_tiles = tl.cdiv(C, BLOCK_C)
    o_c = (tl.program_id(0) % c_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_m = _rows((tl.program_id(0) // c_tiles) * BLOCK_M, BLOCK_M, WIDE)
    m_c = o_c < C
    m = (o_m < M)[:, None] & m_c[None, :]
    o = _offsets(o_m, o_c, C, HW, CHANNELS_LAST)
    ACC: tl.constexpr = scale.dtype.element_ty
    b_scale = tl.load(scale + o_c, mask=m_c)[None, :]
    b_shift = tl.load(shift + o_c, mask=m_c)[None, :]
    z = tl.load(x + o, mask=m).to(ACC) * b_scale + b_shift
    if HAS_RESIDUAL:
        z += tl.load(residual + o, mask=m).to(ACC)
    tl.store(out + o, activate(z, ACT_PARAM, ACT).to(out.dtype.element_ty), mask=m)


@triton.jit
def _grad_z(
    grad,
    xhat,
    residual,
    out,
    o,
    m,
    b_weight,
    b_bias,
    ACT: tl.constexpr,
    ACT_PARAM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_OUT: tl.constexpr,
):
    """dz = grad * act'(z): ReLU's mask comes from its output, otherwise z is computed again."""
    g = tl.load(grad + o, mask=m, other=0.0).to(xhat.dtype)
    if ACT == 0:
        dz = g
    elif ACT == 1 and HAS_OUT:
        dz = tl.where(tl.load(out + o, mask=m, other=0.0) <= 0, 0.0, g)
    else:
        z = xhat * b_weight + b_bias
        if HAS_RESIDUAL:
            z += tl.load(residual + o, mask=m, other=0.0).to(xhat.dtype)
        dz = g * activate_grad(z, ACT_PARAM, ACT)
    return dz


@triton.jit
def _affine(weight, bias, o_c, m_c, ACC: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    b_weight = tl.full((1, o_c.shape[0]), 1.0, ACC)
    b_bias = tl.full((1, o_c.shape[0]), 0.0, ACC)
    if HAS_WEIGHT:
        b_weight = tl.load(weight + o_c, mask=m_c, other=0.0).to(ACC)[None, :]
    if HAS_BIAS:
        b_bias = tl.load(bias + o_c, mask=m_c, other=0.0).to(ACC)[None, :]
    return b_weight, b_bias


@triton.jit
def bn_act_bwd_reduce_kernel(
    grad,
    x,
    residual,
    out,
    mean,
    invstd,
    weight,
    bias,
    part_dy,  # [chunks, C]
    part_dy_xhat,
    grad_residual,
    M,
    C,
    HW,
    CHUNK,
    ACT: tl.constexpr,
    ACT_PARAM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GRAD_RESIDUAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of dz and dz * xhat over a chunk of rows; grad_residual = dz."""
    c_tiles = tl.cdiv(C, BLOCK_C)
    i_chunk = tl.program_id(0) // c_tiles
    o_c = (tl.program_id(0) % c_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    ACC: tl.constexpr = mean.dtype.element_ty
    b_mean = tl.load(mean + o_c, mask=m_c, other=0.0)[None, :]
    b_invstd = tl.load(invstd + o_c, mask=m_c, other=0.0)[None, :]
    b_weight, b_bias = _affine(weight, bias, o_c, m_c, ACC, HAS_WEIGHT, HAS_BIAS)
    sum_dy = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    sum_dy_xhat = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    start = i_chunk * CHUNK
    for row in range(start, min(start + CHUNK, M), BLOCK_M):
        o_m = _rows(row, BLOCK_M, WIDE)
        m = (o_m < M)[:, None] & m_c[None, :]
        o = _offsets(o_m, o_c, C, HW, CHANNELS_LAST)
        xhat = (tl.load(x + o, mask=m, other=0.0).to(ACC) - b_mean) * b_invstd
        dz = _grad_z(grad, xhat, residual, out, o, m, b_weight, b_bias, ACT, ACT_PARAM, HAS_RESIDUAL, HAS_OUT)
        if HAS_GRAD_RESIDUAL:
            tl.store(grad_residual + o, dz.to(grad_residual.dtype.element_ty), mask=m)
        sum_dy += dz
        sum_dy_xhat += tl.where(m, dz * xhat, 0.0)
    o_part = i_chunk * C + o_c
    tl.store(part_dy + o_part, tl.sum(sum_dy, axis=0), mask=m_c)
    tl.store(part_dy_xhat + o_part, tl.sum(sum_dy_xhat, axis=0), mask=m_c)


@triton.jit
def bn_act_bwd_merge_kernel(
    part_dy,
    part_dy_xhat,
    sum_dy,
    sum_dy_xhat,
    C,
    chunks,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    ACC: tl.constexpr = sum_dy.dtype.element_ty
    acc = tl.zeros((BLOCK_J, BLOCK_C), ACC)
    acc_xhat = tl.zeros((BLOCK_J, BLOCK_C), ACC)
    for j in range(0, chunks, BLOCK_J):
        o_j = j + tl.arange(0, BLOCK_J)
        o = o_j[:, None] * C + o_c[None, :]
        m = (o_j < chunks)[:, None] & m_c[None, :]
        acc += tl.load(part_dy + o, mask=m, other=0.0)
        acc_xhat += tl.load(part_dy_xhat + o, mask=m, other=0.0)
    tl.store(sum_dy + o_c, tl.sum(acc, axis=0), mask=m_c)
    tl.store(sum_dy_xhat + o_c, tl.sum(acc_xhat, axis=0), mask=m_c)


@triton.jit
def bn_act_bwd_kernel(
    grad,
    x,
    residual,
    out,
    mean,
    invstd,
    weight,
    bias,
    mean_dy,
    mean_dy_xhat,
    grad_x,
    grad_residual,
    M,
    C,
    HW,
    ACT: tl.constexpr,
    ACT_PARAM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATS: tl.constexpr,  # false: the statistics are constants
    HAS_GRAD_RESIDUAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = weight * invstd * (dz - mean_dy - xhat * mean_dy_xhat), grad_residual = dz."""
    c_tiles = tl.cdiv(C, BLOCK_C)
    o_c = (tl.program_id(0) % c_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_m = _rows((tl.program_id(0) // c_tiles) * BLOCK_M, BLOCK_M, WIDE)
    m_c = o_c < C
    m = (o_m < M)[:, None] & m_c[None, :]
    o = _offsets(o_m, o_c, C, HW, CHANNELS_LAST)
    ACC: tl.constexpr = mean.dtype.element_ty
    b_mean = tl.load(mean + o_c, mask=m_c, other=0.0)[None, :]
    b_invstd = tl.load(invstd + o_c, mask=m_c, other=0.0)[None, :]
    b_weight, b_bias = _affine(weight, bias, o_c, m_c, ACC, HAS_WEIGHT, HAS_BIAS)
    xhat = (tl.load(x + o, mask=m, other=0.0).to(ACC) - b_mean) * b_invstd
    dz = _grad_z(grad, xhat, residual, out, o, m, b_weight, b_bias, ACT, ACT_PARAM, HAS_RESIDUAL, HAS_OUT)
    if HAS_GRAD_RESIDUAL:
        tl.store(grad_residual + o, dz.to(grad_residual.dtype.element_ty), mask=m)
    if HAS_STATS:
        b_dy = tl.load(mean_dy + o_c, mask=m_c, other=0.0)[None, :]
        b_dy_xhat = tl.load(mean_dy_xhat + o_c, mask=m_c, other=0.0)[None, :]
        dz = dz - b_dy - xhat * b_dy_xhat
    tl.store(grad_x + o, (b_weight * b_invstd * dz).to(grad_x.dtype.element_ty), mask=m)
