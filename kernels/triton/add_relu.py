"""out = max(a + b, 0) and its backward, over dense memory of any layout."""

import triton
import triton.language as tl


@triton.jit
def add_relu_fwd_kernel(a, b, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK
    o = tl.arange(0, BLOCK)
    m = o < n - i
    b_a = tl.load(a + i + o, mask=m)
    b_b = tl.load(b + i + o, mask=m)
    if b_a.dtype != tl.float64:
        b_a = b_a.to(tl.float32)
        b_b = b_b.to(tl.float32)
    z = tl.maximum(b_a + b_b, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + i + o, z.to(out.dtype.element_ty), mask=m)


@triton.jit
def add_relu_bwd_kernel(grad, out, grad_in, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK
    o = tl.arange(0, BLOCK)
    m = o < n - i
    b_out = tl.load(out + i + o, mask=m)
    b_grad = tl.load(grad + i + o, mask=m)
    # Not `out > 0`: a NaN lets the gradient pass, as in PyTorch.
    tl.store(grad_in + i + o, tl.where(b_out <= 0, 0.0, b_grad).to(grad_in.dtype.element_ty), mask=m)
