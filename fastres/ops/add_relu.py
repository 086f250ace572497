"""add_relu: out = max(a + b, 0), the end of every residual block."""

from __future__ import annotations

import torch
from torch import Tensor

from . import primitives
from .library import register
from .tensors import check_float, check_same, dense, like


def add_relu(a: Tensor, b: Tensor) -> Tensor:
    """max(a + b, 0) in one pass over memory, instead of PyTorch's two.

    Args:
        a: any shape; fp16, bf16, fp32 or fp64. NCHW or channels_last memory is kept, anything else is copied.
        b: the shape, dtype and device of `a`.

    Returns:
        A new tensor with the memory format of `a`. Differentiable any number of times; the backward keeps the
        output only. Under autocast the wider of the two dtypes is computed in.

    Raises:
        TypeError, ValueError: dtype, shape or device do not fit.
    """
    return _op(a, b)


def add_relu_(a: Tensor, b: Tensor) -> Tensor:
    """`add_relu` that overwrites and returns `a`.

    As with PyTorch's in-place ops, autograd refuses it where `a` is a leaf that requires a gradient or where
    the old value of `a` is needed by another backward (RuntimeError).
    """
    _op_(a, b)
    return a


def _check(a: Tensor, b: Tensor) -> None:
    check_float("a", a)
    check_same("b", b, a, "a")


def _impl(a: Tensor, b: Tensor) -> Tensor:
    _check(a, b)
    a = dense(a)
    out = torch.empty_like(a)
    _run(a, like(b, a), out)
    return out


def _run(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.numel():
        if a.dim() < 2:
            a, b, out = (t.view(1, -1) for t in (a, b, out))
        primitives.get("add_relu", a)(a, b, out)


def _fake(a: Tensor, b: Tensor) -> Tensor:
    _check(a, b)
    return torch.empty_like(dense(a))


def _impl_(a: Tensor, b: Tensor) -> None:
    _check(a, b)
    work = dense(a)
    _run(work, like(b, work), work)
    if work is not a:
        a.copy_(work)


def _backward(grad: Tensor, out: Tensor) -> Tensor:
    # PyTorch's own mask kernel: one pass, differentiable, and the compiler can fuse it.
    return torch.ops.aten.threshold_backward(grad, out, 0)


class _AddReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, below, a, b):
        out = below(a, b)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, grad):
        grad = _backward(grad, *ctx.saved_tensors)
        return None, grad if ctx.needs_input_grad[1] else None, grad if ctx.needs_input_grad[2] else None


class _AddReLUInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, below, a, b):
        ctx.mark_dirty(a)
        below(a, b)
        ctx.save_for_backward(a)
        return a

    backward = _AddReLU.backward


def _autograd_(below, a: Tensor, b: Tensor) -> None:
    _AddReLUInPlace.apply(below, a, b)


def _autocast(_dtype: torch.dtype, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.dtype == b.dtype or not (a.is_floating_point() and b.is_floating_point()):
        return a, b
    widest = torch.promote_types(a.dtype, b.dtype)
    return a.to(widest), b.to(widest)


_op = register(
    "add_relu(Tensor a, Tensor b) -> Tensor", _impl, _fake, autograd=_AddReLU.apply, autocast=_autocast
)
_op_ = register("add_relu_(Tensor(a!) a, Tensor b) -> ()", _impl_, _check, autograd=_autograd_)
