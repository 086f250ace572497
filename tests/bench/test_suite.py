"""The benchmark suite: who is wrong gets no time, rows have one schema, comparisons have an exit code."""

import copy
import dataclasses
import itertools

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fastres
from benchmarks import engine, levels, results, shapes
from benchmarks.case import Case, Subject
from benchmarks.cli import RECORDED, app
from benchmarks.compare import peer_deviations
from benchmarks.levels import LEVELS
from benchmarks.providers import BASELINE, providers
from benchmarks.providers.base import Provider
from benchmarks.providers.eager import EagerChannelsLast, EagerNCHW, Folded
from benchmarks.providers.ours import kernels_alone
from benchmarks.results import COLUMNS, Row
from benchmarks.scope import scope
from fastres.bench.environment import environment
from fastres.bench.verify import errors, oracle

pytest.importorskip("torchvision")
SCOPE = dataclasses.replace(scope("smoke", device="cpu", dtypes="fp32"), seconds=0.005, minutes=None)


class Wrong(Provider):
    name = "wrong"

    def build(self, subject, case):
        def call(x):
            y = subject.module(x)
            y[-1] *= 1.01  # one image, by a per cent
            return y

        return call


class Late(Provider):
    """Right at first, wrong from the second call on, as a replayed graph with a stale buffer would be."""

    name = "late"

    def build(self, subject, case):
        calls = []

        def call(x):
            calls.append(1)
            return subject.module(x) * (1.0 if len(calls) == 1 else 1.01)

        return call


class Crash(Provider):
    name = "crash"

    def build(self, subject, case):
        raise RuntimeError("no engine found\nfor this problem")


class Lacks(Provider):
    name = "lacks"

    def build(self, subject, case):
        raise NotImplementedError("groups")


@pytest.fixture
def case():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
    module.requires_grad_(False)
    x = torch.randn(3, 3, 9, 9)
    return Case(
        "layer",
        "a conv",
        "n3 conv",
        3,
        torch.float32,
        torch.device("cpu"),
        [(1000, 100_000)],
        lambda: Subject(module, (x,)),
    )


@pytest.mark.parametrize("provider", [Wrong(), Late()], ids=["always", "from the second call on"])
def test_a_provider_that_is_wrong_is_refused_a_time(case, provider):
    right, wrong = engine.measure(case, [EagerChannelsLast(), provider], SCOPE)
    assert right.status == "ok" and right.median_ms > 0 and right.error < 1e-6
    assert wrong.status == "wrong" and "against fp64" in wrong.reason and wrong.error > 1e-3
    assert wrong.median_ms is wrong.speedup is wrong.gb_s is wrong.latency_p50_ms is None


def test_a_crash_prints_its_error_and_a_gap_its_reason(case):
    rows = engine.measure(case, [EagerChannelsLast(), Crash(), Lacks()], SCOPE)
    by_name = {row.provider: row for row in rows}
    assert by_name["crash"].status == "failed"
    assert by_name["crash"].reason == "RuntimeError: no engine found for this problem"
    assert (by_name["lacks"].status, by_name["lacks"].reason) == ("skipped", "groups")
    assert by_name[BASELINE].speedup == 1.0


def test_who_raises_while_it_is_timed_is_taken_out(case):
    class Tires(Provider):
        name = "tires"

        def build(self, subject, case):
            calls = itertools.count()

            def call(x):
                if next(calls) > 4:
                    raise RuntimeError("enough")
                return subject.module(x)

            return call

    right, tired, last = engine.measure(case, [EagerChannelsLast(), Tires(), Folded()], SCOPE)
    assert (tired.status, tired.reason) == ("failed", "while it was timed: RuntimeError: enough")
    assert tired.median_ms is None and tired.error < 1e-6
    assert right.median_ms > 0 and last.speedup > 0


def test_without_a_reference_everybody_fails_once(case):
    made = []

    def make():
        made.append(1)
        raise MemoryError("too large")

    rows = engine.measure(dataclasses.replace(case, make=make), [EagerChannelsLast(), Folded()], SCOPE)
    assert {(row.status, row.reason) for row in rows} == {
        ("failed", "fp64 reference: MemoryError: too large")
    }
    assert len(made) == 1


