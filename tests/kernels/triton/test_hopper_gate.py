"""The Hopper kernels compile for sm_90 as the networks' layers would launch them, on this Triton and on
3.6: wgmma, no spilled register, shared memory within the limit. No GPU is needed."""

import importlib
import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
from compile_only import SHARED_LIMIT, added_waits, compile_for, specialization, unordered
from problems import H100, NETWORKS, make_nodes, network_problems

from fastres.backends import triton_hopper  # noqa: F401
from fastres.graph.fold import LayerParameters
from fastres.plan.candidate import REGISTRY, Buffers

pytestmark = pytest.mark.gate
HERE = tuple(int(part) for part in triton.__version__.split(".")[:2])
TARGET = replace(H100, triton=HERE)
HOPPER = [candidate for candidate in REGISTRY.candidates.values() if candidate.backend == "hopper"]
# Their A operands are in registers, which is where ptxas gives wgmma's overlap up; reading machine code takes 0.5 s.
CHAINED = ("expand_reduce_kernel", "shifted_block_kernel", "stem_pool_kernel")
# A multiprocessor's shared memory; each resident block takes 1 KB more than it asks for.
MULTIPROCESSOR = 228 * 1024


def launches(candidate, networks, every=False, dtype=torch.bfloat16, n=256):
    """(problem, config, call) of every binary that the heuristic (or `every` configuration) asks for."""
    found = {}
    for problem in network_problems(candidate.pattern, networks, n=n, dtype=dtype):
        if candidate.accepts(problem, TARGET) is not None:
            continue
        configs = candidate.configs(problem, TARGET)
        for config in configs if every else configs[:1]:
            call = candidate.call(problem, config, *memory_of(candidate, problem, config))
            key = specialization(call.kernel, call.arguments, call.options, 90)
            found.setdefault(key, (problem, config, call))
    return list(found.values())


def memory_of(candidate, problem, config):
    """Buffers and constants without storage."""

    def empty(shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=torch.channels_last)

    tensors = {name: empty(problem.input_shape(name), problem.input_dtype(name)) for name in problem.inputs}
    tensors |= {role: empty(problem.output_shape(role), problem.dtype) for role in problem.outputs}
    counters = torch.empty(candidate.counters(problem, config), dtype=torch.int32, device="meta")
    parameters = {role: LayerParameters(node) for role, node in make_nodes(problem, "meta").items()}
    return Buffers(tensors, counters), candidate.prepare(problem, config, parameters)


def check(problem, config, call, spills=False):
    compiled = compile_for(90, call.kernel, call.arguments, **call.options)
    what = f"{compiled.name} {problem} [{config}] on Triton {triton.__version__}"
    assert "wgmma.mma_async" in compiled.ptx, f"{what}: no wgmma"
    assert spills or compiled.stack == 0, f"{what}: {compiled.stack} bytes of spilled registers a thread"
    assert not (found := unordered(compiled.ptx)), f"{what}: {found[0]}"
    if compiled.name in CHAINED:
        assert added_waits(compiled) == 0, f"{what}: ptxas serialised its wgmma"
    blocks = getattr(config, "per_sm", 1)
    assert compiled.shared <= SHARED_LIMIT[90], f"{what}: {compiled.shared} bytes of shared memory"
    assert blocks * (compiled.shared + 1024) <= MULTIPROCESSOR, f"{what}: {blocks} blocks do not fit"
    return compiled


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("candidate", HOPPER, ids=str)
def test_heuristic_configurations_of_resnet50(candidate, half):
    found = launches(candidate, ("resnet50", "resnet18"))
    if not found:
        pytest.skip(f"{candidate} refuses all of its layers on Triton {triton.__version__}")
    for problem, config, call in found[half::2]:
        check(problem, config, call)


def test_what_batch_32_chooses_otherwise_for_a_residual():
    """Batch 256's choices stand above. Into tiles of 128 x 256 a residual spilled, and tables chose it all the
    same."""
    candidate = REGISTRY["hopper.conv_bn_act"]
    large, small = (launches(candidate, ("resnet50",), n=n) for n in (256, 32))
    choices = {problem.layer_key: config for problem, config, _ in large}
    others = [
        made for made in small if made[0]["conv"].residual and choices.get(made[0].layer_key) != made[1]
    ]
    assert any(config.block_n == 256 and config.warps == 8 for _, config, _ in others)
    for problem, config, call in others:
        check(problem, config, call)


