"""The planner: the cheapest cover, chosen by tables, estimates or measurement; what fails or is asked for in vain."""

import hashlib
import logging
import random

import pytest
import torch
import torchvision
from torch import nn

import fastres
from fastres import backends, env
from fastres.graph.capture import capture
from fastres.graph.ir import Conv
from fastres.nn import Bottleneck, ResNet
from fastres.plan import pattern as patterns
from fastres.plan.candidate import REGISTRY, Buffers
from fastres.plan.constants import Constants
from fastres.plan.context import Context
from fastres.plan.planner import Cost, NoCandidate, make_plan
from fastres.plan.specs import problem_of, propagate
from fastres.plan.target import detect, on_paper
from fastres.tuning import table
from tests.graph.nets import close, conv_bn, image, randomised

from .fakes import FAST, SLOW, Failing, Fake, Sleeping, registered

CPU = torch.device("cpu")


def only_reference(ms):
    """A cost model in which the reference candidates cost `ms(candidate, problem)` and nothing else can run."""

    def cost(candidate, problem, target):
        if candidate.backend != "reference":
            raise ValueError("left out here")
        return Cost(None, ms(candidate, problem), "measured")

    return cost


def plan_of(model, x, cost_model, **more):
    backends.load()
    graph = capture(model.eval())
    return make_plan(
        graph, propagate(graph, (x,), x.dtype), x.dtype, detect(CPU), cost_model=cost_model, **more
    )


def run(plan, x):
    with torch.no_grad():
        return Context(plan, Constants(), CPU, static_inputs=False).run((x,))


# -- the shortest path -------------------------------------------------------------------------------------------------


def _every_cover(graph, at, options):
    if at == len(graph.nodes):
        yield ()
        return
    for stop, ms in options[at]:
        for rest in _every_cover(graph, stop, options):
            yield (ms, *rest)


@pytest.mark.parametrize("seed", range(6))
def test_the_cover_is_the_cheapest_of_all(seed):
    def ms(candidate, problem):
        text = f"{seed} {candidate.name} {problem.key}"
        # wide patterns cost more, as they do
        return random.Random(text).random() * len(problem.layers)

    model = ResNet(Bottleneck, [2], num_classes=5).eval()
    x = torch.empty(2, 3, 32, 32)
    plan = plan_of(model, x, only_reference(ms))
    graph, users = plan.graph, plan.graph.users()
    options = []
    for start in range(len(graph.nodes)):
        found = []
        for pattern in patterns.PATTERNS:
            for match in pattern.matches(graph.nodes, start, users):
                problem = problem_of(match, plan.shapes, x.dtype, ())
                found.append((match.stop, ms(REGISTRY[f"reference.{pattern.name}"], problem)))
        options.append(found)
    covers = list(_every_cover(graph, 0, options))
    assert len(covers) > 20
    assert plan.predicted_ms == pytest.approx(min(map(sum, covers)))


def test_every_node_is_in_exactly_one_segment():
    plan = plan_of(
        torchvision.models.googlenet(init_weights=False),
        torch.empty(1, 3, 64, 64),
        only_reference(lambda c, p: 1.0),
    )
    assert [node for segment in plan.segments for node in segment.nodes] == plan.graph.nodes


# -- every pattern on a real network -----------------------------------------------------------------------------------

WANTED = ("stem_pool", "dual", "expand_reduce", "shifted_block", "pool_linear", "conv_bn_act", "max_pool",
          "global_avg_pool", "linear")  # fmt: skip


@pytest.fixture(scope="module")
def resnet50():
    torch.manual_seed(0)
    return randomised(torchvision.models.resnet50(num_classes=7))


@pytest.mark.parametrize("wanted", WANTED)
def test_a_table_makes_each_pattern_run_in_a_resnet50_and_the_numbers_stay(
    wanted, resnet50, tmp_path, monkeypatch
):
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path))
    x = image(2, 3, 32, 32)
    backends.load()
    graph = capture(resnet50)
    shapes, users, target = propagate(graph, (x,), x.dtype), graph.users(), detect(CPU)
    for pattern in patterns.PATTERNS:
        keys = {
            problem_of(match, shapes, x.dtype, ()).key: len(match.nodes)
            for start in range(len(graph.nodes))
            for match in pattern.matches(graph.nodes, start, users)
        }
        # the longest match of the wanted pattern is the cheapest of all
        entries = {key: {"ms": 1e-3 / n if pattern.name == wanted else 10.0 * n} for key, n in keys.items()}
        table.write(table.user_dir(), target.arch, f"reference.{pattern.name}", {"gpu": "test"}, entries)
    plan = make_plan(graph, shapes, x.dtype, target, backends=("reference",))
    chosen = [segment for segment in plan.segments if segment.match.pattern.name == wanted]
    assert chosen and all(segment.cost.kind == "measured" for segment in chosen)
    if wanted == "shifted_block":
        layers = [[node.name for node in segment.nodes] for segment in chosen]
        assert ["layer1.1.conv2", "layer1.1.conv3", "layer1.2.conv1"] in layers, "across two blocks"
        first = ["layer1.0.conv2", "layer1.0.downsample.0", "layer1.0.conv3", "layer1.1.conv1"]
        assert first in layers, "with the projection"
    with torch.no_grad():
        close(run(plan, x), resnet50(x))


