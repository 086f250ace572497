"""Contexts: kernels that write into an arena, beside calls that bring their own memory, all on poisoned memory."""

import contextlib
import gc
import random
import weakref

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import fastres
from fastres.engine import Engine
from fastres.graph.capture import capture
from fastres.nn import BasicBlock, Bottleneck, ResNet
from fastres.plan import pattern as patterns
from fastres.plan.candidate import REGISTRY
from fastres.plan.constants import Constants
from fastres.plan.context import Context
from fastres.plan.planner import Cost, make_plan
from fastres.plan.specs import propagate
from fastres.plan.steps import CandidateFailed, as_activation, on_device
from fastres.plan.target import detect
from tests.graph.nets import Net, close, conv_bn, image, randomised

from .fakes import Fake, Writing, registered, writing_set

CPU = torch.device("cpu")


class Poisoned(Context):
    """Its memory holds NaN before every run."""

    def run(self, inputs):
        self.arena.fill_(0xFF)
        if self.workspace is not None:
            self.workspace.fill_(0xFF)
        return super().run(inputs)


def context_of(model, x, prefer, static_inputs=False, constants=None) -> Poisoned:
    """A context in which `prefer(candidate, problem)` gives the cost."""
    graph = capture(model.eval())
    cost = lambda candidate, problem, target: Cost(None, prefer(candidate, problem), "estimate")  # noqa: E731
    plan = make_plan(graph, propagate(graph, (x,), x.dtype), x.dtype, detect(CPU), cost_model=cost)
    return Poisoned(plan, constants or Constants(), CPU, static_inputs)


def by_backend(**ms):
    return lambda candidate, problem: ms.get(candidate.backend, 1e6)


def ran(context) -> list[str]:
    return [s.candidate.name if s.candidate else "PyTorch" for s in context.plan.segments]


@pytest.fixture(params=[False, True], ids=["", "joined"])
def writers(request):
    Writing.joins.clear()
    with registered(*writing_set(join=request.param)) as candidates:
        yield candidates


def mixed(m, x):
    """Opaque calls between kernels, values with several readers, an intermediate output."""
    a = F.relu(m.a(x))
    b = F.softplus(m.b(a))
    c = F.relu(m.c(b) + a)
    d = F.max_pool2d(c, 2)
    return m.fc(d.mean((2, 3))), F.relu(m.d(c) + b), a


def _networks():
    return {
        "basic": lambda: ResNet(BasicBlock, [1, 1], num_classes=5),
        "bottleneck": lambda: ResNet(Bottleneck, [2, 1], num_classes=5),
        "densely connected": lambda: torchvision.models.DenseNet(8, (2, 2), 8, num_classes=5),
        "mixed": lambda: Net(
            mixed, a=conv_bn(3, 8), b=conv_bn(8, 8), c=conv_bn(8, 8), d=conv_bn(8, 8), fc=nn.Linear(8, 5)
        ),
    }


@pytest.mark.parametrize("network", _networks())
def test_kernels_that_write_compute_the_network(network, writers):
    model = randomised(_networks()[network]())
    context = context_of(model, image(2, 3, 33, 35), by_backend(fake=1.0))
    assert sum(name.startswith("writing.") for name in ran(context)) > 4
    for seed in range(3):
        x = image(2, 3, 33, 35, seed)
        with torch.no_grad():
            close(context.run((x,)), model(x))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("network", ["bottleneck", "mixed"])
def test_any_mixture_of_writing_and_allocating_kernels_computes_the_network(network, seed, writers):
    """Donated inputs are destroyed by their launches, arena places are used again, addresses change."""
    choose = random.Random(seed)
    costs: dict = {}

    def prefer(candidate, problem):
        if candidate.backend not in ("fake", "reference", "donating"):
            return 1e6
        return costs.setdefault((candidate.name, problem), choose.random() * len(problem.layers))

    with registered(Donating(patterns.CONV_BN_ACT)):
        model = randomised(_networks()[network]())
        context = context_of(model, image(2, 3, 21, 17), prefer)
        held = []
        for run in range(3):
            x = image(2, 3, 21, 17, run)
            with torch.no_grad():
                close(context.run((x,)), model(x))
            held.append(torch.empty(1000))


