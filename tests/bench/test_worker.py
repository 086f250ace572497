"""A provider that kills its process, or never answers, costs one row; the others are measured."""

import os
import signal
import time
from dataclasses import dataclass

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")

from benchmarks import engine
from benchmarks.case import Case, Subject
from benchmarks.levels import LEVELS
from benchmarks.providers import BASELINE
from benchmarks.providers.base import Provider
from benchmarks.providers.eager import EagerChannelsLast, Folded
from benchmarks.scope import scope
from benchmarks.worker import MOST_DEATHS, Bench, Work, jobs_of
from fastres.plan.target import on_paper


class Crashes(Provider):
    name = "crashes"

    def build(self, subject, case):
        os.kill(os.getpid(), signal.SIGSEGV)


class Hangs(Provider):
    name = "hangs"

    def build(self, subject, case):
        return lambda x: time.sleep(1000)


@dataclass(frozen=True)
class OneLayer(Work):
    """A process that is started imports this file."""

    def cases(self):
        def make():
            module = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
            return Subject(module.requires_grad_(False), (torch.randn(3, 3, 9, 9),))

        return [Case("layer", "a conv", "n3 conv", 3, torch.float32, torch.device("cpu"), [(10, 100)], make)]

    def providers(self, case):
        return [Crashes(), EagerChannelsLast(), Hangs(), Folded()]


WORK = OneLayer(scope("smoke", device="cpu", dtypes="fp32", seconds=0.001), ("layer",), threads=1)


def test_who_crashes_or_hangs_gets_no_time_and_the_others_theirs():
    steps = []
    with Bench(WORK, patience=8.0) as bench:
        rows = {row.provider: row for row in bench.measure(0, on_step=steps.append)}
    assert list(rows) == [BASELINE, "crashes", "hangs", "folded"]
    assert rows["crashes"].status == rows["hangs"].status == "failed"
    assert rows["crashes"].reason == "its process died: SIGSEGV"
    assert rows["hangs"].reason == "no answer within 8 s"
    assert rows[BASELINE].median_ms > 0 and rows["folded"].median_ms > 0
    assert rows["crashes"].median_ms is rows["hangs"].median_ms is None
    assert steps.count("crashes") == steps.count("hangs") == 1 and steps[-1] == engine.TIMING


class Scripted(Bench):
    """Attempts whose outcomes are given; no process."""

    def __init__(self, *outcomes):
        super().__init__(WORK)
        self.outcomes, self.given = list(outcomes), []

    def _attempt(self, index, deadline, dead, on_step):
        self.given.append(dict(dead))
        return self.outcomes.pop(0)


def test_who_ended_two_processes_is_not_tried_again():
    hang = ("hangs", "no answer within 8 s")
    bench = Scripted(*[hang, ("folded", [])] * MOST_DEATHS, ("folded", []))
    for _ in range(MOST_DEATHS + 1):
        bench.measure(0)
    tried = [given.get("hangs", "") for given in bench.given]
    assert tried[:4] == ["", hang[1], "", hang[1]] and "2 processes" in tried[4]


@pytest.mark.parametrize("step", ["", engine.BUILDING, engine.PREPARING, engine.TIMING])
def test_a_death_that_is_nobodys_fails_the_case_and_ends(step):
    rows = Scripted((step, "the process died: SIGKILL")).measure(0)
    assert {row.status for row in rows} == {"failed"}
    assert all(row.reason == f"{step or 'start'}: the process died: SIGKILL" for row in rows)


def test_the_run_ends_at_its_deadline_whatever_is_being_done():
    bench = Scripted(("hangs", engine.TIME_OVER))
    assert {row.reason for row in bench.measure(0, deadline=time.monotonic() - 1)} == {engine.TIME_OVER}
    assert not bench.given
    late = time.monotonic() + 0.05
    bench._attempt = lambda *_: (time.sleep(0.06), ("hangs", engine.TIME_OVER))[1]
    rows = bench.measure(0, deadline=late)
    assert {(row.status, row.reason) for row in rows} == {("skipped", engine.TIME_OVER)}


def test_an_unattended_gpu_run_compiles_what_it_has_time_for():
    """Listed without a GPU. A network takes a compiler half a minute to a minute (predicted)."""
    work = Work(scope("quick", "cuda"), LEVELS)
    found = [(case, engine.entries(case, work.providers(case), work.scope)) for case in work.cases()]
    compiling = [
        entry.provider for _, entries in found for entry in entries if entry.compiles and not entry.skip
    ]
    assert 0 < len(compiling) <= 3
    # the second dtype comes last, in case time runs out
    dtypes = [case.dtype for case, _ in found]
    assert dtypes == sorted(dtypes, key=lambda dtype: dtype != torch.bfloat16) and len(set(dtypes)) == 2
    assert found[0][0].level == "model"


def test_a_compiler_is_not_begun_in_the_last_minute():
    (case,) = WORK.cases()

    class Compiles(Folded):
        compiles = True

    rows = engine.measure(case, [EagerChannelsLast(), Compiles()], WORK.scope, deadline=time.monotonic() + 50)
    assert [row.status for row in rows] == ["ok", "skipped"] and rows[1].reason == engine.TIME_OVER


def test_only_the_wanted_rows_are_listed():
    only = frozenset({("model", 8, "bf16", "folded"), ("model", 1, "fp32", BASELINE)})
    work = Work(scope("quick", "cpu", "fp32,bf16", "1,8", "resnet18"), ("model", "host"), only=only)
    found = {
        (case.level, case.batch, str(case.dtype), provider.name)
        for case in work.cases()
        for provider in work.providers(case)
    }
    assert found == {("model", 8, "torch.bfloat16", "folded"), ("model", 1, "torch.float32", BASELINE)}


def test_single_kernels_are_compiled_ahead_for_every_backend_that_takes_them(tmp_path, monkeypatch):
    """Listed without a GPU: what a run of the layers and fused patterns would compile one after another."""
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path))
    cases = Work(scope("quick", "cuda"), ("layer", "fused", "op")).cases()
    found = jobs_of(cases, on_paper("sm90"))
    problems = {case.kernels for case in cases} - {None}
    # stage 3's shifted block is for CUDA alone
    assert {p.pattern for p in problems - {job.problem for job in found}} <= {"shifted_block"}
    assert {job.problem for job in found} <= problems and len(found) > 40
    assert {"triton", "hopper"} == {job.candidate.partition(".")[0] for job in found}
    assert len(found) == len(set(found)) and {case.level for case in cases if case.kernels} == {
        "layer",
        "fused",
    }
