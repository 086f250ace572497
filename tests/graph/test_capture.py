"""Capture: what becomes one node, and the traps in which a careless capture would be silently wrong."""

import collections
import gc
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastres
from fastres.activation import IDENTITY, RELU, Activation
from fastres.graph.capture import CaptureError, capture
from fastres.graph.evaluate import evaluate
from fastres.graph.ir import Conv, GlobalAvgPool, Linear, MaxPool, Opaque

from .nets import Net, check, close, conv_bn, convs, image, opaques, randomised

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")


def kinds(model) -> list[str]:
    return [type(node).__name__ for node in capture(model).nodes]


# -- what joins --------------------------------------------------------------------------------------------------------


def test_a_resnet50_is_53_convolutions_a_pool_a_mean_and_a_linear():
    graph = capture(torchvision.models.resnet50().eval())
    counts = collections.Counter(type(node).__name__ for node in graph.nodes)
    assert counts == {"Conv": 53, "MaxPool": 1, "GlobalAvgPool": 1, "Linear": 1}
    found = [node for node in graph.nodes if isinstance(node, Conv)]
    assert all(node.bn is not None for node in found)
    assert sum(node.residual is not None for node in found) == 16
    # the projections alone have no activation
    assert [node.name for node in found if node.act == IDENTITY] == [
        f"layer{i}.0.downsample.0" for i in (1, 2, 3, 4)
    ]


def test_a_projection_stands_right_before_its_expand():
    nodes = capture(torchvision.models.resnet50().eval()).nodes
    names = [node.name for node in nodes]
    for stage in (1, 2, 3, 4):
        at = names.index(f"layer{stage}.0.downsample.0")
        assert names[at + 1] == f"layer{stage}.0.conv3"
        assert nodes[at + 1].residual == nodes[at].output


def test_a_timm_block_with_average_pooled_shortcut_projects_by_its_convolution():
    model = timm.create_model("resnet26d", num_classes=3).eval()
    found = {node.name: node for node in convs(model)}
    assert {f"layer{i}.0.downsample.1" for i in (1, 2, 3, 4)} <= set(found)
    assert all(node.bn is not None for node in found.values())


