"""`fastres bench` on a small model: a table, a CSV, a chart; a wrong answer gets no time."""

import csv

import pytest
import torch
import typer
from typer.testing import CliRunner

import fastres
from fastres.bench.cli import bench

pytest.importorskip("torchvision")
pytest.importorskip("skimage")
SMALL = [
    "--model",
    "resnet18",
    "--size",
    "32",
    "--batch",
    "2",
    "--dtype",
    "fp32",
    "--device",
    "cpu",
    "--threads",
    "1",
]


@pytest.fixture
def run(monkeypatch):
    def run(accelerate, *args):
        monkeypatch.setattr(fastres, "accelerate", accelerate, raising=False)
        app = typer.Typer()
        app.command()(bench)
        return CliRunner().invoke(app, [*SMALL, "--budget", "0.3", *args])

    return run


def same(model, *, dtype, backend):
    return model


def test_writes_a_table_a_csv_and_a_chart(run, tmp_path):
    result = run(same, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("*.csv")
    rows = {row["provider"]: row for row in csv.DictReader(path.open())}
    assert set(rows) == {"eager NCHW", "eager channels_last", "fastres"}
    for row in rows.values():
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["images_per_s"]) == pytest.approx(2e3 / float(row["median_ms"]), rel=1e-3)
        assert 0 < float(row["error"]) < 1e-5 and row["torch"] == torch.__version__
    (chart,) = tmp_path.glob("*.png")
    assert chart.read_bytes()[:4] == b"\x89PNG" and chart.stat().st_size > 5000


def test_a_wrong_answer_gets_no_time_and_fails_the_command(run, tmp_path):
    result = run(lambda model, **_: lambda x: model(x) * 1.01, "--out", str(tmp_path))
    assert result.exit_code == 1 and "wrong: error" in result.output
    (path,) = tmp_path.glob("*.csv")
    row = next(row for row in csv.DictReader(path.open()) if row["provider"] == "fastres")
    assert row["median_ms"] == row["speedup"] == "" and "wrong" in row["failure"]


def test_a_crash_is_reported_and_the_others_are_measured(run):
    def crash(model, **_):
        raise RuntimeError("no such kernel")

    result = run(crash)
    assert result.exit_code == 1 and "RuntimeError: no such kernel" in result.output
    assert "1.00x" in result.output


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--batch", "0"], "positive"),
        (["--dtype", "fp7"], "dtype"),
        (["--model", "nosuchnet"], "nosuchnet"),
        (["--images", "/no/such/folder"], "folder"),
    ],
)
def test_bad_options_are_refused_by_name(run, args, words):
    result = run(same, *args)
    assert result.exit_code == 2 and words in result.output
