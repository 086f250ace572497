"""accelerate(model): the same network, another way to run it."""

import copy
import io
import pickle
import threading
import warnings

import pytest
import torch
import torchvision
from oracle import assert_close_to_oracle
from torch import nn

import fastres
from fastres.bench.calibrate import calibrate_bn
from fastres.bench.photographs import photographs, photographs_uint8
from fastres.plan import pattern as patterns
from tests.graph.nets import Net, close, conv_bn, image, randomised
from tests.plan.fakes import Fake, registered

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def trained():
    """A ResNet-18 whose BN statistics are those of photographs, and two photographs."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    return calibrate_bn(model, photographs(8, size=64)).eval(), photographs(2, size=64, seed=3)


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomised(
        torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=5)
    )


def held_to_the_bound(out, model, x, dtype):
    """The design's bound for whole networks: PyTorch's own error is that in the same type and layout."""
    wide = copy.deepcopy(model).double()
    narrow = copy.deepcopy(model).to(dtype).to(memory_format=torch.channels_last)
    rounded = x.to(dtype)
    with torch.no_grad():
        ref = wide(rounded.double())
        own = narrow(rounded.contiguous(memory_format=torch.channels_last))
    assert_close_to_oracle(out, ref, own, what=str(dtype))


# -- what it is --------------------------------------------------------------------------------------------------------


def test_it_is_an_instance_of_its_class_with_the_same_keys_and_tensors():
    model = small()
    fast = fastres.accelerate(model)
    assert isinstance(fast, torchvision.models.ResNet) and fast is not model
    assert list(fast.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(fast.parameters(), model.parameters(), strict=True))
    assert [name for name, _ in fast.named_modules()] == [name for name, _ in model.named_modules()]
    assert fast.original is model


def test_the_original_stays_what_it_was():
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kind, attributes = type(model), set(vars(model))
    x = image(2, 3, 33, 40)
    with torch.no_grad():
        expected = model(x)
        fast = fastres.accelerate(model)
        fast(x)
        assert torch.equal(model(x), expected)
    assert type(model) is kind and set(vars(model)) == attributes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_modes_are_shared_whoever_switches_them():
    model = small()
    fast = fastres.accelerate(model)
    fast.train()
    assert model.training and model.layer1[0].bn1.training
    model.eval()
    assert not fast.training


def test_accelerating_again_gives_the_same_or_another_way_to_run_the_same_original():
    model = small()
    fast = fastres.accelerate(model)
    assert fastres.accelerate(fast) is fast
    other = fastres.accelerate(fast, dtype=torch.float32)
    assert other.original is model and type(other) is type(fast)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_have_their_own_parameters_and_run(copied):
    fast, x = fastres.accelerate(small(), normalize=None, tune="off"), image(2, 3, 33, 40)
    with torch.no_grad():
        expected = fast(x)
        other = copied(fast)
        assert other.options == fast.options and other.original is not fast.original
        close(other(x), expected)
        other.fc.weight.zero_()
        other.fc.bias.zero_()
        close(fast(x), expected)
        assert not other(x).any()


def test_a_graph_modules_own_way_of_copying_does_not_lose_the_acceleration():
    traced = torch.fx.symbolic_trace(small())
    fast = copy.deepcopy(fastres.accelerate(traced))
    x = image(1, 3, 33, 33)
    with torch.no_grad():
        close(fast(x), traced(x))
    assert fast.report(measure=False).rows


def test_it_can_be_saved_and_loaded_as_a_file():
    fast, x = fastres.accelerate(small()), image(1, 3, 33, 33)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    with torch.no_grad():
        close(torch.load(file, weights_only=False)(x), fast(x))


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_load_strictly_both_ways(assign):
    one, two = small(1), small(2)
    fast, x = fastres.accelerate(one), image(1, 3, 33, 33)
    with torch.no_grad():
        fast(x)
        fast.load_state_dict(copy.deepcopy(two.state_dict()), strict=True, assign=assign)
        close(fast(x), two(x))
        three = small(3)
        three.load_state_dict(fast.state_dict(), strict=True, assign=assign)
        close(three(x), two(x))


# -- types -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_photograph_comes_out_within_the_bound(dtype, trained):
    model, x = trained
    fast = fastres.accelerate(copy.deepcopy(model).to(dtype))
    with torch.no_grad():
        out = fast(x.to(dtype))
    assert out.dtype == dtype
    held_to_the_bound(out, model, x, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_compute_type_is_another_than_the_parameters(dtype, trained):
    model, x = trained
    fast = fastres.accelerate(model, dtype=dtype)
    with torch.no_grad():
        out = fast(x)
        again = fast(x.to(dtype))
    assert out.dtype == dtype and torch.equal(out, again)
    assert next(model.parameters()).dtype == torch.float32
    held_to_the_bound(out, model, x, dtype)


def test_a_wider_compute_type_reaches_what_no_kernel_takes():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular")
    )
    x = image()
    wide = copy.deepcopy(model).double()
    fast = fastres.accelerate(model.eval(), dtype=torch.float64)
    with torch.no_grad():
        close(fast(x.float().double()), wide(x.float().double()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        close(fast(x), wide(x))


def test_the_output_has_the_compute_type_whatever_the_last_call_prefers():
    """Softmax prefers fp32 under autocast."""
    model = nn.Sequential(*conv_bn(4, 6), nn.Softmax(1)).eval()
    with torch.no_grad():
        assert fastres.accelerate(model, dtype=torch.bfloat16)(image().float()).dtype == torch.bfloat16
        half = copy.deepcopy(model).bfloat16()
        x = image().bfloat16()
        assert fastres.accelerate(half)(x).dtype == half(x).dtype == torch.bfloat16


def test_half_and_to_change_the_type_of_a_running_network(trained):
    model, x = copy.deepcopy(trained[0]), trained[1]
    fast = fastres.accelerate(model)
    with torch.no_grad():
        fast(x)
        fast.bfloat16()
        held_to_the_bound(fast(x.bfloat16()), model, x, torch.bfloat16)
        fast.to(torch.float64)
        assert next(model.parameters()).dtype == torch.float64
        close(fast(x.double()), model(x.double()))


def test_autocast_decides_where_nothing_else_does(trained):
    model, x = trained
    fast = fastres.accelerate(model)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            out, own = fast(x), model(x.contiguous(memory_format=torch.channels_last))
        assert fast(x).dtype == torch.float32
    assert out.dtype == own.dtype == torch.bfloat16
    held_to_the_bound(out, model, x, torch.bfloat16)


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("gradients", [False, True])
def test_uint8_images_are_normalised_as_pytorch_would_borders_included(dtype, gradients, trained):
    model, images = trained[0], photographs_uint8(2, size=64, seed=3)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    x = (images.double() / 255 - mean) / std
    fast = fastres.accelerate(model, dtype=dtype, normalize=(MEAN, STD))
    with torch.set_grad_enabled(gradients), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = fast(images)
    assert out.dtype == (dtype or torch.float32) and out.requires_grad == gradients
    with torch.no_grad():
        ref = copy.deepcopy(model).double()(x)
    tolerance = {torch.float64: 1e-5, None: 1e-4, torch.bfloat16: 0.06}[dtype]
    assert (out.double() - ref).norm() / ref.norm() < tolerance


def test_normalised_images_train_too():
    model = fastres.accelerate(torchvision.models.resnet18(num_classes=3), normalize=(MEAN, STD)).train()
    model(torch.randint(0, 256, (2, 3, 33, 33), dtype=torch.uint8)).sum().backward()
    assert model.conv1.weight.grad is not None
    model(torch.randn(2, 3, 33, 33))


# -- inputs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x,
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: torch.cat([x, x], 1)[:, :3],
        lambda x: x.flip(3).flip(3),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: x[:, :1].expand(-1, 3, -1, -1),
        lambda x: x[:1].expand(4, -1, -1, -1),
        lambda x: nn.Parameter(x, requires_grad=False),
    ],
    ids=[
        "nchw",
        "nhwc",
        "sliced",
        "copied",
        "transposed",
        "channels expanded",
        "batch expanded",
        "parameter",
    ],
)
def test_any_memory_order_gives_the_same(form):
    model = small()
    fast, x = fastres.accelerate(model), form(image(2, 3, 40, 33))
    before = x.clone()
    with torch.no_grad():
        close(fast(x), model(before))
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (3, 3, 7, 9), (2, 3, 1, 1), (1, 3, 33, 1)], ids=str)
def test_odd_shapes_work(shape):
    model = small()
    fast, x = fastres.accelerate(model), image(*shape)
    with torch.no_grad():
        for _ in range(2):
            close(fast(x), model(x))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.filterwarnings("ignore:an accelerated model")
def test_an_empty_batch_gives_an_empty_result(gradients):
    fast = fastres.accelerate(small(), dtype=torch.float32)
    with torch.set_grad_enabled(gradients):
        out = fast(torch.empty(0, 3, 33, 33))
    assert out.shape == (0, 5) and out.dtype == torch.float32


def test_an_output_without_pixels_is_refused_by_the_layers_name():
    fast = fastres.accelerate(nn.Sequential(nn.Conv2d(3, 4, 5)).eval())
    with torch.no_grad(), pytest.raises(ValueError, match="0: input 3x3 is too small"):
        fast(torch.randn(1, 3, 3, 3))


def test_keyword_arguments_are_arguments():
    model = small()
    fast, x = fastres.accelerate(model), image(1, 3, 33, 33)
    with torch.no_grad():
        close(fast(x=x), model(x))
    assert fast.report(measure=False).rows, "they are planned like others"


# -- gradients, training, modes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["inference_mode", "no_grad"])
def test_inference_mode_and_no_grad_may_alternate(first):
    model = small()
    fast, x = fastres.accelerate(model), image(2, 3, 33, 33)
    modes = [torch.inference_mode, torch.no_grad]
    with torch.no_grad():
        expected = model(x)
    # the first call plans, binds and prepares inside the one, the next runs it inside the other
    for mode in modes if first == "inference_mode" else modes[::-1]:
        with mode():
            close(fast(x), expected)
            close(fast(x.clone()), expected)


def test_a_result_of_inference_mode_can_be_used_outside():
    fast, x = fastres.accelerate(small()), image(2, 3, 33, 33)
    with torch.inference_mode():
        out = fast(x)
    (out * torch.ones((), dtype=torch.float64, requires_grad=True)).sum().backward()


def test_gradients_in_eval_mode_are_pytorchs_and_warned_of_once():
    model = small()
    fast, x = fastres.accelerate(model), image(2, 3, 33, 33).requires_grad_()
    expected = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    with pytest.warns(UserWarning, match="gradients wanted") as caught:
        for _ in range(2):
            close(torch.autograd.grad(fast(x).square().sum(), [x, *fast.parameters()]), expected)
    assert len(caught) == 1 and caught[0].filename == __file__


def test_frozen_parameters_and_a_plain_input_want_no_gradient():
    model = small().requires_grad_(False)
    fast = fastres.accelerate(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not fast(image(1, 3, 33, 33)).requires_grad
    assert fast.report(measure=False).rows


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_training_step_is_torchvisions(dtype):
    """Whatever the compute type of inference is."""
    models = [small(), small()]
    models[0] = fastres.accelerate(models[0], dtype=dtype)
    x, target = image(4, 3, 40, 33), torch.tensor([0, 3, 1, 4])
    for model in models:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
    fast, reference = (dict(model.state_dict()) for model in models)
    torch.testing.assert_close(fast, reference, rtol=1e-7, atol=1e-7)
    with torch.no_grad():
        models[1].eval()
        models[0].eval()
        if dtype is None:
            torch.testing.assert_close(models[0](x), models[1](x), rtol=1e-7, atol=1e-7)


@pytest.mark.filterwarnings("ignore:an accelerated model")
def test_function_transforms_fall_back_right():
    model = randomised(nn.Sequential(*conv_bn(4, 6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    fast, x = fastres.accelerate(model), image(3)
    close(torch.vmap(lambda one: fast(one[None])[0])(x), model(x))
    close(torch.func.grad(lambda x: fast(x).sum())(x), torch.func.grad(lambda x: model(x).sum())(x))
    parameters = {name: p.detach() * 2 for name, p in fast.named_parameters()}
    with torch.no_grad():
        expected = torch.func.functional_call(model, parameters, (x,))
        close(torch.func.functional_call(fast, parameters, (x,)), expected)
        close(fast(x), model(x))


@pytest.mark.filterwarnings("ignore:an accelerated model")
def test_compiles_in_one_graph():
    model = randomised(nn.Sequential(*conv_bn(4, 6), nn.ReLU(inplace=True), *conv_bn(6, 4)))
    fast = fastres.accelerate(model)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(compiled(image()), model(image()))
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:an accelerated model")
def test_exports_with_a_dynamic_batch():
    model = randomised(nn.Sequential(*conv_bn(4, 6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    fast = fastres.accelerate(model)
    with torch.no_grad():
        program = torch.export.export(fast, (image(2),), dynamic_shapes=({0: torch.export.Dim("n")},))
        close(program.module()(image(5)), model(image(5)))


# -- threads, memory ---------------------------------------------------------------------------------------------------


def test_eight_threads_with_different_shapes_get_what_one_gets():
    model = small()
    fast = fastres.accelerate(model)
    images = [image(1 + i % 3, 3, 33 + 4 * (i % 4), 33, seed=i) for i in range(8)]
    with torch.no_grad():
        expected = [model(x) for x in images]
    failures, barrier = [], threading.Barrier(8)

    def run(i):
        try:
            barrier.wait()
            with torch.no_grad():
                for _ in range(4):
                    close(fast(images[i]), expected[i])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_what_threads_prepared_together_is_renewed_for_all_of_them():
    """Two threads that prepare one layer at a time must not keep two answers."""
    model = randomised(nn.Sequential(*conv_bn(4, 6)))
    fast, barrier = fastres.accelerate(model), threading.Barrier(4)

    def run():
        barrier.wait()
        with torch.no_grad():
            fast(image())

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        model[0].weight.mul_(2)
        expected = model(image())
        contexts = [c for idle in fast._fastres.engine._idle.values() for c in idle]
        for _ in range(len(contexts) + 1):
            close(fast(image()), expected)
        fast._fastres.engine._renew(fast.original)
        for context in contexts:
            if context.generation == fast._fastres.engine.prepared.constants.generation:
                close(context.run((image(),)), expected)


def test_warmup_plans_and_release_forgets():
    fast = fastres.accelerate(small().float())
    engine = fast._fastres.engine
    fast.warmup((2, 3, 33, 33))
    fast.warmup([(1, 3, 33, 33), (1, 3, 40, 40)])
    assert len(engine.prepared.plans) == 3
    fast.release()
    assert not engine.prepared.plans and not engine._idle and not engine.prepared.constants._made
    with torch.no_grad():
        assert fast(torch.randn(1, 3, 33, 33)).shape == (1, 5)


def test_warmup_leaves_statistics_alone():
    fast = fastres.accelerate(small().float()).train()
    before = fast.bn1.running_mean.clone()
    with pytest.raises(ValueError, match="warmup: the model is in training mode"):
        fast.warmup((2, 3, 33, 33))
    assert torch.equal(fast.bn1.running_mean, before)


def test_plans_of_many_shapes_are_bounded():
    from fastres import engine

    fast = fastres.accelerate(randomised(nn.Sequential(*conv_bn(4, 4))))
    with torch.no_grad():
        for size in range(3, engine.MAX_PLANS + 8):
            fast(image(h=size, w=3))
    assert len(fast._fastres.engine.prepared.plans) <= engine.MAX_PLANS
    assert len(fast._fastres.engine._idle) <= engine.MAX_PLANS


# -- in parts ----------------------------------------------------------------------------------------------------------


class Routed(nn.Module):
    """Goes one way or the other, as the data says; `threshold` is a plain attribute that users change."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(4, 6), nn.ReLU())
        self.low, self.high = conv_bn(6, 6), nn.Sequential(*conv_bn(6, 6), nn.ReLU())
        self.head = nn.Conv2d(6, 2, 1)
        self.threshold, self.calls = 0.5, 0

    def forward(self, x, scale: float = 1.0):
        self.calls += 1
        y = self.stem(x)
        y = self.low(y) if y.mean() > self.threshold else self.high(y)
        return self.head(y) * scale