class Donating(Fake):
    """Returns its sum in the donated residual's memory, as oneDNN's does."""

    backend = "donating"

    def bind(self, problem, config, buffers, constants):
        launch = super().bind(problem, config, buffers, constants)
        if "conv.residual" not in buffers.donated:
            return launch
        at = problem.inputs.index("conv.residual")
        return lambda *inputs: inputs[at].copy_(launch(*inputs))


def test_a_donated_tensor_is_read_by_nobody_else():
    seen = []

    class Watching(Donating):
        def bind(self, problem, config, buffers, constants):
            seen.append(sorted(buffers.donated))
            return super().bind(problem, config, buffers, constants)

    def forward(m, x):
        y = m.a(x)
        z = m.b(y) + y
        return m.c(z) + z, z

    def dies(m, x):
        y = m.a(x)
        return m.b(F.relu(m.c(x))) + y

    children = dict(a=conv_bn(4, 4), b=conv_bn(4, 4), c=conv_bn(4, 4))
    with registered(Watching(patterns.CONV_BN_ACT)):
        for body, expected in ((forward, [[], ["conv.x"], []]), (dies, None)):
            seen.clear()
            model = randomised(Net(body, **children))
            context = context_of(model, image(), by_backend(donating=1.0))
            with torch.no_grad():
                for _ in range(2):
                    close(context.run((image(),)), model(image()))
            if expected is None:
                assert seen[-1] == ["conv.residual", "conv.x"], "both die with the last convolution"
            else:
                # y is read twice by the second; z is an output
                assert seen == [[], [], []]


def test_what_a_launch_returns_never_lies_in_the_arena():
    """A sum made in a donated buffer's memory would be overwritten by who gets that place next."""

    def forward(m, x):
        y = m.a(x)
        z = m.one(m.b(x)) + y
        u = F.relu(m.c(F.relu(m.d(z))))
        return m.e(u) + z

    def prefer(candidate, problem):
        if problem.pattern != "conv_bn_act":
            return 1e6
        wanted = "donating" if problem["conv"].kernel == (1, 1) else "fake"
        return 1.0 if candidate.backend == wanted else 1e6

    children = {name: conv_bn(4, 4) for name in "abcde"}
    with registered(*writing_set(), Donating(patterns.CONV_BN_ACT)):
        model = randomised(Net(forward, one=conv_bn(4, 4, 1), **children))
        context = context_of(model, image(), prefer)
        assert "fake.conv_bn_act" in ran(context) and "writing.conv_bn_act" in ran(context)
        with torch.no_grad():
            for seed in range(2):
                close(context.run((image(seed=seed),)), model(image(seed=seed)))


def test_outputs_are_the_callers_own():
    with registered(*writing_set()):
        model = randomised(nn.Sequential(*conv_bn(4, 6), nn.ReLU()))
        context = context_of(model, image(), by_backend(fake=1.0))
        with torch.no_grad():
            first = context.run((image(),))
            kept = first.clone()
            second = context.run((image(seed=1),))
    assert torch.equal(first, kept) and first.data_ptr() != second.data_ptr()
    assert first.untyped_storage().nbytes() == first.numel() * 8, "not a piece of the arena"


def test_inputs_are_left_alone_and_not_kept():
    with registered(*writing_set()):
        model = randomised(nn.Sequential(*conv_bn(4, 4), nn.ReLU(), *conv_bn(4, 4)))
        x = image().contiguous(memory_format=torch.channels_last)
        context = context_of(model, x, by_backend(fake=1.0))
        before = x.clone()
        with torch.no_grad():
            context.run((x,))
        assert torch.equal(x, before)
        assert all(value is not x for value in context.values)


