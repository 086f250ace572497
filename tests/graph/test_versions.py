"""The watch: what counts as a change of the structure, what as a change of the tensors, and what as none."""

import pytest
import torch
from torch import nn

from fastres.graph.versions import Watch

from .nets import Net, conv_bn


def network() -> nn.Module:
    return Net(lambda m, x: m.a(x) * m.factor, a=conv_bn(4, 6), fc=nn.Linear(4, 3)).eval()


def _set(name, value):
    return lambda m: setattr(m.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], value)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.a.append(nn.ReLU()),
        lambda m: _set("fc", nn.Linear(4, 3))(m),
        lambda m: m.fc.register_forward_hook(print),
        lambda m: m.a.register_forward_pre_hook(print),
        lambda m: m.a.register_full_backward_hook(print),
        lambda m: m.a[1].train(),
        _set("a.1.eps", 0.5),
        _set("a.0.stride", (2, 2)),
        _set("factor", 3.0),
        _set("a.forward", print),
    ],
)
def test_structure_changes(change):
    model = network()
    model.factor = 2.0
    watch = Watch(model)
    assert watch.same_structure() and watch.same_tensors()
    change(model)
    assert not watch.same_structure()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.fc.weight.mul_(2),
        lambda m: m.a[1].running_mean.add_(1),
        lambda m: setattr(m.fc.weight, "data", m.fc.weight.data.clone()),
        lambda m: setattr(m.fc, "bias", nn.Parameter(m.fc.bias.detach().clone())),
        lambda m: setattr(m.fc, "bias", None),
        lambda m: m.register_buffer("more", torch.ones(1)),
    ],
)
@torch.no_grad()
def test_tensors_change(change):
    model = network()
    watch = Watch(model)
    change(model)
    assert not watch.same_tensors()
    watch.renew()
    assert watch.same_tensors()


@torch.no_grad()
def test_an_address_that_comes_back_is_not_the_old_tensor():
    model = network()
    watch = Watch(model)
    for _ in range(20):
        model.fc.weight.data = model.fc.weight.data * 2
        assert not watch.same_tensors()


def test_a_module_apart_may_keep_what_it_likes():
    model = network()
    watch = Watch(model, apart=(model,))
    model.calls, model.factor = 1, 7.0
    assert watch.same_structure()
    model.a.append(nn.ReLU())
    assert not watch.same_structure()


def test_reading_changes_nothing():
    model = network()
    watch = Watch(model)
    model.a(torch.randn(1, 4, 5, 5)), list(model.parameters()), model.state_dict()
    assert watch.same_structure() and watch.same_tensors()


def test_tensors_without_versions_always_count_as_changed():
    with torch.inference_mode():
        model = network()
    assert not Watch(model).same_tensors()
