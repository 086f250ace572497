"""Errors are measured against fp64, and a wrong answer cannot pass for a right one."""

import pytest
import torch
from torch import nn

from fastres.bench.calibrate import calibrate_bn
from fastres.bench.verify import allowed, errors, flatten, oracle


def test_the_oracle_is_fp64_and_chunks_do_not_change_it():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    x = torch.randn(5, 3, 6, 7)
    (whole,), (chunked,) = oracle(model, x), oracle(model, x, chunk=2)
    assert whole.dtype == torch.float64 and torch.equal(whole, chunked)
    assert next(model.parameters()).dtype == torch.float32
    assert errors(model(x), whole).relative < 1e-5


def test_the_worst_image_counts():
    ref = torch.ones(4, 10, dtype=torch.float64)
    out = ref.clone()
    out[2] += 0.5
    assert errors(out, ref).relative == pytest.approx(0.5)
    assert errors(out, ref).absolute == pytest.approx(0.5)


def test_argmax_agreement_is_a_share_of_images():
    ref = torch.eye(4, dtype=torch.float64)
    out = ref.clone()
    out[0] = out[0].flip(0)
    assert errors(out, ref).argmax == pytest.approx(0.75)
    assert errors(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4).double()).argmax is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_infinitely_wrong(value):
    ref = torch.ones(3, 5, dtype=torch.float64)
    out = ref.clone()
    out[1, 1] = value
    assert errors(out, ref).relative == float("inf")
    assert not errors(out, ref).relative <= allowed(errors(ref, ref), torch.float32)


def test_shapes_must_agree_and_structures_are_compared_tensor_by_tensor():
    with pytest.raises(ValueError, match=r"shapes \[\(2, 3\)\]"):
        errors(torch.zeros(2, 3), torch.zeros(3, 2).double())
    assert len(flatten({"a": torch.zeros(1), "b": [torch.zeros(1), (torch.zeros(1),)]})) == 3
    with pytest.raises(TypeError, match="str"):
        flatten("x")


def test_eagers_own_error_sets_what_is_allowed():
    none = errors(torch.ones(1, 2), torch.ones(1, 2).double())
    assert allowed(none, torch.bfloat16) == 16 * torch.finfo(torch.bfloat16).eps
    some = errors(torch.ones(1, 2) * 1.2, torch.ones(1, 2).double())
    assert allowed(some, torch.float32) == pytest.approx(0.6, rel=1e-4)


def test_calibrated_bn_normalises_the_images_it_saw_and_touches_no_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    model[1].momentum = 0.3
    images = torch.randn(16, 3, 9, 9) * 5 + 2
    calibrate_bn(model, images, spread=False)
    out = model[1](model[0](images)).detach()
    assert out.mean((0, 2, 3)).abs().max() < 1e-3 and (out.std((0, 2, 3)) - 1).abs().max() < 1e-2
    assert not any(m.training for m in model.modules()) and model[1].momentum == 0.3


def test_spread_gives_bn_that_starts_as_zero_a_weight():
    norm = nn.BatchNorm2d(16)
    nn.init.zeros_(norm.weight)
    calibrate_bn(norm, torch.randn(4, 16, 3, 3))
    assert norm.weight.min() >= 0.5 and norm.weight.std() > 0.05 and norm.bias.std() > 0.01
    trained = norm.weight.clone()
    calibrate_bn(norm, torch.randn(4, 16, 3, 3))
    assert torch.equal(norm.weight, trained)