def test_a_launch_is_bound_again_when_what_it_reads_lies_elsewhere():
    (writer,) = [c for c in writing_set() if c.pattern is patterns.CONV_BN_ACT]
    with registered(writer):
        model = randomised(nn.Sequential(*conv_bn(4, 4), nn.ReLU(), *conv_bn(4, 4)))
        here, there = (image(seed=s).contiguous(memory_format=torch.channels_last) for s in (0, 1))
        context = context_of(model, here, by_backend(fake=1.0))
        with torch.no_grad():
            bound = []
            for x in (here, here, there, there, here):
                close(context.run((x,)), model(x))
                bound.append(writer.bound)
    # two launches at first; then the first alone, when its input has moved
    assert bound == [2, 2, 3, 3, 4]


def test_consecutive_launches_with_one_join_become_one_call():
    Writing.joins.clear()
    with registered(*writing_set(join=True)):
        model = randomised(
            nn.Sequential(
                *conv_bn(4, 4),
                nn.ReLU(),
                *conv_bn(4, 4),
                nn.Softplus(),
                *conv_bn(4, 4),
                *conv_bn(4, 4),
                *conv_bn(4, 4),
            )
        )
        context = context_of(model, image(), by_backend(fake=1.0))
        with torch.no_grad():
            for seed in range(3):
                close(context.run((image(seed=seed),)), model(image(seed=seed)))
    # the first reads the caller's tensor and the third an opaque call's: they are bound anew when that moves
    assert Writing.joins == [2]
    assert len(context._steps) < len(context._unjoined)


def test_static_inputs_are_copied_in_and_results_out():
    with registered(*writing_set()):
        model = randomised(nn.Sequential(*conv_bn(4, 6), nn.ReLU()))
        context = context_of(model, image(), by_backend(fake=1.0), static_inputs=True)
        with torch.no_grad():
            outs = [context.run((image(seed=seed),)) for seed in range(3)]
            for seed, out in enumerate(outs):
                close(out, model(image(seed=seed)))
    (held,) = context.input_buffers()
    assert torch.equal(held, image(seed=2)) and held.is_contiguous(memory_format=torch.channels_last)


class Planar(Writing):
    """Reads its first input in either order, and notes the strides that it was bound to."""

    def __init__(self, pattern):
        super().__init__(pattern)
        self.strides = []

    def planar(self, problem):
        return frozenset(problem.inputs[:1])

    def bind(self, problem, config, buffers, constants):
        self.strides.append(buffers[problem.inputs[0]].stride())
        return super().bind(problem, config, buffers, constants)


def test_a_kernel_that_takes_both_orders_gets_the_input_as_it_lies():
    planes, rows = image(), image().contiguous(memory_format=torch.channels_last)
    sliced = torch.cat([image(), image()], 3)[..., ::2]
    with registered(candidate := Planar(patterns.CONV_BN_ACT)):
        model = randomised(nn.Sequential(*conv_bn(4, 6), nn.ReLU()))
        context = context_of(model, planes, by_backend(fake=1.0))
        # one memory, two orders: the address alone does not tell them apart
        moving = planes.flatten().clone()
        with torch.no_grad():
            for x in (planes, rows, sliced):
                moving.view(planes.shape).copy_(x)
                close(context.run((moving.view(planes.shape),)), model(x))
                as_rows = moving.as_strided(rows.shape, rows.stride()).copy_(x)
                close(context.run((as_rows,)), model(x))
                close(context.run((x,)), model(x))
    kept = {planes.stride(), rows.stride()}
    assert set(candidate.strides) == kept and sliced.stride() not in kept