@pytest.mark.parametrize("normalize", [False, True], ids=["", "uint8"])
@pytest.mark.parametrize("planar", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["nchw", "nhwc"])
def test_stem_in_the_callers_order_and_type(planar, normalize):
    """What the caller has in memory is what the kernel reads."""
    candidate = REGISTRY["hopper.stem_pool"]
    problem = next(
        problem
        for problem in network_problems(candidate.pattern, ("resnet50",), normalize=normalize)
        if (problem.get("normalize") is not None) == normalize
    )
    config = candidate.configs(problem, TARGET)[0]
    buffers, constants = memory_of(candidate, problem, config)
    (name,) = problem.inputs
    if planar:
        buffers.tensors[name] = buffers[name].contiguous()
    call = candidate.call(problem, config, buffers, constants)
    assert call.arguments["PLANAR"] == planar and call.arguments["NORMALIZE"] == normalize
    compiled = check(problem, config, call)
    # Pairs of pixels a load: 4 bytes, or 2 of uint8; none of a single one.
    assert "ld.global.b8" not in compiled.ptx and (normalize or "ld.global.b16" not in compiled.ptx)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 32, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("candidate", HOPPER, ids=str)
def test_heuristic_configurations_of_all_networks(candidate, dtype, n):
    for problem, config, call in launches(candidate, tuple(NETWORKS), dtype=dtype, n=n):
        check(problem, config, call)


@pytest.mark.slow
@pytest.mark.parametrize("candidate", HOPPER, ids=str)
def test_every_configuration_that_tuning_tries_on_resnet50(candidate):
    for problem, config, call in launches(candidate, ("resnet50",), every=True):
        check(problem, config, call, spills=True)


def test_a_missing_barrier_is_seen():
    """Without one of the barriers that the compiler put in, one thread would speak too early."""
    candidate = REGISTRY["hopper.expand_reduce"]
    _, _, call = launches(candidate, ("resnet50",))[0]
    lines = compile_for(90, call.kernel, call.arguments, **call.options).ptx.splitlines()
    words = ("fence.proxy", "bar.sync", "bar.warp.sync", "mbarrier.arrive.shared", "matrix.sync", ".shared.b")
    code = [i for i, line in enumerate(lines) if any(word in line for word in words)]
    needed = [
        at
        for before, at, after in zip(code, code[1:], code[2:], strict=False)
        if "fence.proxy" in lines[before] and "sync" in lines[at] and "mbarrier.arrive" in lines[after]
    ]
    assert len(needed) >= 4 and not unordered("\n".join(lines))
    for at in needed:
        assert unordered("\n".join(lines[:at] + lines[at + 1 :])), lines[at]


CARRIED = (
    ("y, a = warpgroup_mma_wait(0, deps=(y, a))", "y, a = warpgroup_mma_wait(1, deps=(y, a))"),
    (
        "        if SCALED:\n            y =",
        "        y = warpgroup_mma_wait(0, deps=(y,))\n        if SCALED:\n            y =",
    ),
)


def test_serialised_products_are_seen(tmp_path, monkeypatch):
    """With a product in flight over the loop's back edge, its operand in registers."""
    candidate = REGISTRY["hopper.expand_reduce"]
    _, _, call = launches(candidate, ("resnet50",))[0]
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in ("hopper_common.py", "hopper_expand_reduce.py"):
        text = (Path(inspect.getfile(call.kernel.fn)).parent / file).read_text()
        if "expand_reduce" in file:
            for old, new in CARRIED:
                assert old in text
                text = text.replace(old, new)
        (folder / file).write_text(text)
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    broken = importlib.import_module("broken.hopper_expand_reduce").expand_reduce_kernel
    assert added_waits(compile_for(90, broken, call.arguments, **call.options)) > 0
