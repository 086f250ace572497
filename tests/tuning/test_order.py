"""What tuning tries first, and that compiling and timing side by side lose nothing."""

import time
from collections import Counter

import pytest
import torch

from fastres import backends
from fastres.bench.models import load_model
from fastres.plan.candidate import REGISTRY
from fastres.plan.target import on_paper
from fastres.tuning import tune
from fastres.tuning.order import ranked
from fastres.workers import Answer

TARGET = on_paper("sm90")


@pytest.fixture(scope="module")
def network():
    """(problems with their counts, what to measure on them) of a ResNet-50 at batches 256 and 1."""
    backends.load()
    problems = {}
    for n in (256, 1):
        problems |= tune.problems_of(load_model("resnet50").eval(), (n, 3, 224, 224), torch.bfloat16)
    return problems, list(tune.wanted(problems, TARGET))


@pytest.fixture(autouse=True)
def no_tables(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path))


def test_what_the_networks_time_depends_on_comes_first(network):
    problems, todo = network
    assert max(problems.values()) == 6  # stage 3 has six blocks
    trials = ranked(todo, problems, TARGET)
    values = [value for value, _ in trials]
    assert values == sorted(values, reverse=True) and len({trial for _, trial in trials}) == len(trials)
    first = [trial for _, trial in trials[:100]]
    assert sum(trial.config == 0 for trial in first) > 60
    families = Counter(trial.candidate.partition(".")[0] for trial in first)
    assert {"cudnn", "triton", "hopper", "cuda"} <= set(families)
    assert {trial.problem.n for trial in first} == {1, 256}
    # a candidate's configurations keep their order on each problem
    seen = {}
    for _, trial in trials:
        assert seen.get((trial.candidate, trial.problem), -1) == trial.config - 1
        seen[trial.candidate, trial.problem] = trial.config


def test_a_layer_that_occurs_more_often_comes_first(network):
    problems, todo = network
    one, other = (
        next(p for p in problems if p.key.endswith(f"conv {c} relu") and p.n == 256)
        for c in ("256->256 3x3/1 @14x14", "512->512 3x3/1 @7x7")
    )
    todo = [(problem, found) for problem, found in todo if problem in (one, other)]
    for counts in ({one: 9, other: 1}, {one: 1, other: 9}):
        _, first = ranked(todo, counts, TARGET)[0]
        assert first.problem == max(counts, key=counts.get)


class Asked:
    """`ask` in this process: what compiles or runs badly is told by `outcome`."""

    def __init__(self, outcome):
        self.outcome, self.asked = outcome, {"compile_job": [], "time_trial": []}

    def __call__(self, pieces, work, context, *, jobs, patience_s, until):
        for piece in pieces:
            self.asked[work.__name__].append(piece)
            time.sleep(0.001)
            yield piece, self.outcome(work.__name__, piece)


@pytest.fixture
def started(network, monkeypatch, tmp_path):
    problems, todo = network

    def start(outcome, thorough=False, few=12):
        asked = Asked(outcome)
        monkeypatch.setattr(tune, "ask", asked)
        some = [(problem, found) for problem, found in todo if problem.n == 256][:few]
        trials = ranked(some, problems, TARGET)
        until = time.monotonic() + 60
        run = tune._Run(
            some, trials, TARGET, torch.device("cuda"), 4, 0.0, until, thorough, {}, tmp_path / "t.csv"
        )
        for trial, answer in run.outcomes():
            run.keep(trial, answer)
        return run, asked, trials

    return start


def test_everything_is_compiled_where_that_is_needed_and_timed_once(started):
    run, asked, trials = started(lambda work, piece: Answer(1.0), thorough=True)
    timed = asked.asked["time_trial"]
    assert len(timed) == len(set(timed)) == len(trials)
    compiled = {(job.candidate, job.problem, job.config) for job in asked.asked["compile_job"]}
    wanted = {
        (t.candidate, t.problem, t.choice(TARGET))
        for t in timed
        if t.candidate.startswith(("triton", "hopper"))
    }
    assert compiled == wanted and 0 < len(wanted) < len(timed)
    assert len((run.log_to).read_text().splitlines()) == len(trials) + 1
    assert all(not result.reason for result in run.results())


def test_what_does_not_compile_is_told_and_what_ends_processes_is_left(started):
    def outcome(work, piece):
        if work == "compile_job" and piece.candidate == "triton.conv_bn_act":
            return Answer(reason="no such luck")
        crashes = work == "time_trial" and piece.candidate == "cuda.sm80_conv_bn_act"
        return Answer(reason="its process died: SIGABRT") if crashes else Answer(1.0)

    run, asked, _ = started(outcome, thorough=True)
    reasons = {r.reason for r in run.results() if r.candidate == "triton.conv_bn_act"}
    assert reasons == {"no such luck"}
    died = [t for t in asked.asked["time_trial"] if t.candidate == "cuda.sm80_conv_bn_act"]
    assert len(died) == tune._MOST_DEATHS
    assert {r.reason for r in run.results() if r.candidate == died[0].candidate} >= {
        "not tried: it has ended 2 processes"
    }


def test_further_configurations_are_for_what_is_near_the_best(started):
    slow = "triton.conv_bn_act"

    def outcome(work, piece):
        return Answer(9.0 if piece.candidate == slow else 1.0)

    _, asked, _ = started(outcome)
    configs = {name: set() for name in REGISTRY.candidates}
    for trial in asked.asked["time_trial"]:
        configs[trial.candidate].add(trial.config)
    assert configs[slow] == {0, 1} and max(configs["hopper.conv_bn_act"]) > 3
