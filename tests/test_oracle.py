"""The bound itself must be able to fail."""

import pytest
import torch
from oracle import assert_close_to_oracle, assert_same_bits, guarded


def test_rounded_oracle_passes_and_one_wrong_element_fails():
    ref = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    out = ref.bfloat16()
    assert_close_to_oracle(out, ref, out)
    out = out.clone()
    out[1, 2, 3, 4] *= 1.05
    with pytest.raises(AssertionError, match=r"1 of 210 .* worst at \(1, 2, 3, 4\)"):
        assert_close_to_oracle(out, ref, ref.bfloat16())


def test_small_errors_everywhere_fail_by_the_norm():
    ref = torch.ones(1, 1, 8, 8, dtype=torch.float64) + 1e-9
    with pytest.raises(AssertionError, match="relative norm"):
        assert_close_to_oracle(ref.float() + 1e-7, ref, ref.float())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_fail_unless_the_oracle_has_them(value):
    ref = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    out = ref.float().clone()
    out[0, 0, 0, 0] = value
    with pytest.raises(AssertionError):
        assert_close_to_oracle(out, ref)
    assert_close_to_oracle(out, out.double())


def test_accumulation_term_needs_the_magnitude():
    ref = torch.zeros(1, 4, dtype=torch.float64)
    out = torch.full((1, 4), 1e-6)
    with pytest.raises(AssertionError):
        assert_close_to_oracle(out, ref)
    assert_close_to_oracle(out, ref, magnitude=torch.tensor(10.0), k=4)


def test_same_bits_tells_zero_from_minus_zero():
    assert_same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    with pytest.raises(AssertionError, match="bits differ"):
        assert_same_bits(torch.zeros(2), -torch.zeros(2))


def test_guard_bands_see_a_write_beside_the_tensor():
    out, check = guarded((1, 2, 3, 3), torch.float16)
    assert out.isnan().all() and out.is_contiguous(memory_format=torch.channels_last)
    check()
    out.as_strided((1,), (1,), out.storage_offset() + out.numel()).zero_()
    with pytest.raises(AssertionError, match="after"):
        check()
