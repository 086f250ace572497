"""What no network can take is refused before anything runs: by the argument's name, what came and what is taken."""

import pytest
import torch
import torchvision
from torch import nn

import fastres
from tests.graph.nets import conv_bn, image, randomised


@pytest.fixture(scope="module")
def fast():
    return fastres.accelerate(torchvision.models.resnet18(num_classes=5).eval())


def refused(error, match, call, *args, **kwargs):
    with torch.no_grad(), pytest.raises(error, match=match):
        call(*args, **kwargs)


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (torch.zeros(1, 4, 32, 32), ValueError, r"conv1: input has 4 channels .*the layer takes 3"),
        (torch.zeros(3, 32), ValueError, r"conv1: input has shape \(3, 32\), the layer takes \[N, C, H, W\]"),
        (
            torch.zeros(1, 1, 3, 32, 32),
            ValueError,
            r"conv1: input has shape .* the layer takes \[N, C, H, W\]",
        ),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, r"x: got u8, .*give accelerate normalize="),
        (
            torch.zeros(1, 3, 32, 32, dtype=torch.int64),
            TypeError,
            r"x: got int64, takes a floating-point tensor",
        ),
        (
            torch.zeros(1, 3, 32, 32, dtype=torch.bool),
            TypeError,
            r"x: got bool, takes a floating-point tensor",
        ),
        (
            torch.zeros(1, 3, 32, 32).bfloat16(),
            TypeError,
            r"x: got bf16, the parameters are fp32; give accelerate dtype=",
        ),
        (torch.zeros(1, 3, 32, 32).double(), TypeError, r"x: got fp64, the parameters are fp32"),
        (torch.zeros(1, 3, 32, 32, device="meta"), ValueError, r"x: is on meta, the parameters are on cpu"),
    ],
    ids=["channels", "rank 2", "rank 5", "uint8", "int64", "bool", "bf16", "fp64", "device"],
)
def test_an_input_is_refused(x, error, match, fast):
    refused(error, match, fast, x)
    # and the network is as good as before
    with torch.no_grad():
        assert fast(torch.zeros(1, 3, 32, 32)).shape == (1, 5)


@pytest.mark.filterwarnings("ignore:an accelerated model")
@pytest.mark.parametrize(
    "x", [torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(1, 3, 32, 32).double()]
)
def test_types_are_refused_with_gradients_too(x, fast):
    with pytest.raises(TypeError, match="x: got"):
        fast(x)


def test_normalisation_takes_uint8_images_of_its_number_of_channels():
    model = torchvision.models.resnet18(num_classes=5).eval()
    fast = fastres.accelerate(model, normalize=((0.5,) * 3, (0.2,) * 3))
    refused(
        TypeError, r"x: normalize=\(mean, std\) takes uint8 images, got fp32", fast, torch.zeros(1, 3, 32, 32)
    )
    two = fastres.accelerate(model, normalize=((0.5,) * 2, (0.2,) * 2))
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    refused(ValueError, "normalize: the images have 3 channels, mean and std have 2", two, images)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"dtype": torch.int8}, TypeError, r"dtype: got torch.int8, takes None or one of torch.float32"),
        ({"dtype": "bf16"}, TypeError, "dtype: got 'bf16'"),
        ({"backend": "tensorrt"}, ValueError, "backend: got 'tensorrt', takes one of auto, reference"),
        ({"graphs": True}, ValueError, "graphs: got True, takes one of auto, off"),
        ({"tune": "max"}, ValueError, "tune: got 'max', takes one of table, measure, off"),
        ({"normalize": (0.5, 0.2)}, ValueError, r"normalize: got \(0.5, 0.2\), takes \(mean, std\)"),
        ({"normalize": ((0.5,), (0.2, 0.2))}, ValueError, "normalize: mean has 1 entries, std 2"),
        ({"normalize": ((0.5,), (0.0,))}, ValueError, "no zero std"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_an_option_is_refused(options, error, match):
    with pytest.raises(error, match=match):
        fastres.accelerate(nn.Sequential(nn.Conv2d(3, 4, 3)), **options)


@pytest.mark.parametrize(
    "model", [None, torch.relu, torch.jit.script(nn.ReLU())], ids=["None", "function", "script"]
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_module_is_refused(model):
    with pytest.raises(TypeError, match=r"model: got .*, takes an nn\.Module"):
        fastres.accelerate(model)


def test_a_wrong_number_of_arguments_is_pytorchs_error():
    fast = fastres.accelerate(randomised(nn.Sequential(*conv_bn(4, 4))))
    refused(TypeError, "argument", fast, image(), image())
    refused(TypeError, "argument", fast)
    refused(TypeError, "unexpected keyword", fast, image(), scale=2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_special_values_go_where_pytorch_sends_them(value, backend):
    model = randomised(torchvision.models.resnet18(num_classes=5)).float()
    fast, x = fastres.accelerate(model, backend=backend), image(2, 3, 40, 40).float()
    x[0, 1, 20, 20] = value
    with torch.no_grad():
        expected, got = model(x), fast(x)
    assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.isinf(), expected.isinf())
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-4)
