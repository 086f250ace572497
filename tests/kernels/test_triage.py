"""Triage: kernels that crash, hang or are wrong cost a line each, and are left out by name; the others are timed."""

import csv

import pytest
import torch
import triage

from fastres import backends, native
from fastres.plan.candidate import REGISTRY
from fastres.plan.target import on_paper
from fastres.workers import Answer


def test_what_is_broken_is_found_named_and_left_out(tmp_path, monkeypatch, capsys, threads):
    if reason := native.available("cpu"):
        pytest.skip(reason)
    threads(1)
    monkeypatch.setenv("FASTRES_BACKENDS", "-onednn.conv_bn_act,-cpu.winograd_conv_bn_act")
    monkeypatch.setattr(triage, "CHECK_S", 4.0)
    arguments = ["--device", "cpu", "--seconds", "120", "--out", str(tmp_path), "--import", "broken_kernels"]
    before = {name: vars(candidate).get("bind") for name, candidate in REGISTRY.candidates.items()}
    try:
        assert triage.main(arguments) == 1
    finally:  # this process has imported it too
        for name, candidate in REGISTRY.candidates.items():
            if before.get(name) is None:
                vars(candidate).pop("bind", None)
    rows = {row["kernel"]: row for row in csv.DictReader(open(tmp_path / "triage.csv"))}
    verdicts = {name: row["verdict"] for name, row in rows.items()}
    broken = {"cpu.max_pool": "crashed", "cpu.global_avg_pool": "hung", "onednn.linear": "wrong"}
    assert {name: verdicts.pop(name) for name in broken} == broken
    assert (
        "SIGSEGV" in rows["cpu.max_pool"]["reason"] and "elements outside" in rows["onednn.linear"]["reason"]
    )
    assert len(verdicts) == 6 and set(verdicts.values()) == {"ok"}, "the primitives of training"
    for name in verdicts:
        assert (
            float(rows[name]["error"]) < 1e-5
            and float(rows[name]["ms"]) > 0
            and float(rows[name]["own_ms"]) > 0
        )
    # onednn's are PyTorch's own calls: shown and timed, not left out
    assert float(rows["onednn.linear"]["ms"]) > 0
    assert (tmp_path / "excluded").read_text() == "-cpu.max_pool,-cpu.global_avg_pool\n"
    assert "broken: cpu.max_pool, cpu.global_avg_pool" in capsys.readouterr().out


def test_a_triage_that_tried_nothing_is_no_success(capsys):
    assert triage.main(["--device", "cpu", "--seconds", "0"]) == 1
    assert "tried 0 of" in capsys.readouterr().out


def test_every_kernel_of_a_hopper_is_tried_at_every_window_that_it_takes():
    backends.load()
    target = on_paper("sm90")
    found = triage.pieces(target)
    tried = {piece.kernel for piece in found}
    gpu = [c for c in REGISTRY.candidates.values() if c.backend in ("cudnn", "triton", "hopper", "cuda")]
    unused = {"triton.normalize"} & {c.name for c in gpu}
    assert {c.name for c in gpu} - unused <= tried
    windows = {p.problem["conv"].kernel for p in found if p.kernel == "cuda.sm80_conv_bn_act"}
    assert {(1, 1), (3, 3)} <= windows
    assert all(p.problem.dtype == torch.bfloat16 for p in found if p.problem is not None)
    assert {p.planar for p in found if p.kernel == "cuda.sm90_stem_pool"} == {False, True}
    # a chain is compared with PyTorch's own call for each of its layers
    chain = next(p.problem for p in found if p.problem is not None and p.problem.pattern == "shifted_block")
    assert len(triage.own_calls(chain, target)) == len(chain.layers)


def test_rows_are_written_as_they_come(tmp_path):
    backends.load()
    target = on_paper("sm90")
    chosen = {piece.kernel: piece for piece in triage.pieces(target)}
    both = chosen["cuda.sm90_dual"], chosen["cudnn.dual"]
    made = triage.Triage(target, "cuda", 0.0, out=tmp_path)
    made.rows = {piece: triage.Row(piece) for piece in both}
    for piece in made.rows:
        made._told(piece, Answer(reason="its process died: SIGABRT"))
    with open(tmp_path / "triage.csv") as file:
        assert [row["verdict"] for row in csv.DictReader(file)] == ["crashed", "crashed"]
    assert (tmp_path / "excluded").read_text() == "-cuda.sm90_dual\n"
