"""add_relu and its backward in the interpreter."""

import pytest
import torch
from oracle import LAYOUTS, assert_close_to_oracle, guarded, integers

from fastres.backends import triton_ops

DTYPES = [torch.float32, torch.float16, torch.float64]


def _tensor(values, layout):
    return values.contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (3, 40, 5, 5)])
def test_forward_and_backward(shape, dtype, layout):
    a, b, grad = (_tensor(torch.randn(shape).to(dtype), layout) for _ in range(3))
    out, check = guarded(shape, dtype, layout=layout)
    triton_ops.add_relu(a, b, out)
    check()
    assert_close_to_oracle(out, (a.double() + b.double()).relu(), (a + b).relu())
    grad_in, check = guarded(shape, dtype, layout=layout)
    triton_ops.add_relu_backward(grad, out, grad_in)
    check()
    assert torch.equal(grad_in, grad * (out > 0))


def test_whole_numbers_are_exact_and_memory_may_be_shared():
    a, b = integers((2, 9, 5, 3), torch.float16), integers((2, 9, 5, 3), torch.float16)
    expected = (a + b).relu()
    triton_ops.add_relu(a, b, a)
    assert torch.equal(a, expected)
    grad = torch.ones_like(b)
    triton_ops.add_relu_backward(grad, a, grad)
    assert torch.equal(grad, (expected > 0).half())


def test_nan_passes_as_in_pytorch():
    a = torch.tensor([[float("nan"), -1.0, float("inf"), -float("inf")]])
    out = torch.empty_like(a)
    triton_ops.add_relu(a, torch.zeros_like(a), out)
    assert out.isnan().tolist() == [[True, False, False, False]] and out[0, 1:].tolist() == [0, torch.inf, 0]
    grad_in = torch.empty_like(a)
    triton_ops.add_relu_backward(torch.ones_like(a), out, grad_in)
    reference = torch.ops.aten.threshold_backward(torch.ones_like(a), out, 0)
    assert torch.equal(grad_in, reference)


def test_empty():
    empty = torch.empty(0, 3, 5, 5)
    triton_ops.add_relu(empty, empty, empty)
    triton_ops.add_relu_backward(empty, empty, empty)