def test_a_gpu_that_answers_no_more_ends_the_process(case, monkeypatch):
    def lost(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(engine.DeviceLost, match="illegal memory access"):
        engine.measure(dataclasses.replace(case, device=torch.device("cuda")), [EagerChannelsLast()], SCOPE)


def test_compilers_are_built_last_and_listed_in_their_place(case):
    class Compiles(Folded):
        name = "compiles"
        compiles = True

    steps = []
    rows = engine.measure(case, [Compiles(), EagerChannelsLast(), EagerNCHW()], SCOPE, on_step=steps.append)
    assert [row.provider for row in rows] == [BASELINE, "compiles", "eager NCHW"]
    assert steps == [engine.PREPARING, BASELINE, "eager NCHW", "compiles", engine.TIMING]


def test_fastress_kernels_alone_are_right_and_copy_nothing_out(monkeypatch):
    """What a GPU's kernel clock times, here on a CPU: two inputs, two outputs."""
    found = levels.cases("fused", SCOPE)
    subject = next(case for case in found if case.name.startswith("expand_reduce")).make()
    plan = fastres.accelerate(subject.module, graphs="off")
    with torch.no_grad():
        call = kernels_alone(plan, subject.inputs)
        monkeypatch.delattr("fastres.plan.context._own")  # what a call of the plan itself copies with
        with pytest.raises(NameError, match="_own"):
            plan(*subject.inputs)
        other = tuple(x + 1 for x in subject.inputs)
        assert errors(call(*other), oracle(subject.module, *other)).relative < 1e-5
        assert errors(call(*subject.inputs), subject.reference()).relative < 1e-5


def test_rates_follow_from_the_median_and_the_floor(case):
    (row,) = engine.measure(case, [EagerChannelsLast()], SCOPE)
    assert row.gb_s == pytest.approx(1000 / row.median_ms / 1e6)
    assert row.tflop_s == pytest.approx(1e5 / row.median_ms / 1e9)
    floor = 1e3 * max(1000 / (row.copy_gb_s * 1e9), 1e5 / (row.matmul_tflop_s * 1e12))
    assert row.floor_ms == pytest.approx(floor) and row.roofline == pytest.approx(floor / row.median_ms)


def test_after_the_deadline_nothing_begins_and_the_rows_say_so(case):
    rows = engine.measure(case, [EagerChannelsLast(), Crash()], SCOPE, deadline=0.0)
    assert [row.status for row in rows] == ["skipped"] * 2
    assert all("time was over" in row.reason for row in rows)


def test_providers_leave_the_module_as_it_is(case):
    subject = case.make()
    before = copy.deepcopy(subject.module.state_dict())
    for provider in (EagerChannelsLast(), EagerNCHW(), Folded()):
        provider.build(subject, dataclasses.replace(case, dtype=torch.bfloat16))
    after = subject.module.state_dict()
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)


def test_every_provider_has_its_own_name_and_patterns_select():
    names = [provider.name for provider in providers()]
    assert len(set(names)) == len(names) and names[0] == BASELINE
    assert [p.name for p in providers(["fastres"])] == [BASELINE, "fastres"]
    with pytest.raises(ValueError, match="nobody"):
        providers(["nobody*"])


@pytest.mark.parametrize("size", ["smoke", "quick", "full"])
def test_every_level_lists_cases_without_building_them(size):
    covered = dataclasses.replace(scope(size, device="cpu", dtypes="fp32"), networks=("resnet18",))
    for level in LEVELS:
        found = levels.cases(level, covered)
        assert found and all(case.level == level for case in found)
        keys = [(case.name, case.problem, case.batch, case.dtype) for case in found]
        assert len(set(keys)) == len(keys)
        assert all(case.bytes > 0 and case.flops >= 0 for case in found)


def test_the_layers_of_resnet50_are_known():
    convs = [layer for layer in shapes.layers("resnet50") if layer.pattern == "conv_bn_act"]
    assert len(convs) == 53
    # 4.09 G multiply-adds for the v1.5 network, two operations each
    flops = sum(layer.problem(1, torch.float32).flops for layer in shapes.layers("resnet50"))
    assert flops == pytest.approx(2 * 4.09e9, rel=0.01)
    distinct = shapes.distinct_convs(["resnet50"])
    assert sum(layer.count for _, layer in distinct) == 53 and len(distinct) == 24


# --- files and commands


def _row(**changes) -> Row:
    row = Row("model", "resnet50", "n8 resnet50", "resnet50", 1, 8, "fp32", "fastres")
    row.median_ms, row.p20_ms, row.p80_ms, row.rounds = 10.0, 9.9, 10.1, 20
    return dataclasses.replace(row, **changes)


@pytest.fixture
def write(tmp_path):
    def write(name, *rows):
        path = tmp_path / name
        results.write(path, rows, environment("cpu"))
        return path

    return write


def test_a_file_read_is_what_was_written(write):
    rows = [_row(error=1.25e-7, images_s=800.0), _row(provider="x", status="failed", reason='a, "b"')]
    read = results.read(write("a.csv", *rows))
    assert read.rows == rows
    assert read.environment["torch"] == torch.__version__ and read.environment["threads"]


def test_an_interrupted_run_leaves_its_rows_and_the_earlier_file(write, tmp_path):
    path = write("a.csv", _row())
    with pytest.raises(KeyboardInterrupt), results.writing(path, environment("cpu")) as append:
        append([_row(median_ms=5.0)])
        assert results.read(tmp_path / "a.csv.part").rows[0].median_ms == 5.0
        raise KeyboardInterrupt
    assert results.read(path).rows[0].median_ms == 10.0
    assert results.read(tmp_path / "a.csv.part").rows[0].median_ms == 5.0


