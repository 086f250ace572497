"""Networks: torchvision's weights, seeds, training steps; resnet11; tools of PyTorch around them."""

import copy
import pickle

import pytest
import torch
import torchvision
from torch import nn

import fastres.nn as ours

NAMES = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_has_torchvisions_keys_and_shapes(name):
    with torch.device("meta"):
        fast, reference = (getattr(library, name)() for library in (ours, torchvision.models))
    shapes = [{k: (v.shape, v.dtype) for k, v in m.state_dict().items()} for m in (fast, reference)]
    assert shapes[0] == shapes[1] and list(shapes[0]) == list(shapes[1])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet18", {"num_classes": 7}),
        ("resnet50", {"num_classes": 7, "replace_stride_with_dilation": [False, True, True]}),
    ],
)
def test_the_same_seed_gives_torchvisions_weights(name, arguments):
    models = []
    for library in (ours, torchvision.models):
        torch.manual_seed(5)
        models.append(getattr(library, name)(**arguments))
        models.append(torch.rand(3))
    fast, after_fast, reference, after_reference = models
    assert torch.equal(after_fast, after_reference)
    state = reference.state_dict()
    assert all(torch.equal(t, state[key]) for key, t in fast.state_dict().items())
    assert [m.dilation for m in fast.modules() if isinstance(m, nn.Conv2d)] == [
        m.dilation for m in reference.modules() if isinstance(m, nn.Conv2d)
    ]


def test_zero_init_residual_makes_every_block_start_as_its_shortcut():
    fast = ours.resnet18(zero_init_residual=True, num_classes=2)
    assert all(not m.bn2.weight.any() for m in fast.modules() if isinstance(m, ours.BasicBlock))
    deep = ours.ResNet(ours.Bottleneck, [1], zero_init_residual=True)
    assert not deep.layer1[0].bn3.weight.any() and deep.layer1[0].bn2.weight.all()


def _networks(kind):
    def torchvisions_with(block, reference):
        return (
            torchvision.models.ResNet(getattr(ours, block), [1, 1, 1, 1], num_classes=5),
            torchvision.models.ResNet(
                getattr(torchvision.models.resnet, reference), [1, 1, 1, 1], num_classes=5
            ),
        )

    match kind:
        case "basic blocks in torchvision's network":
            return torchvisions_with("BasicBlock", "BasicBlock")
        case "bottlenecks in torchvision's network":
            return torchvisions_with("Bottleneck", "Bottleneck")
        case "resnet18":
            return ours.resnet18(num_classes=5), torchvision.models.resnet18(num_classes=5)


@pytest.mark.parametrize(
    "kind", ["basic blocks in torchvision's network", "bottlenecks in torchvision's network", "resnet18"]
)
def test_one_optimizer_step_equals_torchvisions(kind):
    fast, reference = _networks(kind)
    fast.load_state_dict(reference.state_dict(), strict=True)
    x, target = torch.randn(4, 3, 40, 33, dtype=torch.float64), torch.tensor([0, 3, 1, 4])
    for model in (fast, reference):
        model.double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
    torch.testing.assert_close(fast.state_dict(), reference.state_dict(), rtol=1e-8, atol=1e-9)
    reference.load_state_dict(fast.state_dict(), strict=True)
    for wants_gradients in (True, False):
        with torch.set_grad_enabled(wants_gradients):
            torch.testing.assert_close(fast.eval()(x), reference.eval()(x), rtol=1e-7, atol=1e-8)


def test_resnet11_is_the_stem_three_bottlenecks_and_a_classifier():
    model = ours.resnet11()
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 1 + 3 * 3 + 1  # with the projection
    assert [(m.in_channels, m.out_channels) for m in convolutions[1:4]] == [(64, 64), (64, 64), (64, 256)]
    assert model.fc.weight.shape == (1000, 256) and not hasattr(model, "layer2")
    # The first stage of torchvision's ResNet-50 is the same network.
    state = torchvision.models.resnet50().state_dict()
    state = {key: t for key, t in state.items() if not key.startswith(("layer2", "layer3", "layer4", "fc"))}
    missing = model.load_state_dict(state, strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"] and not missing.unexpected_keys


def test_softmax_gives_probabilities_at_inference_and_logits_in_training():
    model, plain = ours.resnet11(softmax=True, num_classes=10), ours.resnet11(num_classes=10)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), plain.eval()(x).softmax(1))
    torch.testing.assert_close(model.train()(x), plain.train()(x))


def test_copy_and_pickle_compute_the_same():
    model, x = ours.resnet11(num_classes=5).eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        want = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(other(x), want)


@pytest.mark.parametrize("training", [True, False])
def test_compiles_in_one_graph(training):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = ours.resnet11(num_classes=5).train(training), torch.randn(2, 3, 33, 32)
    state = copy.deepcopy(model.state_dict())
    want = model(x)
    model.load_state_dict(state)
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    got.sum().backward()


def test_exports_with_a_dynamic_batch():
    model = ours.resnet11(num_classes=5).eval()
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=dynamic)
    called = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert called.count("fastres.conv_bn_act.default") == 11
    for batch in (1, 5):
        x = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)


def test_torchvisions_feature_extractors_work():
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.feature_extraction import create_feature_extractor

    model, x = ours.resnet18(num_classes=5).eval(), torch.randn(1, 3, 64, 64)
    layers = IntermediateLayerGetter(model, {"layer2": "out"})
    extractor = create_feature_extractor(model, {"layer2": "out"})
    torch.testing.assert_close(extractor(x)["out"], layers(x)["out"])


def test_empty_batch_and_tiny_images():
    model = ours.resnet11(num_classes=5).eval()
    for shape in ((0, 3, 32, 32), (1, 3, 1, 1), (1, 3, 7, 9)):
        assert model(torch.randn(shape)).shape == (shape[0], 5)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, 32, 32), ValueError, "x: expected 4 dimensions"),
        (torch.zeros(1, 4, 32, 32), ValueError, "x: expected 3 channels .* got 4"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "x: expected float16.* got torch.uint8"),
        (torch.zeros(1, 3, 32, 32).half(), TypeError, "weight: expected the dtype of x"),
        (torch.zeros(1, 3, 32, 32, device="meta"), ValueError, "expected the device of x"),
    ],
)
def test_bad_input_is_refused_by_name(x, error, message):
    with pytest.raises(error, match=message):
        ours.resnet11(num_classes=5).eval()(x)


def test_bad_constructor_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="layers: expected 1 to 4 stages"):
        ours.ResNet(ours.BasicBlock, [])
    with pytest.raises(ValueError, match="replace_stride_with_dilation: expected None or 3 values"):
        ours.resnet18(replace_stride_with_dilation=[True])
    with pytest.raises(ValueError, match="groups: resnext50_32x4d has 32, got 4"):
        ours.resnext50_32x4d(groups=4)