def test_stem_pool_takes_uint8_images_through_its_normalisation():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    model = randomised(torchvision.models.resnet18(num_classes=7))
    graph = capture(model, normalize=(mean, std))
    x = torch.randint(0, 256, (2, 3, 37, 41), dtype=torch.uint8)
    prefer = only_reference(
        lambda c, p: FAST if "normalize" in dict(p.layers) and len(p.layers) == 3 else 1.0
    )
    shapes = propagate(graph, (x,), torch.float64)
    plan = make_plan(graph, shapes, torch.float64, detect(CPU), cost_model=prefer)
    assert [role for role, _ in plan.segments[0].match.nodes] == ["normalize", "conv", "pool"]
    normalized = (x.double() / 255 - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(
        std
    ).double().view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(run(plan, x), model(normalized), rtol=1e-6, atol=1e-6)


# -- tables, estimates, measurement ------------------------------------------------------------------------------------


def _layer():
    return randomised(nn.Sequential(*conv_bn(4, 6), nn.ReLU()))


def test_a_table_with_another_batch_size_counts_scaled(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path))
    fast = fastres.accelerate(_layer(), backend="reference")
    with torch.no_grad():
        fast(image(2))
    (problem,) = [s.problem for s in next(iter(fast._fastres.engine.prepared.plans.values())).segments]
    key = problem.with_batch(8).key
    table.write(table.user_dir(), "cpu", "reference.conv_bn_act", {"gpu": "test"}, {key: {"ms": 4.0}})
    with torch.no_grad():
        fast(image(3))
    (row,) = fast.report(measure=False).rows
    # at least in proportion to the batch; a launch costs what it costs at any
    assert row.basis == "nearest" and 4.0 * 3 / 8 <= row.predicted_ms < 2.0


def test_tune_off_reads_no_table(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path))
    monkeypatch.setattr(table, "lookup", lambda *args, **more: pytest.fail("it read a table"))
    fast = fastres.accelerate(_layer(), tune="off")
    with torch.no_grad():
        fast(image())
    assert fast.report(measure=False).rows[0].basis == "estimate"


def test_measuring_picks_the_faster_of_two_whatever_they_claim():
    slow = Sleeping(patterns.CONV_BN_ACT, "slow", 0.02)
    quick = Sleeping(patterns.CONV_BN_ACT, "quick", 0.0)
    slow.ms, quick.ms = FAST, SLOW
    with registered(slow, quick):
        model = _layer()
        measured = fastres.accelerate(model, tune="measure")
        believed = fastres.accelerate(model, tune="off")
        with torch.no_grad():
            close(measured(image()), believed(image()))
        rows = [fast.report(measure=False).rows[0] for fast in (measured, believed)]
    assert believed.report(measure=False).rows[0].candidate == "slow.conv_bn_act"
    assert rows[0].candidate != "slow.conv_bn_act" and rows[0].basis == "now"
    assert "slow.conv_bn_act: " in measured.report(measure=False).why("0") and "is slower" in str(
        rows[0].others
    )


def test_what_was_measured_once_is_not_measured_again():
    counting = Fake(patterns.CONV_BN_ACT, "counting")
    with registered(counting):
        with torch.no_grad():
            fastres.accelerate(_layer(), tune="measure")(image())
            before = counting.bound
            fastres.accelerate(_layer(), tune="measure")(image())
    assert counting.bound - before <= 1


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["bind", "launch"])
def test_a_candidate_that_fails_is_dropped_with_its_reason_and_the_next_best_runs(when, caplog):
    failing, second = Failing(patterns.CONV_BN_ACT, when), Fake(patterns.CONV_BN_ACT, "second", ms=2 * FAST)
    with registered(failing, second):
        model = _layer()
        fast = fastres.accelerate(model)
        with torch.no_grad(), caplog.at_level(logging.WARNING, logger="fastres"):
            for _ in range(3):
                close(fast(image()), model(image()))
        report = fast.report(measure=False)
    assert failing.tried == 1, "it is not tried again"
    assert report.rows[0].candidate == "second.conv_bn_act"
    assert f"failing.conv_bn_act: failed: no engine for this ({when})" in report.why("0")
    assert "no engine for this" in caplog.text