def test_the_schema_has_what_a_claim_of_speed_needs(write):
    needed = "device driver clock_sm power torch triton cudnn commit date provider problem median_ms p20_ms"
    needed += " p80_ms gb_s tflop_s roofline error speedup latency_p99_ms first_call_s peak_mib"
    assert set(needed.split()) <= set(COLUMNS)
    path = write("a.csv", _row())
    path.write_text(path.read_text().replace("median_ms", "median"))
    with pytest.raises(ValueError, match="lacks median_ms"):
        results.read(path)


@pytest.mark.parametrize(
    ("after", "code", "word"),
    [
        ({"median_ms": 12.0, "p20_ms": 11.9, "p80_ms": 12.1}, 1, "slower"),
        ({"median_ms": 8.0, "p20_ms": 7.9, "p80_ms": 8.1}, 0, "faster"),
        ({"median_ms": 10.2, "p20_ms": 10.15, "p80_ms": 10.3}, 0, "same"),
        ({"median_ms": 12.0, "p20_ms": 10.0, "p80_ms": 14.0}, 0, "same"),
        ({"median_ms": None, "p20_ms": None, "p80_ms": None, "status": "wrong"}, 1, "lost"),
    ],
    ids=["slower", "faster", "within 3 per cent", "within the noise", "no longer right"],
)
def test_compare_fails_where_something_is_slower_beyond_the_noise(write, after, code, word):
    files = [str(write("a.csv", _row())), str(write("b.csv", _row(**after)))]
    result = CliRunner().invoke(app, ["compare", *files])
    assert result.exit_code == code and word in result.output, result.output


def test_compare_looks_at_fastres_unless_told_otherwise(write):
    slow = {"median_ms": 20.0, "p20_ms": 19.0, "p80_ms": 21.0, "provider": "peer"}
    files = [str(write("a.csv", _row(), _row(provider="peer"))), str(write("b.csv", _row(), _row(**slow)))]
    assert CliRunner().invoke(app, ["compare", *files]).exit_code == 0
    assert CliRunner().invoke(app, ["compare", *files, "--provider", "*"]).exit_code == 1


def test_files_without_a_common_row_cannot_be_compared(write):
    files = [str(write("a.csv", _row())), str(write("b.csv", _row(batch=9)))]
    result = CliRunner().invoke(app, ["compare", *files])
    assert result.exit_code == 2 and "both files" in result.output


def test_bad_options_are_refused(tmp_path):
    for args in (["--level", "nolevel"], ["--batch", "0"], ["--providers", "nobody"], ["--dtype", "fp7"]):
        result = CliRunner().invoke(app, [*args, "--out", str(tmp_path)])
        assert result.exit_code == 2 and args[0].strip("-")[:5] in result.output


def test_a_run_writes_a_csv_and_charts(tmp_path):
    args = ["--smoke", "--level", "model,fused", "--providers", "eager*,folded", "--seconds", "0.01"]
    result = CliRunner().invoke(app, [*args, "--device", "cpu", "--dtype", "fp32", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("*.csv")
    rows = results.read(path).rows
    assert {row.level for row in rows} == {"model", "fused"}
    assert {row.status for row in rows if not row.provider.endswith("graph")} == {"ok"}
    kinds = {chart.stem.rsplit("-", 1)[1] for chart in tmp_path.glob("*.png")}
    assert kinds == {"speedup", "latency", "roofline"}


def test_recorded_rows_are_reproduced_within_a_tenth_or_named(write):
    recorded = results.read(write("a.csv", _row(p20_ms=None, p80_ms=None), _row(batch=9)))
    near, off = (results.read(write(f"{ms}.csv", _row(median_ms=ms))) for ms in (10.9, 8.8))
    assert peer_deviations(recorded, near)[1] == []
    assert [row.median_ms for row in peer_deviations(recorded, off)[1]] == [8.8]
    off.environment["device"] = "another"
    assert peer_deviations(recorded, off)[1] == []


def test_the_shipped_record_can_be_read_and_its_providers_exist():
    recorded = results.read(RECORDED)
    assert {row.provider for row in recorded.rows} <= {provider.name for provider in providers()}
    assert {row.batch for row in recorded.rows} == {1, 32, 256}


def test_nobody_is_built_from_inference_tensors(case):
    """They count no versions: a plan would prepare its constants again at every call, timed as well."""
    case = dataclasses.replace(case, level="model")
    seen = []

    class Looks(Provider):
        name = "looks"

        def build(self, subject, case):
            copied = copy.deepcopy(subject.module)
            seen.extend(t.is_inference() for m in (subject.module, copied) for t in m.state_dict().values())
            seen.extend(x.is_inference() for x in subject.inputs)
            return lambda x: (seen.append(not torch.is_inference_mode_enabled()), subject.module(x))[1]

    row = engine.measure(case, [EagerChannelsLast(), Looks()], SCOPE)[1]
    assert row.status == "ok" and seen and not any(seen)