@pytest.mark.parametrize("both", [False, True], ids=["one reader", "another reader takes channels_last"])
def test_a_static_input_has_the_order_that_all_its_readers_take(both):
    others = writing_set()[1:] if both else []
    with registered(candidate := Planar(patterns.CONV_BN_ACT), *others):
        net = Net(lambda m, x: (m.a(x), m.pool(x)) if both else m.a(x), a=conv_bn(4, 4), pool=nn.MaxPool2d(2))
        model = randomised(net)
        context = context_of(model, image(), by_backend(fake=1.0), static_inputs=True)
        with torch.no_grad():
            for x in (image(seed=1), image(seed=2).contiguous(memory_format=torch.channels_last)):
                got, expected = context.run((x,)), model(x)
                for ours, theirs in zip(got, expected, strict=True) if both else [(got, expected)]:
                    close(ours, theirs)
    (held,) = context.input_buffers()
    assert held.is_contiguous(memory_format=torch.channels_last) == both
    assert set(candidate.strides) == {held.stride()}


def test_memory_is_what_is_held():
    with registered(*writing_set()):
        model = randomised(nn.Sequential(*conv_bn(4, 6), nn.ReLU()))
        context = context_of(model, image(), by_backend(fake=1.0))
    assert context.memory >= 2 * 6 * 9 * 7 * 8
    assert context.memory == context.arena.numel() + 4 * context.counters.numel() + context.workspace.numel()


@pytest.mark.parametrize("backend", ["fake", "reference"])
def test_memory_goes_with_the_context_and_waits_for_no_garbage_collection(backend, writers):
    """On a GPU it is a gigabyte: `release()` and a plan that falls out of use give it back at once."""
    model = randomised(nn.Sequential(*conv_bn(4, 6), nn.ReLU(), *conv_bn(6, 6), nn.Softplus()))
    context = context_of(model, image(), by_backend(**{backend: 1.0}), static_inputs=True)
    with torch.no_grad():
        for _ in range(2):
            context.run((image(),))
    assert len(set(ran(context))) > 1
    held = weakref.ref(context)
    gc.disable()
    try:
        del context
        assert held() is None
    finally:
        gc.enable()


def test_an_opaque_call_reads_a_value_as_it_came_and_a_kernel_in_its_form():
    """A kernel's copy in channels_last never takes the place of the user's tensor."""
    seen = []

    class Looking(nn.Module):
        def forward(self, x):
            if type(x) is torch.Tensor:
                seen.append((x.is_contiguous(), x.dtype))
            return x.mean() * 2

    def forward(m, x):
        y = F.softplus(x)
        return m.a(y), m.look(y)

    model = randomised(Net(forward, a=conv_bn(4, 4), look=Looking()))
    model.look.register_forward_hook(lambda *args: None)
    with torch.no_grad():
        for _ in range(2):
            close(fastres.accelerate(model)(image()), model(image()))
    assert set(seen) == {(True, torch.float64)}


def test_a_call_that_changes_its_input_is_seen_by_kernels_behind_it_only():
    class Doubling(nn.Module):
        def forward(self, x):
            return x.mul_(2).sum() if x.dim() else x

    def forward(m, x):
        y = F.softplus(x)
        before = m.a(y)
        total = m.twice(y)
        return before, m.b(y), total

    model = randomised(Net(forward, a=conv_bn(4, 4), b=conv_bn(4, 4), twice=Doubling()))
    model.twice.register_forward_hook(lambda *args: None)
    with torch.no_grad():
        close(fastres.accelerate(model)(image()), model(image()))


def test_a_network_whose_calls_only_python_knows_gets_no_cuda_graph():
    model = randomised(nn.Sequential(*conv_bn(4, 4), nn.ReLU(), *conv_bn(4, 4)))
    plain = context_of(model, image(), by_backend(reference=1.0))
    assert plain.graph_refused == ""
    model[2].register_forward_hook(lambda *args: None)
    hooked = context_of(model, image(), by_backend(reference=1.0))
    assert "2 is called as it is" in hooked.graph_refused and "hooks" in hooked.graph_refused