@pytest.mark.filterwarnings("ignore:an accelerated model")
def test_control_flow_over_data_runs_in_parts_and_the_report_says_so():
    model = randomised(Routed())
    reference = copy.deepcopy(model)
    fast = fastres.accelerate(model)
    with torch.no_grad():
        for threshold in (0.5, 0.5, 1e9):
            model.threshold = reference.threshold = threshold
            for scale in (1, 3):
                close(fast(image() * scale, scale=2.0), reference(image() * scale, scale=2.0))
    close(fast(image()), reference(image()))
    assert model.calls == reference.calls
    report = fast.report(measure=False)
    assert [part.title.split()[0] for part in report.parts] == ["stem", "low", "high"]
    text = str(report)
    assert "runs in parts" in text and "in no part: head" in text
    assert {row.candidate for part in report.parts for row in part.rows} == {"reference.conv_bn_act"}


def test_parts_are_not_made_again_at_every_call():
    fast = fastres.accelerate(randomised(Routed()))
    with torch.no_grad():
        fast(image())
        parts = fast._fastres.parts
        fast(image())
    assert fast._fastres.parts is parts


def test_parts_follow_modes_and_parameters():
    model = randomised(Routed())
    reference = copy.deepcopy(model)
    fast = fastres.accelerate(model)
    with torch.no_grad():
        fast(image())
        for one in (model, reference):
            one.stem[0].weight.mul_(2)
            one.low = conv_bn(6, 6).double().eval()
        reference.load_state_dict(model.state_dict())
        close(fast(image()), reference(image()))
        fast.train(), reference.train()
        close(fast(image()), reference(image()))
        fast.eval(), reference.eval()
        close(fast(image()), reference(image()))


