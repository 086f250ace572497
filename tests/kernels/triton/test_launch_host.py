"""How Triton's kernels are launched, without a GPU: devices, grids, tiles that the compiler takes."""

import contextlib
import importlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from problems import H100, conv_problem

from fastres.backends import triton_ops
from fastres.backends.triton_hopper.base import Call
from fastres.backends.triton_portable.launch import _resident
from fastres.plan.candidate import REGISTRY
from fastres.plan.problem import ConvSpec
from fastres.tuning.portable_config import conv_stats_config

BF16 = torch.bfloat16


def test_training_primitives_launch_on_their_tensors_device(monkeypatch):
    """Not on the current one: its stream would know nothing of the other's work."""
    current, launched = [0], []

    @contextlib.contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda index: f"stream {index}"))
    compiled = SimpleNamespace(
        run=lambda *args: launched.append((current[-1], args[3])), function=None, packed_metadata=None
    )
    kernel = SimpleNamespace(
        params=[SimpleNamespace(is_constexpr=False)], warmup=lambda *args, **options: compiled
    )
    # triton.runtime.driver as an attribute is the object, not the module.
    monkeypatch.setattr(importlib.import_module("triton.runtime.driver"), "driver", driver)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(triton_ops, "_constexprs", lambda kernel: (False,))
    monkeypatch.setattr(triton_ops, "_compiled", {})
    monkeypatch.setattr(triton_ops, "interpreted", lambda: False)

    class Kernel(SimpleNamespace):
        __hash__ = object.__hash__

    for index in (0, 1):
        base = SimpleNamespace(device=SimpleNamespace(index=index), dtype=BF16)
        triton_ops._launch(Kernel(**vars(kernel)), 1, SimpleNamespace(base=base, block_shape=()))
    assert launched == [(0, "stream 0"), (1, "stream 1")]


@pytest.mark.parametrize("sms", [132, 16, 7])
def test_resident_weights_need_a_block_for_every_column_of_tiles(sms):
    """Triton skips an empty grid without a word."""
    candidate, target = REGISTRY["hopper.conv_bn_act"], replace(H100, sms=sms)
    configs = candidate.configs(conv_problem(256, 128, 28, 28, 2048, 1, BF16), target)
    columns = [-(-2048 // config.block_n) for config in configs if config.stationary]
    assert configs and all(column <= sms for column in columns)
    assert bool(columns) == (sms >= 8)


def test_coordinates_of_32_bits_bound_the_pixels():
    candidate = REGISTRY["hopper.conv_bn_act"]
    for images, taken in ((1 << 14, True), (1 << 15, False)):
        reason = candidate.accepts(conv_problem(images, 8, 256, 256, 8, 1, BF16), H100)
        assert (reason is None) if taken else "2^31 pixels" in reason


@pytest.mark.parametrize(
    "known", [dict(shared_memory_per_multiprocessor=228 * 1024), {}], ids=["nvidia", "amd"]
)
def test_persistent_programs_are_counted_on_what_a_device_says_of_itself(known, monkeypatch):
    """PyTorch for AMD does not say how much shared memory a compute unit has."""
    said = SimpleNamespace(
        warp_size=32, multi_processor_count=100, max_threads_per_multi_processor=2048, **known
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: said)
    compiled = SimpleNamespace(n_regs=64, metadata=SimpleNamespace(shared=31 * 1024))
    assert _resident(compiled, 4, torch.device("cuda", 0)) == (700 if known else 200)


def test_a_grid_without_blocks_is_refused():
    with pytest.raises(ValueError, match="grid: 0"):
        Call(None, 0, {}, {})


@pytest.mark.parametrize("c", [8, 16, 24, 40])
@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm100"])
def test_no_product_of_the_portable_kernels_is_shorter_than_the_compiler_takes(c, arch):
    target = replace(H100, arch=arch)
    problem = conv_problem(4, c, 14, 14, 64, 1, BF16)
    configs = REGISTRY["triton.conv_bn_act"].configs(problem, target)
    spec = ConvSpec(4, c, 14, 14, 64, (1, 1))
    configs.append(conv_stats_config(spec, 2, target, 227 * 1024, True))
    assert all(config.block_k >= 16 for config in configs), configs
