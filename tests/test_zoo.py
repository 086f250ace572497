"""Networks of torchvision and timm as they come: the same output within the bound, every convolution in the report."""

import copy

import pytest
import torch
from oracle import relative_norm
from torch import nn
from torch.nn.modules.conv import _ConvNd

import fastres
from fastres.bench.calibrate import calibrate_bn
from fastres.bench.photographs import photographs

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

# name → image size; "timm:" in front of timm's. The larger ones want larger images.
ZOO = {
    "resnet18": 64,
    "resnet50": 64,
    "resnext50_32x4d": 64,
    "vgg11_bn": 64,
    "densenet121": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "efficientnet_b0": 64,
    "regnet_y_400mf": 64,
    "googlenet": 64,
    "inception_v3": 96,
    "shufflenet_v2_x0_5": 64,
    "mnasnet0_5": 64,
    "squeezenet1_1": 64,
    "convnext_tiny": 64,
    "deeplabv3_mobilenet_v3_large": 64,
    "timm:resnet26d": 64,
    "timm:resnet26t": 64,
    "timm:resnetaa50": 64,
    "timm:seresnet50": 64,
    "timm:ecaresnet26t": 64,
    "timm:skresnet18": 64,
    "timm:resnetv2_50": 64,
    "timm:dla34": 64,
    "timm:res2net50_26w_4s": 64,
    "timm:repvgg_a0": 64,
    "timm:efficientnet_lite0": 64,
    "timm:gernet_s": 64,
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith("timm:"):
        return timm.create_model(name.removeprefix("timm:"), num_classes=50).eval()
    more = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name.startswith(("fcn", "deeplab")):
        more = {"weights_backbone": None}
    model = torchvision.models.get_model(name, weights=None, num_classes=50, **more)
    if name.startswith("vgg"):
        model.classifier = nn.Linear(512 * 49, 50)  # its own is 100 million parameters of nothing new
    return model.eval()


def tensors(out) -> list[torch.Tensor]:
    return [out] if isinstance(out, torch.Tensor) else list(out.values())


def convolutions_that_run(model: nn.Module, x: torch.Tensor) -> set[str]:
    ran: set[str] = set()
    handles = [
        m.register_forward_hook(lambda *args, name=name: ran.add(name))
        for name, m in model.named_modules()
        if isinstance(m, _ConvNd)
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return ran


@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_the_output_is_the_originals_and_every_convolution_is_accounted_for(name):
    model = calibrate_bn(build(name), photographs(4, size=ZOO[name]))
    x = photographs(2, size=ZOO[name], seed=9)
    expected_layers = convolutions_that_run(model, x)
    wide = copy.deepcopy(model).double()
    ref = wide(x.double())
    # in fp64 nothing hides: not an activation that is missing, not an eps
    torch.testing.assert_close(fastres.accelerate(wide)(x.double()), ref, rtol=1e-6, atol=1e-8)
    fast = fastres.accelerate(model)
    got = fast(x)
    layouts = (torch.contiguous_format, torch.channels_last)
    own = [copy.deepcopy(model).to(memory_format=f)(x.contiguous(memory_format=f)) for f in layouts]
    assert type(got) is type(ref)
    for ours, exact, *theirs in zip(*map(tensors, (got, ref, *own)), strict=True):
        assert ours.shape == exact.shape and ours.dtype == torch.float32
        if relative_norm(ours, exact) > 1.5 * max(relative_norm(one, exact) for one in theirs):
            # random networks magnify the last bits: then no step on its own may be worse than fp32 sums are
            steps = fastres.verify(fast, x).layers
            assert all(one.error <= max(1.5 * one.torch_error, 4e-6) for one in steps)
    report = fast.report(measure=False)
    assert report.rows and not report.parts, "the whole network is one plan"
    shown = {layer for row in report.rows for layer in row.layers}
    missing = {
        name for name in expected_layers if not any(name == s or name.startswith(f"{s}.") for s in shown)
    }
    assert not missing
    by_kernels = {layer for row in report.rows if row.candidate != "PyTorch" for layer in row.layers}
    images = {n for n in expected_layers if isinstance(model.get_submodule(n), nn.Conv2d)}
    assert len(by_kernels & images) >= len(images) * 0.8, "most of them run in kernels"
