"""Prepared constants never go stale: every way in which a network can change between two calls."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import fastres
from tests.graph.nets import close, conv_bn, image, randomised


def network() -> nn.Module:
    return nn.Sequential(
        *conv_bn(4, 6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


def fresh(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What PyTorch says about the network as it is now."""
    with torch.no_grad():
        return copy.deepcopy(model)(x)


class _Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def optimizer_step(m):
    optimizer = torch.optim.SGD(m.parameters(), lr=0.5)
    with torch.enable_grad():
        m(image()).square().sum().backward()
    optimizer.step()


def foreach_step(m):
    optimizer = torch.optim.AdamW(m.parameters(), lr=0.5, foreach=True)
    with torch.enable_grad():
        m(image()).square().sum().backward()
    optimizer.step()


def load(m):
    m.load_state_dict(randomised(network(), 5).state_dict())


def load_and_assign(m):
    m.load_state_dict(randomised(network(), 5).state_dict(), assign=True)


def data_of_a_convolution(m):
    m[0].weight.data = m[0].weight.data * 2


def data_of_a_linear(m):
    m[6].weight.data = m[6].weight.data * 2


def data_twice(m):
    """The second tensor may take the address that the first gave back."""
    for _ in range(2):
        m[0].weight.data = m[0].weight.data * 2
        m[6].bias.data = m[6].bias.data + 1


def another_parameter(m):
    m[3].bias = nn.Parameter(torch.ones(4, dtype=torch.float64))


def no_bias_any_more(m):
    m[3].bias = None


def in_place(m):
    with torch.no_grad():
        m[0].weight.mul_(-1)


def one_element(m):
    with torch.no_grad():
        m[6].bias[1] = 7.0


def running_mean(m):
    m[1].running_mean.add_(1)


def another_running_variance(m):
    m[1].running_var = m[1].running_var * 2


def copied_over(m):
    m[1].bias.data.copy_(torch.arange(6.0)), m[1].bias.add_(0)


def to_float_and_back(m):
    m.to(torch.float32).to(torch.float64)


def through_half(m):
    m.half().double()


def eps(m):
    m[1].eps = 1.0


def negative_slope(m):
    m[2] = nn.LeakyReLU(0.5)


def dilation(m):
    m[0].dilation, m[0].padding = (2, 2), (2, 2)


def replaced(m):
    m[1] = randomised(nn.BatchNorm2d(6), 7)


def removed(m):
    m[2] = nn.Identity()


def appended(m):
    m.append(nn.Linear(3, 2).double())


def parametrized(m):
    parametrize.register_parametrization(m[0], "weight", _Doubled())


def weight_norm_new(m):
    parametrizations.weight_norm(m[0])


def weight_norm_old(m):
    weight_norm(m[0])


def spectral_norm_new(m):
    parametrizations.spectral_norm(m[0]).eval()


def spectral_norm_old(m):
    spectral_norm(m[0]).eval()


def pruned(m):
    prune.l1_unstructured(m[0], "weight", amount=0.5)


def pruned_linear(m):
    prune.random_unstructured(m[6], "weight", amount=0.5)


def training_moved_the_statistics(m):
    m.train()
    m(image())
    m.eval()


def bn_in_training(m):
    m[1].train()


def own_forward(m):
    m[2].forward = lambda x: -x