def test_a_detector_runs_in_parts():
    torch.manual_seed(0)
    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=5, box_score_thresh=0.0, box_detections_per_img=5
    ).eval()
    fast, images = fastres.accelerate(model), [torch.rand(3, 80, 96), torch.rand(3, 70, 70)]
    with torch.no_grad():
        expected, got = model(images), fast(images)
    assert isinstance(fast, torchvision.models.detection.FasterRCNN)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.keys() == theirs.keys()
        torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=1e-3, atol=1e-2)
    report = fast.report(measure=False)
    assert any(part.rows and part.title.startswith("backbone") for part in report.parts)


def test_an_accelerated_part_of_a_model_that_is_accelerated_is_part_of_its_plan():
    inner = fastres.accelerate(randomised(nn.Sequential(*conv_bn(4, 4), nn.ReLU())))
    model = randomised(nn.Sequential(inner, *conv_bn(4, 6)))
    fast = fastres.accelerate(model)
    with torch.no_grad():
        close(fast(image()), model(image()))
    assert len(fast.report(measure=False).rows) == 2


# -- changes of the model ----------------------------------------------------------------------------------------------


def test_a_replaced_submodule_is_used():
    fast, x = fastres.accelerate(small()), image(1, 3, 33, 33)
    with torch.no_grad():
        fast(x)
        fast.fc = nn.Linear(2048, 3).double()
        assert fast(x).shape == (1, 3) and fast.original.fc is fast.fc
        close(fast(x), fast.original(x))


