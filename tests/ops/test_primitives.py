"""Which backend computes a primitive, and what the registry says about the others."""

import importlib

import pytest
import torch

from fastres import native
from fastres.ops import primitives, torch_primitives


def test_every_primitive_has_pytorchs_arithmetic_as_its_last_candidate():
    for name in primitives.NAMES:
        for device in ("cpu", "cuda"):
            rows = primitives.candidates(name, device, torch.float32)
            assert rows[-1] == ("torch", getattr(torch_primitives, name), None)
            assert all((function is None) != (reason is None) for _, function, reason in rows)


def test_a_backend_with_one_of_a_pair_of_optional_primitives_has_both():
    for backend in primitives.BACKENDS:
        try:
            module = importlib.import_module(backend.module)
        except ImportError:
            continue
        for pair in (primitives.OPTIONAL, primitives.WHOLE):
            assert len({hasattr(module, name) for name in pair}) == 1, (backend.name, pair)


def test_a_pinned_backend_computes_and_the_others_say_why_not():
    x = torch.zeros(1)
    with primitives.pinned("torch"):
        assert primitives.get("bn_stats", x) is torch_primitives.bn_stats
        rows = {backend: reason for backend, _, reason in primitives.candidates("bn_stats", "cpu", x.dtype)}
        assert rows["cpu"] == "only torch may be used"
    if native.available("cpu") is None:
        assert primitives.get("bn_stats", x) is not torch_primitives.bn_stats


def test_the_environment_restricts_automatic_choice(monkeypatch):
    monkeypatch.setenv("FASTRES_BACKENDS", "cudnn")
    function = next(f for _, f, _ in primitives.candidates("bn_act", "cpu", torch.float32) if f)
    assert function is torch_primitives.bn_act
    for value in ("-cpu.bn_act", "-cpu", "cpu,-cpu.bn_act"):
        monkeypatch.setenv("FASTRES_BACKENDS", value)
        cpu, own = primitives.candidates("bn_act", "cpu", torch.float32)
        assert cpu == ("cpu", None, "FASTRES_BACKENDS leaves it out") and own[0] == "torch"
        # what runs it goes with it
        assert primitives.candidates("bn_act_forward", "cpu", torch.float32)[0] == cpu
        assert (primitives.candidates("bn_act_gradients", "cpu", torch.float32)[0][2] is None) == (
            "bn_act" in value
        )
        assert (primitives.candidates("add_relu", "cpu", torch.float32)[0][2] is None) == ("bn_act" in value)


def test_an_unknown_backend_is_refused_by_name():
    with pytest.raises(ValueError, match="backend: expected one of cuda, triton, cpu, torch, got 'tpu'"):
        with primitives.pinned("tpu"):
            pass


def test_missing_compiler_leaves_pytorchs_arithmetic(monkeypatch):
    monkeypatch.setattr(native, "available", lambda name: "no compiler")
    rows = primitives.candidates("bn_act", "cpu", torch.float32)
    assert rows[0] == ("cpu", None, "no compiler") and rows[-1][2] is None
