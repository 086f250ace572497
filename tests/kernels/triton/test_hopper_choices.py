"""What the Hopper candidates choose before anything of theirs is measured here: the configurations that were the
fastest of their prototypes on an H100, and how tiles are dealt out."""

from dataclasses import asdict, replace

import pytest
import torch
from problems import H100, conv_problem, network_problems
from test_hopper_gate import memory_of
from test_hopper_host import HOPPER, check, dual, expand_reduce, machine, one_thread, shifted_block  # noqa: F401

from fastres.backends.triton_hopper import base
from fastres.backends.triton_hopper.tiling import GemmConfig
from fastres.plan.candidate import REGISTRY
from fastres.tuning import table

BF16 = torch.bfloat16
TARGET = replace(H100, triton=(3, 6))


@pytest.mark.parametrize("candidate", HOPPER, ids=str)
def test_the_first_choice_is_what_the_prototype_measured_best(candidate):
    known = table.load(table.path(table.SHIPPED, "sm90", candidate.name, "prototype"))
    if known is None:
        pytest.skip(f"{candidate} had no prototype")
    entries = known.entries()
    for n in (32, 256):
        for problem in network_problems(candidate.pattern, ("resnet50",), n=n):
            if problem.key in entries and candidate.accepts(problem, TARGET) is None:
                first = candidate.configs(problem, TARGET)[0]
                assert asdict(first) == entries.pop(problem.key)["config"], problem
    assert not entries


@pytest.mark.parametrize(
    ("name", "layer", "dynamic"),
    [
        # 95, 12, 6 and 3 tiles a block at batch 256
        ("conv_bn_act", "conv 64->256 1x1/1 @56x56 +add", 1),
        ("expand_reduce", "expand 128->512", 1),
        ("conv_bn_act", "conv 1024->256 1x1/1 @14x14", 0),
        ("conv_bn_act", "conv 256->256 3x3/1 @14x14", 0),
        ("expand_reduce", "expand 256->1024", 0),
        # Many, but of different lengths
        ("conv_bn_act", "conv 512->512 3x3/1 @7x7", 0),
    ],
)
def test_few_tiles_are_shared_out_and_many_are_claimed(name, layer, dynamic):
    candidate = REGISTRY[f"hopper.{name}"]
    for problem in network_problems(candidate.pattern, ("resnet50",), n=256):
        if layer in str(problem) and candidate.accepts(problem, TARGET) is None:
            config = candidate.configs(problem, TARGET)[0]
            call = candidate.call(problem, config, *memory_of(candidate, problem, config))
            assert call.arguments["DYNAMIC"] == dynamic
            return
    raise AssertionError("no such layer")


SHARED = {
    "two consumers": ("conv_bn_act", conv_problem(9, 128, 8, 8, 64, 1, BF16), GemmConfig(64, 64, stages=3)),
    "resident": (
        "conv_bn_act",
        conv_problem(9, 64, 8, 8, 128, 1, BF16, residual=True),
        GemmConfig(64, 64, stages=3, staged=2, stationary=True),
    ),
    "dual": ("dual", dual(3, 128, 64, 14, 10, 136, 2), GemmConfig(64, 64, stages=3)),
    "expand_reduce": ("expand_reduce", expand_reduce(5, 64, 11, 13, 256), None),
    "halo": ("halo", conv_problem(2, 64, 21, 19, 64, 3, BF16), None),
    "halo_rows": ("halo_rows", conv_problem(2, 64, 24, 19, 64, 3, BF16), None),
    "shifted_block": ("shifted_block", shifted_block(2, 19, 14, 64), None),
}


@pytest.mark.parametrize(("name", "problem", "config"), SHARED.values(), ids=SHARED.keys())
def test_tiles_that_are_shared_out_are_all_computed(machine, monkeypatch, name, problem, config):  # noqa: F811
    monkeypatch.setattr(base, "FEW_TILES", 1 << 30)
    check(machine, f"hopper.{name}", problem, config)
    assert not any(call.arguments["DYNAMIC"] for call, _ in machine.runs)