@pytest.mark.parametrize(
    ("module", "act"),
    [
        (nn.ReLU(), RELU),
        (nn.ReLU(inplace=True), RELU),
        (nn.ReLU6(), Activation("relu6")),
        (nn.SiLU(), Activation("silu")),
        (nn.GELU(), Activation("gelu")),
        (nn.GELU("tanh"), Activation("gelu_tanh")),
        (nn.LeakyReLU(0.3), Activation("leaky_relu", 0.3)),
        (nn.Hardswish(inplace=True), Activation("hardswish")),
        (nn.Identity(), IDENTITY),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_an_activation_module_is_part_of_the_node(module, act):
    model = randomised(nn.Sequential(*conv_bn(4, 6), module))
    (node,) = capture(model).nodes
    assert node.act == act
    check(model, image())


@pytest.mark.parametrize(
    ("function", "act"),
    [
        (F.relu, RELU),
        (torch.relu, RELU),
        (lambda x: x.relu(), RELU),
        (lambda x: x.relu_(), RELU),
        (lambda x: F.relu(x, inplace=True), RELU),
        (F.relu6, Activation("relu6")),
        (F.silu, Activation("silu")),
        (F.gelu, Activation("gelu")),
        (lambda x: F.gelu(x, approximate="tanh"), Activation("gelu_tanh")),
        (F.leaky_relu, Activation("leaky_relu", 0.01)),
        (lambda x: F.leaky_relu(x, 0.2), Activation("leaky_relu", 0.2)),
        (F.hardswish, Activation("hardswish")),
    ],
)
def test_an_activation_function_is_part_of_the_node(function, act):
    model = randomised(Net(lambda m, x: function(m.c(x)), c=conv_bn(4, 6)))
    (node,) = capture(model).nodes
    assert node.act == act
    check(model, image())


def test_an_unknown_activation_stays_a_call():
    model = randomised(nn.Sequential(*conv_bn(4, 6), nn.Softplus()))
    assert kinds(model) == ["Conv", "Opaque"]
    check(model, image())


@pytest.mark.parametrize(
    "add",
    [lambda a, b: a + b, torch.add, lambda a, b: a.add(b), lambda a, b: a.add_(b), lambda a, b: b + a],
    ids=["+", "torch.add", "add", "add_", "reversed"],
)
def test_an_addition_becomes_the_residual_of_the_later_convolution(add):
    model = randomised(
        Net(lambda m, x: F.relu(add(m.b(F.relu(m.a(x))), x)), a=conv_bn(4, 4), b=conv_bn(4, 4))
    )
    first, second = capture(model).nodes
    assert second.residual == first.x and second.act == RELU
    check(model, image())


def test_an_activation_before_the_addition_is_not_moved_behind_it():
    model = randomised(Net(lambda m, x: F.relu(m.a(x)) + x, a=conv_bn(4, 4)))
    node, add = capture(model).nodes
    assert node.act == RELU and node.residual is None and isinstance(add, Opaque)
    check(model, image())


def test_an_addition_with_a_factor_is_no_residual():
    model = randomised(Net(lambda m, x: torch.add(m.a(x), x, alpha=2), a=conv_bn(4, 4)))
    assert kinds(model) == ["Conv", "Opaque"]
    check(model, image())


def test_adding_a_value_to_itself_is_no_residual():
    def forward(m, x):
        y = m.a(x)
        return y + y

    check(randomised(Net(forward, a=conv_bn(4, 4))), image())


@pytest.mark.parametrize("shape", [(1, 6, 1, 1), (2, 6, 1, 1), (1, 6, 9, 7), (6, 1, 1), ()], ids=str)
def test_an_addition_that_broadcasts_gives_what_pytorch_gives(shape):
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = conv_bn(4, 6)

        def forward(self, x, shift):
            return F.relu(self.a(x) + shift)

    shift = torch.randn(shape, dtype=torch.float64)
    check(randomised(Shifted()), image(), shift)


def test_a_residual_larger_than_the_convolution_broadcasts_the_convolution():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = conv_bn(4, 4, 1)

        def forward(self, x):
            return F.relu(self.a(x.mean((2, 3), keepdim=True)) + x)

    check(randomised(Gate()), image())


def test_a_value_with_two_readers_keeps_its_own_form():
    def forward(m, x):
        y = m.a[0](x)
        return m.a[1](y), y

    model = randomised(Net(forward, a=conv_bn(4, 6)))
    assert kinds(model) == ["Conv", "Opaque"]
    check(model, image())


def test_intermediate_values_may_be_outputs():
    def forward(m, x):
        y = F.relu(m.a(x))
        z = F.relu(m.b(y) + y)
        return {"low": y, "high": [z, (x,)]}

    check(randomised(Net(forward, a=conv_bn(4, 4), b=conv_bn(4, 4))), image())


def test_a_convolutions_bias_and_its_bn_fold_together():
    model = randomised(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)))
    assert len(capture(model).nodes) == 1
    check(model, image())


def test_preactivation_keeps_norm_and_activation_before_the_convolution():
    def forward(m, x):
        y = m.c1(F.relu(m.n1(x)))
        return torch.cat([x, m.c2(F.relu(m.n2(y)))], 1)

    model = randomised(
        Net(
            forward,
            n1=nn.BatchNorm2d(4),
            c1=nn.Conv2d(4, 8, 1, bias=False),
            n2=nn.BatchNorm2d(8),
            c2=nn.Conv2d(8, 4, 3, padding=1, bias=False),
        )
    )
    found = convs(model)
    # the second norm follows the first convolution; the first has none before it
    assert [node.bn is None for node in found] == [False, True]
    check(model, image())


@pytest.mark.parametrize(
    "mean",
    [
        lambda m, x: m.pool(x).flatten(1),
        lambda m, x: torch.flatten(m.pool(x), 1),
        lambda m, x: m.flatten(m.pool(x)),
        lambda m, x: F.adaptive_avg_pool2d(x, (1, 1)).flatten(1),
        lambda m, x: x.mean([2, 3]),
        lambda m, x: x.mean((-2, -1)),
        lambda m, x: torch.mean(x, dim=(2, 3)),
        lambda m, x: x.mean((2, 3), keepdim=True).flatten(1),
    ],
)
def test_global_means_are_one_node_whatever_they_are_written_as(mean):
    def forward(m, x):
        return m.fc(mean(m, x))

    model = randomised(Net(forward, pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(4, 3)))
    pool, linear = capture(model).nodes
    assert isinstance(pool, GlobalAvgPool) and pool.flat and isinstance(linear, Linear)
    check(model, image())


def test_a_mean_over_two_of_five_dimensions_is_not_a_global_pool():
    model = Net(lambda m, x: x.mean((2, 3))).eval()
    check(model, torch.randn(2, 3, 4, 5, 6, dtype=torch.float64))