def test_a_submodule_replaced_by_one_that_cannot_be_traced():
    model = randomised(nn.Sequential(*conv_bn(4, 4), nn.ReLU()))
    fast = fastres.accelerate(model)
    with torch.no_grad():
        fast(image())
        model[2] = Net(lambda m, x: x if x.sum() > 0 else -x)
        model.append(nn.ReLU())
        for sign in (1, -1):
            close(fast(sign * image().abs()), model(sign * image().abs()))


# -- report, verify ----------------------------------------------------------------------------------------------------


def test_the_report_names_every_layer_what_ran_and_why_not_something_else():
    fast = fastres.accelerate(small().float())
    assert "no plan yet" in str(fast.report())
    report = fast.report((2, 3, 64, 64))
    convs = {name for name, m in fast.named_modules() if isinstance(m, nn.Conv2d)}
    assert convs <= {layer for row in report.rows for layer in row.layers}
    assert all(row.ms > 0 and row.candidate and row.source for row in report.rows)
    assert report.ms == pytest.approx(sum(row.ms for row in report.rows))
    assert all(row.floor_ms for row in report.rows)
    text = str(report)
    assert "layer1.0.conv2" in text and "% of floor" in text and "2x3x64x64 fp32" in text
    why = report.why("layer1.0.conv2")
    assert "cudnn.conv_bn_act: it needs an NVIDIA GPU" in why
    with pytest.raises(ValueError, match="layer: 'nope' is in no row"):
        report.why("nope")


