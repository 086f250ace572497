"""Tuning: every configuration is tried, the best is written with its peers, and a second run measures
nothing."""

import csv
import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fastres import backends
from fastres.activation import RELU
from fastres.plan.candidate import REGISTRY, Candidate
from fastres.plan.pattern import CONV_BN_ACT, MAX_POOL
from fastres.plan.planner import table_cost
from fastres.plan.problem import ConvSpec, Problem
from fastres.plan.target import detect
from fastres.tuning import table, tune
from fastres.tuning.config import Config
from fastres.workers import ask

CPU = torch.device("cpu")
TARGET = detect(CPU)


@dataclass(frozen=True)
class Work(Config):
    rounds: int
    broken: bool = False


class Fake(Candidate):
    """Multiplies a matrix by itself `rounds` times."""

    backend, pattern, allocates = "fake", CONV_BN_ACT, True
    choices = (Work(40), Work(0, broken=True), Work(2), Work(20))

    def __init__(self, name, refuses=None):
        self.name, self.refuses, self.bound = name, refuses, []

    def accepts(self, problem, target):
        return self.refuses

    def configs(self, problem, target):
        return self.choices

    def bind(self, problem, config, buffers, constants):
        self.bound.append(config)
        if config.broken:
            raise RuntimeError("no such luck")
        matrix = torch.randn(64, 64)

        def launch(x):
            for _ in range(config.rounds):
                torch.mm(matrix, matrix)
            return x

        return launch


class Hopeless(Fake):
    choices = (Work(0, broken=True),)


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(REGISTRY, "candidates", {})
    return REGISTRY


def problem(n=2):
    spec = ConvSpec(n, 8, 6, 6, 8, (1, 1), act=RELU)
    return Problem("conv_bn_act", (("conv", spec),), torch.float32, ("conv.x",), ("conv",))


def run(problems, user, **options):
    return tune.tune(problems, TARGET, CPU, user=user, budget_s=0.02, **options)


def test_the_fastest_configuration_that_runs_is_written_with_its_peers(registry, tmp_path):
    fast, other = registry.register(Fake("fake.a")), registry.register(Fake("fake.b"))
    results = {result.candidate: result for result in run([problem()], tmp_path, thorough=True)}
    assert fast.bound == list(Fake.choices)
    assert results["fake.a"].config == Work(2)
    content = json.loads(table.path(tmp_path, TARGET.arch, "fake.a").read_text())
    entry = content["entries"][problem().key]
    assert entry["config"] == {"rounds": 2, "broken": False}
    assert entry["ms"] == pytest.approx(results["fake.a"].ms, abs=1e-6)
    assert entry["peers"] == {"fake.b": pytest.approx(results["fake.b"].ms, abs=1e-6)}
    assert content["header"]["torch"] == torch.__version__ and content["header"]["gpu"]
    assert other.bound


def test_a_second_run_measures_nothing_and_again_measures_all(registry, tmp_path):
    fake = registry.register(Fake("fake.a"))
    run([problem()], tmp_path)
    fake.bound.clear()
    assert run([problem()], tmp_path) == [] and fake.bound == []
    assert run([problem(), problem(3)], tmp_path)[0].problem == problem(3)
    fake.bound.clear()
    assert run([problem()], tmp_path, again=True) and fake.bound


def test_what_fails_or_refuses_is_not_written(registry, tmp_path):
    registry.register(Hopeless("fake.hopeless"))
    registry.register(Fake("fake.unwilling", refuses="not today"))
    (result,) = run([problem()], tmp_path)
    assert result.candidate == "fake.hopeless" and "no such luck" in result.reason
    assert not list(tmp_path.rglob("*.json"))


def test_inputs_are_contiguous_where_a_candidate_takes_them_so(registry, tmp_path):
    seen = []

    class Planar(Fake):
        choices = (Work(1),)

        def planar(self, problem):
            return frozenset(problem.inputs) if self.name == "fake.planar" else frozenset()

        def bind(self, *args):
            return lambda x: seen.append((self.name, x.is_contiguous()))

    for name in ("fake.planar", "fake.rows"):
        registry.register(Planar(name))
    run([problem()], tmp_path)
    assert set(seen) == {("fake.planar", True), ("fake.rows", False)}


def test_candidates_are_chosen_by_name_or_family(registry, tmp_path, monkeypatch):
    for name in ("fake.a", "fake.b"):
        registry.register(Fake(name))
    assert {r.candidate for r in run([problem()], tmp_path, candidates=["fake.b"])} == {"fake.b"}
    assert {r.candidate for r in run([problem()], tmp_path, candidates=["fake"])} == {"fake.a"}
    assert run([problem(5)], tmp_path, candidates=["other"]) == []
    monkeypatch.setenv("FASTRES_BACKENDS", "-fake.a")
    assert {r.candidate for r in run([problem(6)], tmp_path)} == {"fake.b"}