def test_a_max_pool_keeps_its_window():
    model = nn.Sequential(nn.MaxPool2d((3, 2), padding=(1, 0), dilation=2, ceil_mode=True)).eval()
    (node,) = capture(model).nodes
    assert (node.kernel, node.stride, node.padding, node.dilation) == ((3, 2), (3, 2), (1, 0), (2, 2))
    assert node.ceil_mode
    check(model, image())
    check(Net(lambda m, x: F.max_pool2d(x, 2)).eval(), image())


def test_a_max_pool_over_the_images_own_size_stays_a_call():
    model = Net(lambda m, x: F.max_pool2d(x, x.shape[2:])).eval()
    check(model, image())


def test_a_max_pool_that_returns_indices_stays_a_call():
    check(nn.Sequential(nn.MaxPool2d(2, return_indices=True)).eval(), image())


# -- layers that look like others --------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.Tanh, None], ids=str)
def test_timms_batch_norm_with_activation_keeps_its_activation(act):
    norm = timm.layers.BatchNormAct2d(6, act_layer=act or nn.ReLU, apply_act=act is not None)
    model = randomised(nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), norm))
    check(model, image())


def test_timms_batch_norm_with_activation_before_an_addition():
    norm = timm.layers.BatchNormAct2d(4, act_layer=nn.SiLU)
    model = randomised(Net(lambda m, x: m.n(m.c(x)) + x, c=nn.Conv2d(4, 4, 3, padding=1), n=norm))
    check(model, image())


@pytest.mark.parametrize(
    "conv",
    [
        lambda: timm.layers.StdConv2d(4, 6, 3, padding=1),
        lambda: timm.layers.ScaledStdConv2d(4, 6, 3, padding=1),
        lambda: timm.layers.Conv2dSame(4, 6, 3, stride=2),
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        lambda: nn.Conv2d(4, 6, 2, padding="same"),
        lambda: nn.ConvTranspose2d(4, 6, 3),
    ],
    ids=["standardised", "scaled", "same by subclass", "circular", "reflect", "lopsided same", "transposed"],
)
def test_a_convolution_of_another_kind_is_called_as_it_is(conv):
    model = randomised(nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU()))
    assert not convs(model)
    check(model, image())


@pytest.mark.parametrize(
    "conv",
    [
        lambda: nn.Conv2d(4, 6, 3, padding="same"),
        lambda: nn.Conv2d(4, 6, (3, 5), padding="same", dilation=2),
        lambda: nn.Conv2d(4, 6, 3, padding="valid"),
        lambda: nn.Conv2d(4, 6, 3, padding=(1, 0), stride=(2, 1), dilation=(1, 2)),
        lambda: nn.Conv2d(4, 8, 3, groups=4),
        lambda: nn.Conv2d(4, 8, 3, groups=2, bias=False),
    ],
)
def test_padding_stride_dilation_and_groups_are_kept(conv):
    made = conv()
    model = randomised(nn.Sequential(made, nn.BatchNorm2d(made.out_channels), nn.ReLU()))
    assert len(capture(model).nodes) == 1
    check(model, image(h=13, w=17))


@pytest.mark.parametrize(
    "norm", [torchvision.ops.FrozenBatchNorm2d, timm.layers.FrozenBatchNormAct2d, nn.SyncBatchNorm], ids=str
)
def test_other_batch_norms_of_the_same_arithmetic_fold(norm):
    model = randomised(nn.Sequential(nn.Conv2d(4, 6, 3), norm(6)))
    assert len(capture(model).nodes) == 1
    check(model, image())


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm2d(6, track_running_stats=False),
        lambda: nn.InstanceNorm2d(6, track_running_stats=True),
        lambda: nn.GroupNorm(2, 6),
        lambda: nn.BatchNorm2d(6).train(),
    ],
    ids=["no running statistics", "instance", "group", "training"],
)
def test_a_norm_that_depends_on_the_batch_does_not_fold(norm):
    model = randomised(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)))
    model[1] = norm().double().train(norm().training if isinstance(norm(), nn.BatchNorm2d) else False)
    reference, x = fastres.accelerate(model), image()
    assert convs(model)[0].bn is None
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        expected = model(x)
        after = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(before)
        close(reference(x), expected)
    # statistics move once a call, no more
    close(dict(model.state_dict()), after)


def test_a_bn_without_affine_folds():
    model = randomised(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False, eps=0.1)))
    assert len(capture(model).nodes) == 1
    check(model, image())


