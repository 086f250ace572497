"""Patterns: which runs of nodes they cover, with which inputs and outputs, and which they leave alone."""

import pytest
import torch.nn.functional as F
import torchvision
from torch import nn

from fastres.graph.capture import capture
from fastres.graph.ir import Conv, Graph
from fastres.plan import pattern as patterns
from tests.graph.nets import Net, conv_bn


def matches(pattern, graph: Graph, start: int | str):
    nodes = graph.nodes
    if isinstance(start, str):
        start = [node.name for node in nodes].index(start)
    return list(pattern.matches(nodes, start, graph.users()))


@pytest.fixture(scope="module")
def resnet50() -> Graph:
    return capture(torchvision.models.resnet50().eval())


def names(match) -> list[str]:
    return [node.name for _, node in match.nodes]


def test_every_convolution_is_a_conv_bn_act(resnet50):
    for index, node in enumerate(resnet50.nodes):
        found = matches(patterns.CONV_BN_ACT, resnet50, index)
        assert len(found) == isinstance(node, Conv)
        for match in found:
            reads = {"conv.x": node.x} | ({} if node.residual is None else {"conv.residual": node.residual})
            assert dict(match.inputs) == reads and match.outputs == (("conv", node.output),)


def test_stem_pool_hides_the_convolutions_output(resnet50):
    (match,) = matches(patterns.STEM_POOL, resnet50, 0)
    assert names(match) == ["conv1", "maxpool"] and [role for role, _ in match.outputs] == ["pool"]


def test_stem_pool_takes_a_normalisation_before_it():
    graph = capture(torchvision.models.resnet18().eval(), normalize=((0.5,) * 3, (0.2,) * 3))
    (match,) = matches(patterns.STEM_POOL, graph, 0)
    assert [role for role, _ in match.nodes] == ["normalize", "conv", "pool"]
    assert match.inputs == (("normalize.x", graph.inputs[0]),)
    (without,) = matches(patterns.STEM_POOL, graph, 1)
    assert [role for role, _ in without.nodes] == ["conv", "pool"]


def test_a_stem_whose_output_is_read_elsewhere_is_not_hidden():
    def forward(m, x):
        y = F.relu(m.a(x))
        return F.max_pool2d(y, 2), y

    graph = capture(Net(forward, a=conv_bn(3, 8)).eval())
    assert not matches(patterns.STEM_POOL, graph, 0)


def test_dual_takes_projection_and_expand(resnet50):
    (match,) = matches(patterns.DUAL, resnet50, "layer2.0.downsample.0")
    assert names(match) == ["layer2.0.downsample.0", "layer2.0.conv3"]
    assert [name for name, _ in match.inputs] == ["shortcut.x", "expand.x"]
    assert [role for role, _ in match.outputs] == ["expand"]


def test_expand_reduce_crosses_into_the_next_block(resnet50):
    (match,) = matches(patterns.EXPAND_REDUCE, resnet50, "layer1.1.conv3")
    assert names(match) == ["layer1.1.conv3", "layer1.2.conv1"]
    assert [role for role, _ in match.outputs] == ["expand", "reduce"]
    (projected,) = matches(patterns.EXPAND_REDUCE, resnet50, "layer3.0.downsample.0")
    assert names(projected) == ["layer3.0.downsample.0", "layer3.0.conv3", "layer3.1.conv1"]


def test_expand_reduce_ends_before_a_strided_shortcut(resnet50):
    """The last expand of a stage is read by the next stage's reduce and its projection: both outputs are written."""
    (match,) = matches(patterns.EXPAND_REDUCE, resnet50, "layer1.2.conv3")
    assert names(match) == ["layer1.2.conv3", "layer2.0.conv1"]


def test_shifted_block_covers_three_by_three_expand_and_the_next_reduce(resnet50):
    long, short = matches(patterns.SHIFTED_BLOCK, resnet50, "layer1.1.conv2")
    assert names(long) == ["layer1.1.conv2", "layer1.1.conv3", "layer1.2.conv1"]
    assert names(short) == names(long)[:2]
    assert [name for name, _ in long.inputs] == ["conv.x", "expand.residual"]
    first, _ = matches(patterns.SHIFTED_BLOCK, resnet50, "layer1.0.conv2")
    assert [role for role, _ in first.nodes] == ["conv", "shortcut", "expand", "reduce"]
    assert not matches(patterns.SHIFTED_BLOCK, resnet50, "layer2.0.conv2"), "it has stride 2"


def test_pool_linear_ends_the_network(resnet50):
    (match,) = matches(patterns.POOL_LINEAR, resnet50, "avgpool")
    assert names(match) == ["avgpool", "fc"]


def test_no_pattern_takes_a_residual_from_nowhere():
    """An expand that adds its own 3x3's output: the residual is inside the run, but no slot's."""

    def forward(m, x):
        y = F.relu(m.a(x))
        return F.relu(m.b(y) + y)

    graph = capture(Net(forward, a=conv_bn(8, 8), b=conv_bn(8, 8, 1)).eval())
    assert not matches(patterns.SHIFTED_BLOCK, graph, 0)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2),
        nn.Conv2d(8, 8, 3, padding=1, stride=2),
        nn.Conv2d(8, 8, 5, padding=2),
    ],
)
def test_shifted_block_takes_a_plain_three_by_three_only(conv):
    def forward(m, x):
        return F.relu(m.b(F.relu(m.a(x))) + m.s(x))

    stride = conv.stride[0]
    model = Net(forward, a=conv, b=nn.Conv2d(8, 8, 1), s=nn.Conv2d(8, 8, 1, stride))
    graph = capture(model.eval())
    assert not matches(patterns.SHIFTED_BLOCK, graph, 0)
    assert matches(patterns.DUAL, graph, 1)