def test_pytorchs_own_call_that_cannot_be_captured_runs_without_a_cuda_graph(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    model = randomised(nn.Sequential(*conv_bn(4, 6), nn.ReLU()))
    context = context_of(model, image(), by_backend(reference=1.0), static_inputs=True)

    def capture():
        raise CandidateFailed(context.plan.segments[0], RuntimeError("not in a capture"))

    context.capture = capture
    with torch.no_grad():
        for _ in range(3):
            close(Engine()._run(context, (image(),)), model(image()))
    assert "not in a capture" in context.graph_refused


def test_contexts_of_one_network_share_their_constants():
    model, constants = randomised(nn.Sequential(*conv_bn(4, 6), nn.ReLU())), Constants()
    contexts = [context_of(model, image(n), by_backend(reference=1.0), constants=constants) for n in (1, 2)]
    # one graph, two plans
    contexts[1] = Poisoned(
        make_plan(
            contexts[0].plan.graph,
            propagate(contexts[0].plan.graph, (image(2),), torch.float64),
            torch.float64,
            detect(CPU),
            backends=("reference",),
        ),
        constants,
        CPU,
        False,
    )
    with torch.no_grad():
        for n, context in zip((1, 2), contexts, strict=True):
            close(context.run((image(n),)), model(image(n)))
    assert len(constants._made) == 1


def test_constants_are_renewed_in_place_and_the_parameters_memory_is_never_written():
    model, constants = randomised(nn.Sequential(*conv_bn(4, 6), nn.Flatten(), nn.Linear(378, 3))), Constants()
    context = context_of(model, image(), by_backend(reference=1.0), constants=constants)
    with torch.no_grad():
        context.run((image(),))
        old = model[3].weight.data
        kept = old.clone()
        model[3].weight.data = old * 2
        generation = constants.generation
        constants.renew()
        assert torch.equal(old, kept)
        # the linear's constants were the parameter itself: whoever bound them binds again
        assert constants.generation == generation + 1
        model[0].weight.mul_(2)
        constants.renew()
        assert constants.generation == generation + 1, "a folded convolution's are copied into"
        renewed = context_of(model, image(), by_backend(reference=1.0), constants=constants)
        close(renewed.run((image(),)), model(image()))


def test_the_registry_is_as_it_was():
    assert not [name for name in REGISTRY.candidates if name.startswith(("fake", "writing", "failing"))]


def test_kernels_get_aligned_inputs_whatever_view_comes_in():
    flat = torch.randn(1 + 2 * 4 * 3 * 3)
    for start, copied in ((0, False), (1, True)):
        x = flat[start : start + 72].view(2, 3, 3, 4).permute(0, 3, 1, 2)
        made = as_activation(x, torch.float32)
        assert torch.equal(made, x) and made.data_ptr() % 16 == 0
        assert (made is not x) == copied


def test_steps_run_with_the_contexts_device_current(monkeypatch):
    """Triton launches on the current device, wherever its arguments lie."""
    current = []

    @contextlib.contextmanager
    def on_device(device):
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr("fastres.plan.context.on_device", on_device)
    context = context_of(randomised(nn.Sequential(*conv_bn(4, 4))), image(), by_backend(reference=1.0))
    seen = []

    def watched(step):
        def call(values):
            seen.append(current[:])
            step(values)

        call.segment = step.segment
        return call

    context._steps = context._unjoined = [watched(step) for step in context._steps]
    context._joined = True
    with torch.no_grad():
        context.run((image(),))
        for _ in context.observe((image(),)):
            assert not current, "between steps the caller's device is current"
    assert seen and seen == [[CPU]] * len(seen)


def test_only_a_cuda_device_can_be_made_current():
    guard = on_device(torch.device("cuda", 1))
    assert isinstance(guard, torch.cuda.device) and guard.idx == 1
    with on_device(CPU):
        pass
