"""Activations and their derivatives, by code: the order is the one of fastres.activation.KINDS."""

import triton
import triton.language as tl


@triton.jit
def activate(z, act_param, ACT: tl.constexpr):
    """act(z) for fp32 or fp64 z; NaN stays NaN, as in PyTorch."""
    if ACT == 1:  # relu
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == 2:  # relu6
        z = tl.minimum(
            tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL), 6.0, propagate_nan=tl.PropagateNan.ALL
        )
    elif ACT == 3:  # silu
        z = z / (1.0 + tl.exp(-z))
    elif ACT == 4:  # gelu: z * Phi(z)
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACT == 5:  # leaky_relu
        z = tl.where(z > 0, z, z * act_param)
    elif ACT == 6:  # gelu_tanh: 0.5 z (1 + tanh u) = z sigmoid(2 u), u = sqrt(2 / pi) (z + 0.044715 z^3)
        z = z / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
    elif ACT == 7:  # hardswish
        gate = tl.minimum(
            tl.maximum(z + 3.0, 0.0, propagate_nan=tl.PropagateNan.ALL),
            6.0,
            propagate_nan=tl.PropagateNan.ALL,
        )
        z = z * gate / 6.0
    return z


@triton.jit
def activate_grad(z, act_param, ACT: tl.constexpr):
    """d act(z) / dz, with PyTorch's choice at the kinks."""
    if ACT == 0:
        d = tl.full(z.shape, 1.0, z.dtype)
    elif ACT == 1:
        d = tl.where(z > 0, 1.0, 0.0)
    elif ACT == 2:
        d = tl.where((z > 0) & (z < 6), 1.0, 0.0)
    elif ACT == 3:
        s = 1.0 / (1.0 + tl.exp(-z))
        d = s * (1.0 + z * (1.0 - s))
    elif ACT == 4:  # Phi(z) + z phi(z)
        d = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACT == 5:
        d = tl.where(z > 0, 1.0, act_param)
    elif ACT == 6:
        u = 1.5957691216057308 * (z + 0.044715 * z * z * z)
        s = 1.0 / (1.0 + tl.exp(-u))
        d = s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    else:
        d = tl.where(z <= -3, 0.0, tl.where(z < 3, z / 3.0 + 0.5, 1.0))
    return d