def test_a_failure_counts_for_its_own_problem_only():
    failing = Failing(patterns.CONV_BN_ACT, "launch")
    with registered(failing):
        fast = fastres.accelerate(_layer())
        with torch.no_grad():
            fast(image())
            fast(image(h=5))
    assert failing.tried == 2


def test_a_candidate_that_fails_while_it_is_measured_is_left_out_with_its_reason():
    with registered(Failing(patterns.CONV_BN_ACT, "launch")):
        model = _layer()
        fast = fastres.accelerate(model, tune="measure")
        with torch.no_grad():
            close(fast(image()), model(image()))
    assert "RuntimeError: no engine for this (launch)" in fast.report(measure=False).why("0")


def test_running_out_of_memory_is_no_fault_of_the_candidate():
    with registered(Failing(patterns.CONV_BN_ACT, "launch", torch.OutOfMemoryError("out of memory"))):
        fast = fastres.accelerate(_layer())
        with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
            fast(image())
        assert not fast._fastres.engine.dropped


def test_an_estimate_that_fails_leaves_the_candidate_out():
    broken = Fake(patterns.CONV_BN_ACT, "broken")
    broken.estimate_ms = lambda problem, target: 1 / 0
    with registered(broken):
        fast = fastres.accelerate(_layer())
        with torch.no_grad():
            fast(image())
        assert "ZeroDivisionError" in fast.report(measure=False).why("0")


# -- backends that are asked for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cudnn", "cuda", "triton", "hopper"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: these backends can run")
def test_a_requested_backend_that_cannot_run_raises_its_real_reason(backend):
    fast = fastres.accelerate(_layer().float(), backend=backend)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"can run no layer of this network: .*(GPU|CUDA device)"),
    ):
        fast(image().float())


def test_a_requested_backend_that_is_not_installed_raises_its_real_reason(monkeypatch):
    monkeypatch.setattr(backends, "load", lambda: {"triton": "cannot be imported: No module named 'triton'"})
    fast = fastres.accelerate(_layer(), backend="triton")
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"'triton' is not here: .*No module named 'triton'"),
    ):
        fast(image())


def test_a_requested_backend_runs_what_it_can_and_the_rest_is_left_to_the_reference():
    model = torchvision.models.resnet18(num_classes=5).eval()
    fast = fastres.accelerate(model, backend="onednn")
    with torch.no_grad():
        fast(torch.randn(1, 3, 32, 32))
    families = {row.candidate.partition(".")[0] for row in fast.report(measure=False).rows}
    assert families == {"onednn", "reference"}


def test_the_environment_restricts_automatic_choice_and_never_raises(monkeypatch):
    monkeypatch.setenv("FASTRES_BACKENDS", "cudnn")
    model = _layer()
    fast = fastres.accelerate(model)
    with torch.no_grad():
        close(fast(image()), model(image()))
    (row,) = fast.report(measure=False).rows
    assert row.candidate == "reference.conv_bn_act"
    assert "its backend was not asked for" in fast.report(measure=False).why("0")


def test_an_unknown_backend_in_the_environment_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("FASTRES_BACKENDS", "cudnn,onedn")
    assert env.backends() == ("cudnn", "onedn")
    with torch.no_grad(), pytest.raises(ValueError, match="FASTRES_BACKENDS names onedn"):
        fastres.accelerate(_layer())(image())


@pytest.mark.parametrize(
    ("value", "ran"),
    [
        ("-cpu.max_pool", "onednn.conv_bn_act"),
        ("-onednn.conv_bn_act", "reference.conv_bn_act"),
        ("-onednn", "reference.conv_bn_act"),
        ("onednn, -onednn.linear", "onednn.conv_bn_act"),
    ],
)
def test_the_environment_leaves_out_a_kernel_or_a_family(monkeypatch, value, ran):
    monkeypatch.setenv("FASTRES_BACKENDS", value)
    fast = fastres.accelerate(_layer().float())
    with torch.no_grad():
        fast(image().float())
    report = fast.report(measure=False)
    assert report.rows[0].candidate == ran
    assert ("FASTRES_BACKENDS leaves it out" in report.why("0")) == ran.startswith("reference")


