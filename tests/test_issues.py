"""What users of other tools complain of (threads of August 2026 and before): it must not happen here."""

import copy
import time

import pytest
import torch
import torchvision
from torch import nn

import fastres
from fastres.plan import pattern as patterns
from tests.graph.nets import close, conv_bn, image, randomised
from tests.plan.fakes import Failing, Fake, registered


def block_net() -> nn.Module:
    return randomised(
        torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    )


def test_folded_weights_do_not_go_stale():
    """pytorch#108863: weights that are changed after freezing are ignored."""
    model, x = block_net(), image(1, 3, 33, 33)
    fast = fastres.accelerate(model)
    with torch.no_grad():
        fast(x)
        model.load_state_dict(
            {k: v * 1.1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
        )
        close(fast(x), model(x))


def test_parameters_are_not_duplicated_and_a_second_shape_runs():
    """pytorch#103990: freezing copies every parameter, or pins the input's shape."""
    model = block_net()
    fast = fastres.accelerate(model)
    assert {p.data_ptr() for p in fast.parameters()} == {p.data_ptr() for p in model.parameters()}
    with torch.no_grad():
        for shape in ((1, 3, 33, 33), (2, 3, 40, 33), (1, 3, 33, 33)):
            close(fast(image(*shape)), model(image(*shape)))
    # shapes share the constants of everything whose constants do not depend on the shape
    made = fast._fastres.engine.prepared.constants._made
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert len(made) <= 2 * (convolutions + 4)


def test_convolution_bias_and_activation_are_one_call():
    """pytorch#3823, #58860, #70487: conv + bias + activation run apart."""
    fast = fastres.accelerate(nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU()).eval())
    with torch.no_grad():
        fast(image().float())
    (row,) = fast.report(measure=False).rows
    assert row.problem.endswith("plain relu")


def test_a_stem_on_three_channels_has_candidates_of_its_own():
    """pytorch#68506: the fused call is 17 times slower on a 7x7 convolution in channels_last."""
    from fastres.backends.cudnn import StemConfig, StemPool
    from fastres.plan.problem import ConvSpec, PoolSpec, Problem
    from fastres.plan.target import on_paper

    conv = ConvSpec(8, 3, 224, 224, 64, (7, 7), (2, 2), (3, 3), act=fastres.Activation("relu"))
    pool = PoolSpec(8, 64, 112, 112, (3, 3), (2, 2), (1, 1))
    problem = Problem("stem_pool", (("conv", conv), ("pool", pool)), torch.bfloat16, ("conv.x",), ("pool",))
    candidate, target = StemPool(), on_paper("sm90")
    assert candidate.accepts(problem, target) is None
    first = candidate.configs(problem, target)[0]
    assert isinstance(first, StemConfig) and first.form != "plain"


def test_an_engine_that_is_not_found_is_no_error_of_the_users():
    """apex#1140, tensorflow#60377: the fused call finds no engine and the program ends."""
    with registered(Failing(patterns.CONV_BN_ACT, "launch", RuntimeError("unable to find an engine"))):
        model = randomised(nn.Sequential(*conv_bn(4, 6), nn.ReLU()))
        fast = fastres.accelerate(model)
        with torch.no_grad():
            close(fast(image()), model(image()))
        assert "unable to find an engine" in fast.report(measure=False).why("0")


def test_a_slower_kernel_is_not_chosen_for_being_ours():
    """triton#772, pytorch#111182, #91794, pytorch/TensorRT#2724: slower than what it replaces."""
    with registered(Fake(patterns.CONV_BN_ACT, "slower", ms=1e9)):
        fast = fastres.accelerate(randomised(nn.Sequential(*conv_bn(4, 6))))
        with torch.no_grad():
            fast(image())
        row = fast.report(measure=False).rows[0]
    assert row.candidate == "reference.conv_bn_act"
    assert ("slower.conv_bn_act", "1000000000.000 ms (estimate) is slower in this cover") in row.others


def test_a_shape_seen_before_is_not_planned_again():
    """pytorch#171672, #188150: graphs are captured again for every shape that comes back."""
    fast = fastres.accelerate(block_net())
    with torch.no_grad():
        for n in (1, 2, 3):
            fast(image(n, 3, 33, 33))
        plans = dict(fast._fastres.engine.prepared.plans)
        contexts = {id(c) for idle in fast._fastres.engine._idle.values() for c in idle}
        for n in (3, 1, 2, 1):
            fast(image(n, 3, 33, 33))
    assert fast._fastres.engine.prepared.plans == plans
    assert {id(c) for idle in fast._fastres.engine._idle.values() for c in idle} == contexts


def test_nothing_is_tuned_at_a_start():
    """pytorch#172819: a warm start tunes again."""
    counting = Fake(patterns.CONV_BN_ACT, "counting", ms=1e9)
    with registered(counting):
        fast = fastres.accelerate(randomised(nn.Sequential(*conv_bn(4, 6))))
        with torch.no_grad():
            fast(image())
    assert counting.bound == 0, "by default no candidate is run to be timed"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_formats_change_nothing_but_speed(layout):
    """pytorch#50036: channels_last is lost or copied on the way, and .view fails."""
    model = randomised(nn.Sequential(*conv_bn(4, 6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 63, 3)))
    x = image().contiguous(memory_format=layout)
    fast = fastres.accelerate(copy.deepcopy(model).to(memory_format=layout))
    with torch.no_grad():
        close(fast(x), model(image()))


def test_a_channels_last_output_is_channels_last():
    """pytorch#50036."""
    fast = fastres.accelerate(nn.Sequential(*conv_bn(4, 6), nn.ReLU()).eval())
    with torch.no_grad():
        out = fast(image().float().contiguous(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_the_first_call_is_no_compilation():
    """pytorch#111182: minutes before the first result."""
    fast, x = fastres.accelerate(block_net()), image(1, 3, 33, 33)
    started = time.process_time()
    with torch.no_grad():
        fast(x)
    assert time.process_time() - started < 20


def test_what_is_saved_is_the_network_and_runs_anywhere():
    """TensorRT#1920: engines are not portable."""
    model, x = block_net(), image(1, 3, 33, 33)
    fast = fastres.accelerate(model)
    with torch.no_grad():
        fast(x)
        other = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
        other.double().eval().load_state_dict(fast.state_dict(), strict=True)
        close(other(x), model(x))


def test_fused_layers_load_and_save_the_usual_weights():
    """inplace_abn#163: accuracy of 0 % with loaded weights, since keys or meanings differ."""
    reference = randomised(torchvision.models.resnet18(num_classes=5))
    ours, x = fastres.resnet18(num_classes=5).double().eval(), image(1, 3, 33, 33)
    ours.load_state_dict(reference.state_dict(), strict=True)
    with torch.no_grad():
        close(ours(x), reference(x))
    assert list(ours.state_dict()) == list(reference.state_dict())


def test_basic_blocks_are_supported():
    """AITemplate's BasicBlock raises NotImplementedError."""
    model, x = block_net(), image(1, 3, 33, 33)
    fast = fastres.accelerate(model)
    with torch.no_grad():
        close(fast(x), model(x))
    assert all(row.candidate != "PyTorch" for row in fast.report(measure=False).rows)


def test_eps_counts_in_the_folding():
    """apex's frozen BN folds without eps."""
    model = randomised(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, eps=0.5)))
    with torch.no_grad():
        close(fastres.accelerate(model)(image()), model(image()))
