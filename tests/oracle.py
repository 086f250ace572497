"""What every numerical test compares with: fp64 PyTorch, and a bound that is derived instead of guessed.

    |out - ref| <= max(1.5 x PyTorch's own error in that dtype, 2 eps_out |ref| + c sqrt(K) eps_acc sum|a||b|)

element by element, and the worst image's relative norm at most 1.5 x PyTorch's own. `ref` is the same
mathematics in fp64 on the very inputs (already rounded to their dtype) that the kernel saw.
"""

import math
from collections.abc import Callable, Sequence

import torch

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
_GUARD = 256  # elements before and after a guarded tensor


def accumulation_eps(dtype: torch.dtype) -> float:
    """Rounding of the accumulator that a kernel of this dtype has to keep: fp64 for fp64, else fp32."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def _image_norms(t: torch.Tensor) -> torch.Tensor:
    return t.reshape(t.shape[0], -1).norm(dim=1) if t.dim() > 1 else t.norm().reshape(1)


def relative_norm(out: torch.Tensor, ref64: torch.Tensor) -> float:
    """Worst image's ||out - ref|| / ||ref|| (a vector counts as one image); 0 for empty tensors."""
    if ref64.numel() == 0:
        return 0.0
    error = _image_norms(out.detach().cpu().double() - ref64.detach().cpu())
    norm = _image_norms(ref64.detach().cpu())
    return (error / norm.clamp_min(torch.finfo(torch.float64).tiny)).where(error > 0, 0.0).max().item()


def assert_close_to_oracle(
    out: torch.Tensor,
    ref64: torch.Tensor,
    torch_out: torch.Tensor | None = None,
    *,
    magnitude: torch.Tensor | None = None,
    k: int = 1,
    c: float = 1.0,
    eps_acc: float | None = None,
    check_norm: bool = True,
    what: str = "out",
) -> None:
    """Hold `out` to the project's error bound.

    Args:
        out: what fastres computed, any float dtype, any device.
        ref64: the oracle, fp64, same shape.
        torch_out: PyTorch's own result in `out`'s dtype. With `magnitude` its error counts element by
            element, without (a chain of layers, where nobody knows sum|a||b|) the image's largest error does.
        magnitude: sum|a||b| behind each output element, fp64 (broadcasts): for a convolution, the convolution
            of the absolute values plus |bias| and |residual|; for x * scale + shift, |x||scale| + |shift|.
        k: number of products accumulated. c: the bound's constant.
        eps_acc: accumulator rounding; default fp32's (fp64's for fp64). TF32 products: pass 2**-10.
        check_norm: also hold the worst image's relative norm to 1.5 x PyTorch's.

    NaN must stand exactly where the oracle has NaN, infinities where the oracle rounded to `out`'s dtype has
    them.
    """
    assert out.shape == ref64.shape, f"{what}: shape {tuple(out.shape)}, oracle {tuple(ref64.shape)}"
    assert ref64.dtype == torch.float64, f"{what}: the oracle must be fp64, it is {ref64.dtype}"
    if out.numel() == 0:
        return
    ref, got = ref64.detach().cpu(), out.detach().cpu().double()
    rounded = ref.to(out.dtype).double()
    finite = rounded.isfinite()
    assert torch.equal(got.isnan(), rounded.isnan()), f"{what}: NaN where the oracle has none, or the reverse"
    special = ~finite & ~rounded.isnan()
    assert torch.equal(got[special], rounded[special]), f"{what}: infinities differ from the oracle's"

    zero = torch.zeros_like(ref)
    error = (got - ref).abs().where(finite, zero)
    eps_acc = accumulation_eps(out.dtype) if eps_acc is None else eps_acc
    bound = 2 * torch.finfo(out.dtype).eps * ref.abs()
    # The smallest subnormal: half of it is lost by rounding to zero, whatever |ref| is.
    bound += torch.finfo(out.dtype).smallest_normal * torch.finfo(out.dtype).eps
    if magnitude is not None:
        bound = bound + c * math.sqrt(k) * eps_acc * magnitude.detach().cpu().double()
    if torch_out is not None:
        assert torch_out.dtype == out.dtype, (
            f"{what}: PyTorch's result is {torch_out.dtype}, ours {out.dtype}"
        )
        torch_error = (torch_out.detach().cpu().double() - ref).abs().where(finite, zero).nan_to_num(0.0)
        if magnitude is None and torch_error.dim() > 1:
            torch_error = torch_error.flatten(1).amax(1).reshape(-1, *[1] * (ref.dim() - 1))
        elif magnitude is None:
            torch_error = torch_error.max()
        bound = torch.maximum(bound, 1.5 * torch_error)
    # Not `error > bound`: a NaN must fail.
    bad = finite & ~(error <= bound)
    if bad.any():
        worst = torch.where(bad, error / bound.broadcast_to(error.shape), zero).argmax().item()
        at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), ref.shape))
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} elements outside the bound; worst at {at}: "
            f"got {got[at].item():.9g}, oracle {ref[at].item():.9g}, error {error[at].item():.3g}, "
            f"allowed {bound.broadcast_to(error.shape)[at].item():.3g}"
        )
    if check_norm and torch_out is not None and bool(finite.all()):
        ours, theirs = relative_norm(out, ref), relative_norm(torch_out, ref)
        assert theirs == 0 or ours <= 1.5 * theirs, (
            f"{what}: worst image's relative norm {ours:.3g}, PyTorch's own {theirs:.3g}"
        )


def assert_same_bits(a: torch.Tensor, b: torch.Tensor, what: str = "two runs") -> None:
    """Bit equality: NaN equals the same NaN, 0 differs from -0."""
    assert a.shape == b.shape and a.dtype == b.dtype, (
        f"{what}: {a.shape} {a.dtype} against {b.shape} {b.dtype}"
    )
    # view() wants memory order: compare both in the logical order of `a`.
    where = a.device if a.device == b.device else torch.device("cpu")
    as_bytes = [t.detach().to(where).contiguous().view(-1).view(torch.uint8) for t in (a, b)]
    assert torch.equal(*as_bytes), f"{what}: bits differ"


def integers(
    shape: Sequence[int], dtype: torch.dtype, low: int = -3, high: int = 3, **kwargs
) -> torch.Tensor:
    """Small whole numbers in a float dtype: sums and products are exact, so results must be equal."""
    return torch.randint(low, high + 1, tuple(shape), **kwargs).to(dtype)


def guarded(
    shape: Sequence[int], dtype: torch.dtype, *, layout: str = "nhwc", device: str | torch.device = "cpu"
) -> tuple[torch.Tensor, Callable[[], None]]:
    """An output to write into, NaN-poisoned, between guard bands.

    Returns the tensor (dense, NCHW or NHWC order; `layout` is ignored unless it has four dimensions) and a
    function that fails if anything beside the tensor was written.
    """
    like = torch.empty(tuple(shape), dtype=dtype, device="meta")
    if len(shape) == 4:
        like = like.to(memory_format=LAYOUTS[layout])
    flat = torch.full((like.numel() + 2 * _GUARD,), float("nan"), dtype=dtype, device=device)
    inside = flat.as_strided(like.shape, like.stride(), _GUARD)

    def check() -> None:
        for name, band in (("before", flat[:_GUARD]), ("after", flat[-_GUARD:])):
            assert bool(band.isnan().all()), f"wrote {name} the tensor"

    return inside, check