def test_the_report_shows_the_plan_that_ran_last():
    fast = fastres.accelerate(small())
    with torch.no_grad():
        for n in (1, 2, 1):
            fast(image(n, 3, 33, 33))
    assert "1x3x33x33" in fast.report(measure=False).title


def test_the_report_tells_what_has_no_plan():
    fast = fastres.accelerate(randomised(Net(lambda m, x: m.a(x)[m.a(x) > 0], a=conv_bn(4, 4))))
    with torch.no_grad():
        fast(image())
    assert "no plan, PyTorch's own calls run: " in str(fast.report(measure=False))


class Corrupted(Fake):
    """Wrong in one layer: 64 channels in, 512 out."""

    def bind(self, problem, config, buffers, constants):
        launch = super().bind(problem, config, buffers, constants)
        if problem["conv"].k != 128 or problem["conv"].kernel != (3, 3):
            return launch
        return lambda *inputs: launch(*inputs) * 1.01


def test_verify_is_content_with_a_right_network_and_points_at_a_wrong_layer(trained):
    model, x = trained
    right = fastres.verify(fastres.accelerate(model), x)
    assert right.ok and "ok" in str(right)
    assert len(right.layers) >= 20 and right.torch_error > 0
    with registered(Corrupted(patterns.CONV_BN_ACT)):
        fast = fastres.accelerate(model)
        wrong = fastres.verify(fast, x)
    assert not wrong.ok and "TOO LARGE" in str(wrong)
    suspects = {name for one in wrong.layers if one.error > 10 * one.torch_error for name in one.layers}
    assert suspects == {f"layer2.{i}.conv{j}" for i in (0, 1) for j in (1, 2)}