WAYS = [
    optimizer_step, foreach_step, load, load_and_assign, data_of_a_convolution, data_of_a_linear, data_twice,
    another_parameter, no_bias_any_more, in_place, one_element, running_mean, another_running_variance, copied_over,
    to_float_and_back, through_half, eps, negative_slope, dilation, replaced, removed, appended, parametrized,
    weight_norm_new, weight_norm_old, spectral_norm_new, spectral_norm_old, pruned, pruned_linear,
    training_moved_the_statistics, bn_in_training, own_forward,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("through", ["original", "accelerated"])
@pytest.mark.parametrize("change", WAYS, ids=lambda f: f.__name__)
def test_a_change_is_in_the_next_result(change, through):
    model, x = randomised(network()), image()
    fast = fastres.accelerate(model)
    with torch.no_grad():
        close(fast(x), fresh(model, x))
        fast(x)
        change(fast if through == "accelerated" else model)
        expected = fresh(model, x)
        close(fast(x), expected)
        close(model(x), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "then", [optimizer_step, data_of_a_convolution, in_place, load_and_assign], ids=lambda f: f.__name__
)
@pytest.mark.parametrize(
    "first", [parametrized, weight_norm_old, pruned, spectral_norm_new], ids=lambda f: f.__name__
)
def test_changes_add_up(first, then):
    model, x = randomised(network()), image()
    fast = fastres.accelerate(model)
    first(model)
    parameter = next(p for name, p in model.named_parameters() if name.startswith("0."))
    with torch.no_grad():
        close(fast(x), fresh_in_place(model, x))
        if then is optimizer_step:
            optimizer_step(model)
        else:
            parameter.data = parameter.data * 1.5
        close(fast(x), fresh_in_place(model, x))


def fresh_in_place(model, x):
    """Copies cannot be made of what hooks have left on a module."""
    with torch.no_grad():
        return model(x)


def test_the_tensor_that_a_parameter_pointed_to_before_is_not_written():
    """Swapping weights for their running average and back, as EMA does."""
    model, x = randomised(network()), image()
    fast = fastres.accelerate(model)
    with torch.no_grad():
        before = fast(x)
        mine = {name: p.data for name, p in model.named_parameters()}
        kept = {name: t.clone() for name, t in mine.items()}
        for p in model.parameters():
            p.data = p.data * 0.5
        close(fast(x), fresh(model, x))
        assert all(torch.equal(mine[name], kept[name]) for name in mine)
        for name, p in model.named_parameters():
            p.data = mine[name]
        close(fast(x), before)


@pytest.mark.parametrize("renew", ["refold", "train and eval", "original's train and eval", "release"])
def test_a_write_that_pytorch_does_not_count_is_caught_by(renew):
    model, x = randomised(network()), image()
    fast = fastres.accelerate(model)
    with torch.no_grad():
        fast(x)
        model[0].weight.data.mul_(2)  # no version is counted
        if renew == "refold":
            fast.refold()
        elif renew == "release":
            fast.release()
        elif renew == "train and eval":
            fast.train().eval()
        else:
            model.train(), fast.eval()
        close(fast(x), fresh(model, x))


def test_inference_tensors_count_no_versions_and_are_prepared_at_every_call():
    with torch.inference_mode():
        model = randomised(network())
        fast, x = fastres.accelerate(model), image()
        assert next(model.parameters()).is_inference()
        for _ in range(3):
            close(fast(x), copy.deepcopy(model)(x))
            model[0].weight.mul_(1.5)
            model[1].running_mean.add_(0.5)


def test_hooks_that_are_added_later_fire_and_their_removal_is_noticed():
    model, x, seen = randomised(network()), image(), []
    fast = fastres.accelerate(model)
    with torch.no_grad():
        expected = fast(x)
        rows = len(fast.report(measure=False).rows)
        pre = model[3].register_forward_pre_hook(lambda m, args: seen.append("pre"))
        close(fast(x), expected)
        post = model[0].register_forward_hook(lambda m, args, out: seen.append("post"))
        close(fast(x), expected)
        assert seen == ["pre", "post", "pre"]
        pre.remove(), post.remove()
        close(fast(x), expected)
    assert len(seen) == 3 and len(fast.report(measure=False).rows) == rows


def test_a_copy_and_its_source_do_not_follow_each_other():
    model, x = randomised(network()), image()
    fast = fastres.accelerate(model)
    with torch.no_grad():
        before = fast(x)
        other = copy.deepcopy(fast)
        other[0].weight.mul_(2)
        close(other(x), fresh(other.original, x))
        close(fast(x), before)


def test_two_ways_to_run_one_network_follow_it_both():
    model, x = randomised(network()), image()
    one, two = fastres.accelerate(model), fastres.accelerate(model, tune="off")
    with torch.no_grad():
        one(x), two(x)
        optimizer_step(one)
        expected = fresh(model, x)
        close(one(x), expected)
        close(two(x), expected)


@pytest.mark.parametrize("owner", ["network", "block in a foreign network"])
@pytest.mark.filterwarnings("ignore")
def test_networks_of_ours_follow_their_parameters_too(owner):
    if owner == "network":
        model = randomised(fastres.resnet11(num_classes=3))
    else:
        model = randomised(torchvision.models.ResNet(fastres.BasicBlock, [1, 1, 1, 1], num_classes=3))
    reference = copy.deepcopy(model)
    x = image(2, 3, 33, 33)
    with torch.no_grad():
        model(x)
        for one in (model, reference):
            one.layer1[0].conv1.weight.data = one.layer1[0].conv1.weight.data * 2
            one.layer1[0].bn2.running_mean.add_(1)
            one.layer1[0].bn1.eps = 0.5
        with torch.enable_grad():
            expected = reference(x).detach()
        close(model(x), expected)


def _plans(fast) -> list[int]:
    return [id(plan) for plan in fast._fastres.engine.prepared.plans.values()]


@pytest.mark.parametrize("through", ["accelerated", "original"])
def test_validation_between_epochs_is_planned_once_and_follows_the_training(through):
    model = randomised(network())
    fast = fastres.accelerate(model)
    switched = {"accelerated": fast, "original": model}[through]
    x = image()
    with torch.no_grad():
        fast(x)
    planned = _plans(fast)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        switched.train()
        fast(x).square().sum().backward()
        optimizer.step()
        assert not fast._fastres.engine._idle, "training wants the buffers' memory"
        model[3].weight.data.mul_(2)  # not counted by PyTorch
        switched.eval()
        with torch.no_grad():
            close(fast(x), fresh(model, x))
        assert _plans(fast) == planned


def test_plans_of_another_mode_do_not_outlive_a_change_of_structure():
    model = randomised(network())
    fast = fastres.accelerate(model)
    with torch.no_grad():
        fast(image())
    fast.train()
    model[2] = nn.Identity()
    fast.eval()
    with torch.no_grad():
        close(fast(image()), fresh(model, image()))
