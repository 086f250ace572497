"""Estimates: what ranks kernels where nothing is measured, and bounds what tables say about other batch sizes."""

import types

import pytest
import torch

from fastres import backends
from fastres.plan.candidate import REGISTRY, Candidate, Work
from fastres.plan.pattern import CONV_BN_ACT
from fastres.plan.planner import table_cost
from fastres.plan.problem import ConvSpec, Problem
from fastres.plan.target import _cuda, on_paper, rates_of
from fastres.tuning import table

H100 = on_paper("sm90")
BF16 = torch.bfloat16


def convolution(n=1, c=256, k=1024, size=14, dtype=BF16) -> Problem:
    return Problem(
        "conv_bn_act", (("conv", ConvSpec(n, c, size, size, k, (1, 1))),), dtype, ("conv.x",), ("conv",)
    )


def test_few_blocks_take_as_long_as_the_busiest_multiprocessor():
    problem = convolution(n=256)
    full, one = Work(132, 1 << 20), Work(1, 132 << 20)
    # the same traffic by one multiprocessor instead of 132
    assert one.ms(problem, H100) == pytest.approx(132 * full.ms(problem, H100))
    assert Work(133, 1 << 20).ms(problem, H100) > 1.9 * full.ms(problem, H100)


def test_a_product_reads_its_operands_once_a_tile():
    assert Work.product(100, 300, 64, 64, 128, itemsize=2) == Work(2 * 3, (64 + 128) * 64 * 2)


@pytest.mark.parametrize("arch", ["sm100", "cpu"])
def test_without_rates_there_is_nothing_to_say(arch):
    assert Work(1, 1 << 30).ms(convolution(), on_paper(arch)) == 0.0


def test_estimates_of_every_kernel_fall_with_the_batch_down_to_a_start_and_never_below_the_floor():
    backends.load()
    for candidate in REGISTRY.for_pattern(CONV_BN_ACT):
        times = {}
        for n in (1, 16, 256):
            problem = convolution(n=n)
            if candidate.accepts(problem, H100) is None:
                times[n] = candidate.estimate_ms(problem, H100)
                assert times[n] > H100.floor_ms(problem), candidate
                assert candidate.least_ms(problem, H100) <= times[n], candidate
        assert list(times.values()) == sorted(times.values()), candidate


def test_a_chained_kernel_of_thirteen_blocks_is_not_thought_fast():
    """expand_reduce of stage 3 at batch 1: every block of 16 pixels reads a megabyte of weights."""
    backends.load()
    layers = (
        ("expand", ConvSpec(1, 256, 14, 14, 1024, (1, 1), residual=True)),
        ("reduce", ConvSpec(1, 1024, 14, 14, 256, (1, 1))),
    )
    inputs = ("expand.x", "expand.residual")
    problem = Problem("expand_reduce", layers, BF16, inputs, ("expand", "reduce"))
    chained = REGISTRY["triton.expand_reduce"]
    assert chained.accepts(problem, H100) is None
    apart = sum(
        REGISTRY["triton.conv_bn_act"].estimate_ms(convolution(c=c, k=k), H100)
        for c, k in ((256, 1024), (1024, 256))
    )
    assert chained.estimate_ms(problem, H100) > 2 * apart


class _Cut(Candidate):
    name, pattern = "test.cut", CONV_BN_ACT

    def busiest_ms(self, problem, target):
        return 0.25


def test_a_time_of_another_batch_size_is_not_believed_below_what_the_work_takes(monkeypatch, tmp_path):
    monkeypatch.setattr(table, "user_dir", lambda: tmp_path)
    measured = convolution(n=256)
    table.write(tmp_path, "sm90", _Cut.name, {}, {measured.key: {"config": {}, "ms": 0.3, "peers": {}}})
    assert table_cost(_Cut(), measured, H100).ms == 0.3
    # more than eight times away it is no more than a guess
    for n, kind in ((32, "nearest"), (31, "estimate"), (1, "estimate")):
        scaled = table_cost(_Cut(), convolution(n=n), H100)
        assert scaled.kind == kind and scaled.ms == _Cut().least_ms(convolution(n=n), H100) > 0.25


def test_an_unknown_gpu_gets_its_rates_from_its_properties():
    # an A10G's, as its driver gives them (kHz, bits)
    known = dict(major=8, minor=6, multi_processor_count=80, clock_rate=1710000)
    bandwidth, l2, flops = rates_of(
        types.SimpleNamespace(**known, memory_clock_rate=6251000, memory_bus_width=384)
    )
    assert 0.8 * 600e9 < bandwidth < 600e9 < l2, "the data sheet says 600 GB/s"
    assert 0.4 * 70e12 < dict(flops)["bf16"] < 70e12, "the data sheet says 70 TFLOP/s"
    assert rates_of(types.SimpleNamespace(**known)) == (0.0, 0.0, ())


def test_an_amd_gpu_is_no_hopper_although_its_number_is_an_h100s(monkeypatch):
    mi250 = dict(major=9, minor=0, name="AMD Instinct MI250X", gcnArchName="gfx90a:sramecc+:xnack-")
    properties = types.SimpleNamespace(
        **mi250,
        multi_processor_count=110,
        clock_rate=1700000,
        memory_clock_rate=1600000,
        memory_bus_width=4096,
    )
    monkeypatch.setattr(torch.version, "hip", "6.3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    target = _cuda.__wrapped__(0)
    assert (target.arch, target.capability, target.flops) == ("gfx90a", 0, ())
    taken = {
        c.backend
        for c in REGISTRY.candidates.values()
        if c.pattern is CONV_BN_ACT and c.accepts(convolution(), target) is None
    }
    assert "triton" in taken and not taken & {"hopper", "cuda"}