def test_a_bn_of_another_width_than_the_convolution_is_left_to_fail_as_in_pytorch():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(5)).double().eval()
    with pytest.raises(RuntimeError), torch.no_grad():
        fastres.accelerate(model)(image())


# -- in place ----------------------------------------------------------------------------------------------------------


def _in_place_models():
    def relu_with_later_reader(m, x):
        y = m.a(x)
        z = F.relu(y, inplace=True)
        return m.b(z) + y

    def relu_with_earlier_reader(m, x):
        y = m.a(x)
        z = y * 2
        y.relu_()
        return m.b(y) + z

    def add_to_a_name_with_two_holders(m, x):
        y = m.a(x)
        identity = y
        y += x
        return F.relu(y) - identity * 3

    def add_moves_the_shortcut(m, x):
        y = m.a(x)
        identity = F.relu(y)
        out = m.b(identity)
        out += identity
        identity *= 2
        return F.relu(out) + identity

    def convolution_reads_before_the_change(m, x):
        y = F.softplus(m.a(x))
        z = m.b[0](y)
        y.mul_(3.0)
        return m.b[1](z) + y

    def residual_is_changed_before_the_activation(m, x):
        y = F.softplus(m.a(x))
        z = m.b(y) + y
        y.mul_(3.0)
        return F.relu(z) + y

    def sizes_are_not_tensors(m, x):
        h = x.shape[2]
        half = h
        h += 2
        return F.interpolate(m.a(x), size=(h, half))

    return [f for name, f in locals().items()]


@pytest.mark.parametrize("forward", _in_place_models(), ids=lambda f: f.__name__)
def test_steps_in_place_change_every_later_reader_and_no_earlier_one(forward):
    check(randomised(Net(forward, a=conv_bn(4, 4), b=conv_bn(4, 4))), image())


# -- modes, arguments, results -----------------------------------------------------------------------------------------


def test_dropout_is_nothing_in_eval_mode_and_random_in_training():
    model = Net(lambda m, x: F.dropout(m.d(m.a(x)), 0.5, m.training), a=conv_bn(4, 6), d=nn.Dropout2d(0.5))
    randomised(model)
    assert kinds(model) == ["Conv"]
    fast = check(model, image())
    torch.manual_seed(3)
    expected = model.train()(image())
    torch.manual_seed(3)
    close(fast(image()), expected)


def test_functional_dropout_that_is_always_on_stays_on():
    model = randomised(Net(lambda m, x: F.dropout(m.a(x), 0.5), a=conv_bn(4, 6)))
    fast = fastres.accelerate(model)
    with torch.no_grad():
        first, second = fast(image()), fast(image())
        expected = 2 * model.a(image())
    assert not torch.equal(first, second)
    # which elements are dropped follows their order in memory: the mask is another, what is kept is the same
    close(first, expected.where(first != 0, 0.0))
    assert 0.4 < (first == 0).double().mean() < 0.6


@pytest.mark.parametrize("training", [False, True])
def test_random_numbers_that_a_trace_would_fix_are_drawn_at_every_call(training):
    def forward(m, x):
        return m.a(x) + torch.randn(1, dtype=torch.float64)

    model = randomised(Net(forward, a=conv_bn(4, 6))).train(training)
    fast = fastres.accelerate(model)
    with torch.no_grad():
        torch.manual_seed(3)
        expected = [model(image()) for _ in range(2)]
        torch.manual_seed(3)
        for one in expected:
            close(fast(image()), one)


def test_mappings_keep_their_type_and_order():
    def forward(m, x):
        out = collections.OrderedDict()
        out["out"] = m.a(x)
        out["aux"] = x + 1
        return out

    model = randomised(Net(forward, a=conv_bn(4, 6)))
    with torch.no_grad():
        made = check(model, image())(image())
    assert type(made) is collections.OrderedDict and list(made) == ["out", "aux"]


def test_named_tuples_keep_their_type():
    Pair = collections.namedtuple("Pair", "first second")
    model = randomised(Net(lambda m, x: Pair(m.a(x), x), a=conv_bn(4, 6)))
    with torch.no_grad():
        made = fastres.accelerate(model)(image())
    assert type(made).__name__ == "Pair"
    close(made.first, model(image()).first)


class _Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = conv_bn(4, 6)

    def forward(self, x, mask=None, *, scale: float = 2.0):
        y = self.a(x) * scale
        return y if mask is None else y * mask