def test_verify_refuses_what_it_cannot_compare():
    with pytest.raises(TypeError, match="model: got ResNet"):
        fastres.verify(small(), image())
    with pytest.raises(ValueError, match="model: is in training mode"):
        fastres.verify(fastres.accelerate(small()).train(), image())


# -- networks of our own -----------------------------------------------------------------------------------------------


def test_a_block_alone_plans_for_itself():
    block = randomised(fastres.Bottleneck(16, 4))
    reference = randomised(torchvision.models.resnet.Bottleneck(16, 4))
    reference.load_state_dict(block.state_dict())
    with torch.no_grad():
        close(block(image(c=16)), reference(image(c=16)))
    assert [row.layers for row in block.report(measure=False).rows] == [("conv1",), ("conv2",), ("conv3",)]


def test_blocks_in_torchvisions_network_plan_each_for_themselves():
    model = randomised(torchvision.models.ResNet(fastres.Bottleneck, [1, 1, 1, 1], num_classes=5))
    reference, x = small(), image(2, 3, 33, 33)
    reference.load_state_dict(model.state_dict())
    with torch.no_grad():
        close(model(x), reference(x))
    assert len(model.layer2[0].report(measure=False).rows) == 4
    fast = fastres.accelerate(model)
    with torch.no_grad():
        close(fast(x), reference(x))
    layers = {layer for row in fast.report(measure=False).rows for layer in row.layers}
    assert {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)} <= layers


def test_a_network_of_ours_plans_across_its_blocks():
    with registered(Fake(patterns.SHIFTED_BLOCK)):
        model = randomised(fastres.resnet11(num_classes=5))
        x = image(2, 3, 33, 33)
        with torch.no_grad():
            expected = copy.deepcopy(model).train(False)._forward(x)
            close(model(x), expected)
        rows = [row.layers for row in model.report(measure=False).rows]
    assert ("layer1.0.conv2", "layer1.0.downsample.0", "layer1.0.conv3", "layer1.1.conv1") in rows


@pytest.mark.parametrize("where", ["", "layer1.0"])
def test_hooks_on_a_network_of_ours_fire_once(where):
    model, seen = randomised(fastres.resnet11(num_classes=5)), []
    model.get_submodule(where).register_forward_hook(lambda m, args, out: seen.append(out.shape))
    with torch.no_grad():
        for count in (1, 2):
            model(image(1, 3, 33, 33))
            assert len(seen) == count