def test_the_planner_chooses_by_what_was_tuned(registry, tmp_path, monkeypatch):
    fake = registry.register(Fake("fake.a"))
    run([problem()], tmp_path)
    monkeypatch.setattr(table, "user_dir", lambda: tmp_path)
    cost = table_cost(fake, problem(), TARGET)
    assert (cost.config, cost.kind) == (Work(2), "measured")
    assert table_cost(fake, problem(4), TARGET).kind == "nearest"


def test_problems_of_a_model_are_distinct_and_cover_its_patterns(registry):
    registry.register(Fake("fake.a"))
    pool = Fake("fake.pool")
    pool.pattern = MAX_POOL
    registry.register(pool)
    block = [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(
        *block, *[nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()], nn.MaxPool2d(2)
    )
    found = tune.problems_of(model.eval(), (4, 8, 16, 16), torch.float32)
    assert sorted(p.pattern for p in found) == ["conv_bn_act", "max_pool"]
    assert all(p.n == 4 and p.dtype == torch.float32 for p in found)


def test_the_command_tunes_on_this_machine(tmp_path, monkeypatch):
    import typer

    from fastres.tuning.cli import tune as command

    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path))
    app = typer.Typer()
    app.command()(command)
    arguments = [
        "--model",
        "resnet18",
        "--batch",
        "1",
        "--size",
        "64",  # at 32 the last stage has one pixel: there torch 2.11's oneDNN call refuses a residual
        "--device",
        "cpu",
        "--candidates",
        "onednn",
        "--out",
        str(tmp_path / "out"),
    ]
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 0, ran.output
    assert " 0 failed" in ran.output and list((tmp_path / "tables").rglob("onednn.*.json"))
    assert "fastest" in ran.output and "onednn.conv_bn_act" in ran.output
    assert list((tmp_path / "out").rglob("onednn.*.json")) and (tmp_path / "out" / "trials.csv").is_file()
    again = CliRunner().invoke(app, arguments)
    assert "0 measured, 0 failed" in again.output
    late = CliRunner().invoke(app, [*arguments, "--again", "--minutes", "0"])
    assert "0 measured, 0 failed, " in late.output and "not reached" in late.output
    assert CliRunner().invoke(app, ["--candidates", "nobody"]).exit_code != 0


@pytest.mark.slow
def test_trials_run_in_processes_of_their_own_and_failures_are_told_apart():
    backends.load()
    reference = next(c for c in REGISTRY.for_pattern(CONV_BN_ACT) if c.accepts(problem(), TARGET) is None)
    good = [tune.Trial(reference.name, problem(n), 0) for n in (1, 2, 3)]
    bad = tune.Trial("fake.nobody", problem(), 0)
    answers = dict(ask([*good, bad], tune.time_trial, (TARGET, "cpu", 0.01), jobs=2, patience_s=60))
    assert "fake.nobody" in answers.pop(bad).reason
    assert all(not answer.reason and answer.value > 0 for answer in answers.values()) and set(answers) == set(
        good
    )


def test_slow_candidates_get_their_first_choices_only(registry, tmp_path):
    slow, fast = Fake("fake.slow"), Fake("fake.fast")
    slow.choices = tuple(Work(rounds) for rounds in (900, 901, 902))
    fast.choices = tuple(Work(rounds) for rounds in (2, 3, 4))
    for fake in (slow, fast):
        registry.register(fake)
    run([problem()], tmp_path)
    assert slow.bound == list(slow.choices[:2]) and fast.bound == list(fast.choices)


def test_nothing_is_begun_when_the_time_is_up_and_what_was_measured_is_kept(registry, tmp_path):
    for name in ("fake.a", "fake.b"):
        registry.register(Fake(name))
    none = run([problem()], tmp_path, limit_s=0.0)
    assert [result.reason for result in none] == ["the time was up before its turn"] * 2
    assert not list(tmp_path.rglob("*.json"))

    def interrupted(trial, *_, calls=[]):  # noqa: B006
        calls.append(trial)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return 0.5

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tune, "time_trial", interrupted)
        run([problem()], tmp_path, log_to=tmp_path / "trials.csv")
    entries = json.loads(table.path(tmp_path, TARGET.arch, "fake.a").read_text())["entries"]
    assert entries[problem().key]["ms"] == 0.5
    with open(tmp_path / "trials.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["candidate"], row["ms"], row["config"]) == ("fake.a", "0.500000", "rounds=40 broken=0")
    assert row["torch"] == torch.__version__