def test_arguments_with_defaults_keep_them_and_may_be_given():
    model = randomised(_Masked())
    fast, mask = check(model, image()), image(c=6, seed=3)
    with torch.no_grad():
        close(fast(image(), mask), model(image(), mask))
        close(fast(image(), mask=mask, scale=3.0), model(image(), mask=mask, scale=3.0))
        close(fast(x=image()), model(x=image()))
        close(fast(image()), model(image()))


def test_a_module_called_twice_is_two_nodes():
    def forward(m, x):
        return F.relu(m.a(F.relu(m.a(x))))

    model = randomised(Net(forward, a=conv_bn(4, 4)))
    assert [node.name for node in convs(model)] == ["a.0", "a.0"]
    check(model, image())


def test_a_module_under_two_names_works_under_both():
    shared = conv_bn(4, 4)
    model = randomised(Net(lambda m, x: m.b(F.relu(m.a(x))), a=shared, b=shared))
    assert len(convs(model)) == 2
    check(model, image())


def test_constants_made_in_the_forward_stay_with_the_graph_and_not_with_the_module():
    def forward(m, x):
        mean = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).view(1, -1, 1, 1)
        return m.a((x - mean) / 2)

    model = randomised(Net(forward, a=conv_bn(4, 6)))
    before = dict(model.__dict__)
    check(model, image())
    assert model.__dict__.keys() == before.keys()


def test_parameters_buffers_and_plain_tensors_of_the_forward_are_read_at_every_call():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = conv_bn(4, 6)
            self.gamma = nn.Parameter(torch.ones(6, 1, 1))
            self.register_buffer("offset", torch.zeros(6, 1, 1))
            self.plain = torch.ones(1, dtype=torch.float64)

        def forward(self, x):
            return self.a(x) * self.gamma + self.offset * self.plain

    model = randomised(Scaled())
    fast = check(model, image())
    with torch.no_grad():
        model.gamma.mul_(2)
        model.offset.add_(1)
        model.plain = torch.full((1,), 3.0, dtype=torch.float64)
        close(fast(image()), model(image()))


# -- what fx cannot trace ----------------------------------------------------------------------------------------------


class _Branching(nn.Module):
    """Control flow over data: no trace holds it."""

    def __init__(self, c: int = 4):
        super().__init__()
        self.a, self.b = conv_bn(c, c), conv_bn(c, c)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else self.b(x)


def test_a_child_that_cannot_be_traced_is_called_as_it_is_and_the_rest_is_captured():
    model = randomised(nn.Sequential(*conv_bn(4, 4), _Branching(), *conv_bn(4, 6)))
    graph = capture(model)
    assert [type(node).__name__ for node in graph.nodes] == ["Conv", "Opaque", "Conv"]
    assert graph.nodes[1].reason and graph.nodes[1].python
    assert any(note.startswith("2: called as it is") for note in graph.notes)
    fast = check(model, image())
    with torch.no_grad():
        for sign in (1, -1):
            close(fast(sign * image().abs()), model(sign * image().abs()))


def test_the_innermost_refusing_module_is_the_one_left_alone():
    inner = nn.Sequential(*conv_bn(4, 4), nn.Sequential(_Branching()))
    graph = capture(randomised(nn.Sequential(inner, *conv_bn(4, 4))))
    assert [node.name for node in graph.nodes if isinstance(node, Opaque)] == ["0.2.0"]


def test_a_root_that_cannot_be_traced_raises_with_the_reason():
    with pytest.raises(CaptureError, match="_Branching"):
        capture(_Branching().eval())


class _Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = conv_bn(4, 4)
        self.calls, self.seen = 0, []

    def forward(self, x):
        self.calls += 1
        self.last = self.a(x)
        self.seen.append(self.last)
        return self.last


def test_a_forward_that_keeps_state_keeps_it_and_a_trace_leaves_nothing_behind():
    model = randomised(nn.Sequential(_Remembering(), nn.ReLU()))
    before = dict(model[0].__dict__)
    with pytest.raises(CaptureError):
        capture(model[0])
    assert model[0].__dict__ == before and model[0].seen == []
    fast = fastres.accelerate(model)
    with torch.no_grad():
        out = fast(image())
    assert model[0].calls == 1 and len(model[0].seen) == 1
    close(F.relu(model[0].last), out)


def test_a_root_that_keeps_state_keeps_it():
    model = randomised(_Remembering())
    fast = fastres.accelerate(model)
    with torch.no_grad():
        for _ in range(2):
            close(fast(image()), model.last)
    assert model.calls == fast.calls == 2