def test_what_the_environment_leaves_out_runs_for_nobody_and_is_known_by_name(monkeypatch):
    model, x = _layer().float(), image().float()
    monkeypatch.setenv("FASTRES_BACKENDS", "-onednn.conv_bn_act")
    with torch.no_grad(), pytest.raises(NoCandidate, match="FASTRES_BACKENDS leaves it out"):
        fastres.accelerate(model, backend="onednn")(x)
    monkeypatch.setenv("FASTRES_BACKENDS", "-cuda.sm90_dul,-cuda.bn_act,-reference")
    with torch.no_grad(), pytest.raises(ValueError, match=r"leaves out cuda\.sm90_dul: no backend"):
        fastres.accelerate(model)(x)


# -- devices on paper --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm100", "cpu"])
def test_a_plan_for_a_device_on_paper_needs_no_such_device(arch):
    backends.load()
    graph = capture(torchvision.models.resnet50().eval())
    x = torch.empty(256, 3, 224, 224, device="meta", dtype=torch.bfloat16)
    plan = make_plan(graph, propagate(graph, (x,), x.dtype), x.dtype, on_paper(arch))
    covered = [node.name for segment in plan.segments for node in segment.nodes if isinstance(node, Conv)]
    assert len(covered) == 53 and plan.predicted_ms > 0
    assert all(segment.candidate is not None for segment in plan.segments)


@pytest.mark.parametrize(("dtype", "flagged"), [(torch.bfloat16, False), (torch.float32, True)])
def test_what_is_tuned_without_tf32_is_found_by_plans_that_may_use_it(dtype, flagged):
    """PyTorch allows TF32 in convolutions by default, so engines on a GPU plan with this flag in every dtype."""
    backends.load()
    graph = capture(torchvision.models.resnet18().eval())
    shapes = propagate(graph, (torch.empty(1, 3, 64, 64, device="meta", dtype=dtype),), dtype)
    plain, loose = (
        make_plan(graph, shapes, dtype, on_paper("sm90"), flags) for flags in ((), ("tf32", "deterministic"))
    )
    keys = [{s.problem.layer_key for s in plan.segments} for plan in (plain, loose)]
    assert (keys[0] == keys[1]) is not flagged
    assert all(key.endswith("tf32") is flagged for key in keys[1])


def test_without_any_candidate_a_node_is_evaluated_as_it_is():
    def nothing(candidate, problem, target):
        raise ValueError("not today")

    model = _layer()
    plan = plan_of(model, image(), nothing)
    assert all(segment.candidate is None for segment in plan.segments)
    with torch.no_grad():
        close(run(plan, image()), model(image()))


def test_nothing_of_a_requested_backend_at_all_is_an_error():
    graph = capture(_layer())
    shapes = propagate(graph, (image(),), torch.float64)
    with pytest.raises(NoCandidate, match="it takes fp32 and bf16, not fp64"):
        make_plan(graph, shapes, torch.float64, detect(CPU), backends=("onednn",))


def test_registering_a_name_twice_is_an_error():
    with (
        registered(Fake(patterns.LINEAR)),
        pytest.raises(ValueError, match=r"'fake\.linear' is registered already"),
    ):
        REGISTRY.register(Fake(patterns.LINEAR))


def test_a_new_candidate_needs_no_other_change():
    """The README's example."""
    with registered(Fake(patterns.SHIFTED_BLOCK)):
        model = randomised(ResNet(Bottleneck, [2], num_classes=3))
        fast = fastres.accelerate(model)
        x = image(1, 3, 32, 32)
        with torch.no_grad():
            close(fast(x), model(x))
        assert any(row.candidate == "fake.shifted_block" for row in fast.report(measure=False).rows)


def test_buffers_answer_by_name():
    x = torch.zeros(1)
    buffers = Buffers({"conv.x": x})
    assert buffers["conv.x"] is x and buffers.get("conv.residual") is None


def test_keys_are_stable():
    """Tables are found again by these texts: a change of form would orphan them."""
    plan = plan_of(torchvision.models.resnet18(), torch.empty(4, 3, 64, 64), only_reference(lambda c, p: 1.0))
    digest = hashlib.sha256("\n".join(s.problem.key for s in plan.segments).encode()).hexdigest()
    assert (
        plan.segments[0].problem.key
        == "n4 stem_pool fp32 conv 3->64 7x7/2 @64x64 relu | pool max 3x3/2 64 @32x32"
    )
    assert digest[:8] == "d036fc38"
