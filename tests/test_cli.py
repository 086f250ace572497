"""The `fastres` command."""

import pytest
from typer.testing import CliRunner

from fastres import env
from fastres.backends import FAMILIES
from fastres.cli import app
from fastres.proof.record import Record


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def test_info_names_versions_device_every_backend_and_variable():
    result = run("info")
    assert result.exit_code == 0, result.output
    for word in ("fastres ", "torch ", "device: ", *FAMILIES, *env.VARIABLES):
        assert word in result.output
    lines = {line.split()[0]: line for line in result.output.splitlines() if line.strip()}
    assert "ready" in lines["reference"]
    assert "ready" in lines["cudnn"] or "not here: it needs an NVIDIA GPU" in lines["cudnn"]


def test_info_names_kernels_that_failed_their_proof(monkeypatch, tmp_path):
    kept = Record(tmp_path / "proofs.txt")
    kept.add("hopper.dual n256 right")
    kept.add("hopper.dual n1 wrong", "it was wrong on this device")
    monkeypatch.setattr(Record, "of", staticmethod(lambda device: kept))
    output = run("info").output
    assert f"proofs: 2 kernel calls tried, 1 left out ({kept.path})" in output
    assert "  hopper.dual n1 wrong: it was wrong on this device" in output and "n256" not in output


@pytest.mark.parametrize("arch", ["sm80", "sm90", "cpu"])
def test_plan_prints_the_cover_for_a_device_on_paper(arch):
    result = run(
        "plan", "resnet18", "--arch", arch, "--batch", "8", "--dtype", "fp32" if arch == "cpu" else "bf16"
    )
    assert result.exit_code == 0, result.output
    assert "layer4.1.conv2" in result.output and "images/s, if the predictions hold" in result.output


def test_plan_takes_networks_with_parts_that_no_kernel_knows():
    result = run("plan", "torchvision:mobilenet_v3_small", "--batch", "4", "--size", "64")
    assert result.exit_code == 0, result.output
    assert "PyTorch" in result.output


def test_plan_says_why():
    result = run("plan", "resnet18", "--batch", "8", "--why", "layer1.0.conv1")
    assert result.exit_code == 0 and "layer1.0.conv1: " in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--arch", "sm12"), "arch: got 'sm12'"),
        (("--dtype", "fp12"), "dtype: got 'fp12'"),
        (("--backend", "onednn"), "can run no layer"),
        (("--batch", "0"), "batch"),
        (("--size", "1"), ""),
    ],
)
def test_plan_refuses_by_name(arguments, words):
    result = run("plan", "resnet18", *arguments)
    if arguments[0] == "--size":
        assert result.exit_code == 0
        return
    assert result.exit_code == 2 and words in result.output


def test_plan_refuses_an_unknown_network():
    result = run("plan", "resnet51")
    assert result.exit_code == 2 and "resnet51" in result.output


def test_bench_explains_itself():
    result = run("bench", "--help")
    assert result.exit_code == 0
    for option in ("--model", "--batch", "--dtype", "--device", "--images", "--out"):
        assert option in result.output


def test_without_a_command_it_shows_the_commands():
    result = run()
    assert all(command in result.output for command in ("bench", "info", "plan"))