def test_no_proxies_outlive_a_capture():
    capture(torchvision.models.resnet18().eval())
    gc.collect()
    assert not [o for o in gc.get_objects() if isinstance(o, torch.fx.Proxy)]


def test_shapes_that_depend_on_data_fall_back_to_pytorch():
    model = randomised(Net(lambda m, x: m.a(x)[m.a(x) > 0], a=conv_bn(4, 4)))
    check(model, image())


def test_a_view_that_wants_contiguous_memory_gets_it():
    """Values are channels_last inside a plan, which `.view` across channels and pixels refuses."""
    model = randomised(
        Net(lambda m, x: m.fc(m.a(x).view(x.size(0), -1)), a=conv_bn(4, 6), fc=nn.Linear(6 * 63, 3))
    )
    check(model, image())


def test_a_view_inside_a_module_that_is_called_as_it_is_gets_contiguous_memory():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4 * 63, 3)

        def forward(self, x):
            return self.fc(x.view(len(x), -1))

    model = randomised(nn.Sequential(*conv_bn(4, 4), Head()))
    check(model, image())


# -- hooks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where", ["c", "c.0", "c.1", "relu", ""], ids=["block", "conv", "bn", "relu", "root"]
)
def test_a_hooked_module_fires_its_hooks_once_a_call_with_real_tensors(where):
    model = randomised(Net(lambda m, x: m.relu(m.c(x)), c=conv_bn(4, 6), relu=nn.ReLU()))
    fast, seen = fastres.accelerate(model), []
    with torch.no_grad():
        expected = model(image())
        fast(image())
        handle = model.get_submodule(where).register_forward_hook(
            lambda m, args, out: seen.append(out.clone())
        )
        for count in (1, 2):
            close(fast(image()), expected)
            assert len(seen) == count and type(seen[-1]) is torch.Tensor
        handle.remove()
        close(fast(image()), expected)
    assert len(seen) == 2
    assert not opaques(model)


def test_a_hook_may_change_what_its_module_returns():
    model = randomised(nn.Sequential(*conv_bn(4, 6), nn.ReLU(), *conv_bn(6, 5)))
    model[2].register_forward_hook(lambda m, args, out: out[:, :, :5, :5] * 2)
    model[0].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    check(model, image())


def test_a_forward_of_the_objects_own_is_called():
    model = randomised(nn.Sequential(*conv_bn(4, 4), nn.ReLU()))
    model[0].forward = lambda x: x * 2
    check(model, image())


def test_hooks_on_every_module_of_the_process_fire():
    model, seen = randomised(nn.Sequential(*conv_bn(4, 4), nn.ReLU())), []
    fast = fastres.accelerate(model)
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, args, out: seen.append(type(m).__name__)
    )
    try:
        with torch.no_grad():
            fast(image())
    finally:
        handle.remove()
    assert {"Conv2d", "BatchNorm2d", "ReLU"} <= set(seen)


# -- single layers, threads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv2d(4, 6, 3),
        lambda: nn.BatchNorm2d(4),
        lambda: nn.MaxPool2d(2),
        lambda: nn.Sequential(),
        lambda: nn.ReLU(inplace=False),
        lambda: timm.layers.StdConv2d(4, 6, 3),
    ],
)
def test_a_single_layer_can_be_accelerated(layer):
    model, seen = randomised(layer()), []
    fast = check(model, image())
    model.register_forward_hook(lambda m, args, out: seen.append(1))
    with torch.no_grad():
        fast(image())
    assert seen == [1]


def test_a_capture_does_not_disturb_other_threads():
    """fx patches nn.Module's call for the whole process."""
    model, other = torchvision.models.resnet18().eval(), randomised(nn.Sequential(*conv_bn(4, 4), nn.ReLU()))
    expected, failures, done = other(image()), [], threading.Event()

    def run():
        while not done.is_set():
            try:
                close(other(image()), expected)
            except Exception as error:
                failures.append(error)
                return

    thread = threading.Thread(target=run)
    thread.start()
    try:
        graphs = [capture(model) for _ in range(3)]
    finally:
        done.set()
        thread.join()
    assert not failures
    assert all(len(graph.nodes) == len(graphs[0].nodes) for graph in graphs)


def test_the_graph_evaluates_to_what_the_module_computes():
    model = randomised(torchvision.models.resnet18(num_classes=5))
    x = image(c=3, h=33, w=40)
    with torch.no_grad():
        close(evaluate(capture(model), (x,)), model(x))
    assert sum(isinstance(node, MaxPool) for node in capture(model).nodes) == 1
