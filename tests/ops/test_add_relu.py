"""add_relu: values, gradients and refusals."""

import pytest
import torch
from oracle import assert_close_to_oracle

from fastres import ops

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 3, 7, 9), (1, 8, 1, 1), (0, 4, 3, 3), (2, 0, 3, 3), (5,), (), (2, 3, 4), (2, 3, 2, 3, 5)]


def layouts(shape, dtype):
    """The same values in every kind of memory that a caller may bring."""
    x = torch.randn(shape).to(dtype)
    yield "contiguous", x
    if x.dim() == 4:
        yield "channels_last", x.contiguous(memory_format=torch.channels_last)
        yield "strided", torch.randn(*shape[:3], 2 * shape[3]).to(dtype)[..., ::2]
        yield "expanded", torch.randn(shape[0], shape[1], 1, 1).to(dtype).expand(shape)
    if x.dim() == 5:
        yield "channels_last_3d", x.contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_relu_equals_fp64_when_layouts_differ(backend, dtype, shape):
    for name, a in layouts(shape, dtype):
        for other, b in layouts(shape, dtype):
            out = ops.add_relu(a, b)
            ref = torch.relu(a.double() + b.double())
            assert_close_to_oracle(out, ref, torch.relu(a + b), what=f"{name} + {other}")
            assert out.dtype == dtype
            if name in ("contiguous", "channels_last", "channels_last_3d"):
                assert out.stride() == torch.empty_like(a).stride()


def test_nan_and_infinity_pass_as_in_pytorch(backend):
    a = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1.0]])
    b = torch.tensor([[1.0, -float("inf"), 1.0, float("inf")]])
    torch.testing.assert_close(ops.add_relu(a, b), torch.relu(a + b), rtol=0, atol=0, equal_nan=True)


def test_add_relu_gradients_are_exact_twice():
    a, b = (torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(ops.add_relu, (a, b))
    assert torch.autograd.gradgradcheck(ops.add_relu, (a, b))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_equal_pytorch_when_the_output_gradient_is_expanded(backend, dtype):
    a, b = (torch.randn(2, 3, 4, 5).to(dtype).requires_grad_() for _ in range(2))
    a2, b2 = (t.detach().clone().requires_grad_() for t in (a, b))
    ops.add_relu(a, b).sum().backward()
    torch.relu(a2 + b2).sum().backward()
    assert torch.equal(a.grad, a2.grad) and torch.equal(b.grad, b2.grad)


def test_in_place_writes_into_a_and_is_differentiable(backend):
    leaf, b = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 4, 5, requires_grad=True)
    a = leaf * 2
    where, version = a.data_ptr(), a._version
    assert ops.add_relu_(a, b) is a
    assert a.data_ptr() == where and a._version > version
    torch.testing.assert_close(a, torch.relu(leaf * 2 + b), rtol=0, atol=0)
    a.sum().backward()
    assert torch.equal(leaf.grad, 2.0 * (a > 0)) and torch.equal(b.grad, (a > 0).float())


def test_in_place_takes_strided_memory(backend):
    whole = torch.randn(2, 3, 4, 6)
    a, b = whole[..., ::2], torch.randn(2, 3, 4, 3)
    want, untouched = torch.relu(a + b), whole[..., 1::2].clone()
    ops.add_relu_(a, b)
    assert torch.equal(whole[..., ::2], want) and torch.equal(whole[..., 1::2], untouched)


def test_in_place_is_refused_where_autograd_needs_the_old_value():
    leaf = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf"):
        ops.add_relu_(leaf, torch.zeros(3, 4))
    kept = torch.sigmoid(leaf)  # its backward reads its output
    ops.add_relu_(kept, torch.zeros(3, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


def test_autocast_takes_the_wider_dtype():
    a, b = torch.randn(2, 3).bfloat16(), torch.randn(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.add_relu(a, b).dtype == torch.float32


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (
            torch.zeros(2, 3),
            torch.zeros(2, 1),
            ValueError,
            r"b: expected the shape of a, \(2, 3\), got \(2, 1\)",
        ),
        (
            torch.zeros(2),
            torch.zeros(2).half(),
            TypeError,
            "b: expected the dtype of a, torch.float32, got torch.float16",
        ),
        (torch.zeros(2).int(), torch.zeros(2).int(), TypeError, "a: expected float16.*got torch.int32"),
        (
            torch.zeros(2),
            torch.zeros(2, device="meta"),
            ValueError,
            "b: expected the device of a, cpu, got meta",
        ),
    ],
)
def test_bad_input_is_refused_by_name(a, b, error, message):
    for op in (ops.add_relu, ops.add_relu_):
        with pytest.raises(error, match=message):
            op(a, b)
