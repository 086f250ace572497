"""Every portable kernel compiles for every GPU family with what the heuristics pick: `pytest -m gate`.

Held to: tensor-core instructions in every product of 16-bit or TF32 values, shared memory within the limit, and
no spilled register in a first choice. No GPU is needed. Launches that compile to the same binary are compiled
once, and Triton's own cache keeps them between runs. All of Triton's gates: `pytest -m "gate and not slow"
tests/kernels/triton`.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
from problems import H100, NETWORKS, network_problems

pytest.importorskip("triton", reason="Triton cannot be imported")
from compile_only import (
    SHARED_LIMIT,
    Compiled,
    candidate_calls,
    compile_for,
    specialization,
)

from fastres.backends import triton_ops, triton_portable  # noqa: F401 (registers)
from fastres.plan.candidate import REGISTRY

PRODUCTS = {
    "conv_bn_act_kernel",
    "pointwise_stationary_kernel",
    "pointwise_persistent_kernel",
    "dual_kernel",
    "expand_reduce_kernel",
    "shifted_block_kernel",
    "stem_pool_kernel",
}
BLOCK_NETWORKS = ("resnet50", "resnext50_32x4d")
# The first choices in pieces that take about as long as one another: processes share them evenly. Elsewhere than on
# sm_90, each configuration at the largest layer of each kind that it is chosen for (the `slow` gates take all layers).
PIECES = [
    (capability, networks, part, parts)
    for capability, networks, parts in [
        (90, tuple(NETWORKS), 4),
        (80, BLOCK_NETWORKS, 2),
        (100, BLOCK_NETWORKS, 2),
    ]
    for part in range(parts)
]


@cache
def jobs(capability, networks, dtypes, batches=(256,), choices=1, flags=()):
    """(candidate, problem, config, capability, planar) of launches that differ after specialisation."""
    target = replace(H100, arch=f"sm{capability}")
    found = {}
    for candidate in [c for c in REGISTRY.candidates.values() if c.backend == "triton"]:
        for dtype in dtypes:
            for batch in batches:
                for normalize in (False, True) if candidate.name == "triton.stem_pool" else (False,):
                    for problem in network_problems(
                        candidate.pattern, networks, batch, dtype, normalize=normalize
                    ):
                        problem = replace(problem, flags=flags)
                        if candidate.accepts(problem, target) is not None:
                            continue
                        for config in candidate.configs(problem, target)[:choices]:
                            for planar in (False, True) if candidate.planar(problem) else (False,):
                                calls = candidate_calls(candidate, problem, config, planar)
                                key = tuple(
                                    specialization(c.kernel, c.args, c.options, capability) for c in calls
                                )
                                found.setdefault(key, (candidate.name, problem, config, capability, planar))
    return list(found.values())


def largest_of_each_kind(found: list) -> list:
    """Of the jobs that differ in channels and image size alone, the largest."""

    def kind(job):
        name, problem, config, _, planar = job
        layers = [
            (role, *(getattr(spec, field, None) for field in ("kernel", "stride", "residual")))
            for role, spec in problem.layers
        ]
        return name, tuple(layers), problem.outputs, config, planar

    by_size = sorted(found, key=lambda job: job[1].flops + job[1].bytes)
    return list({kind(job): job for job in by_size}.values())


def compile_job(job) -> tuple[str, list[Compiled] | str]:
    name, problem, config, capability, planar = job
    label = f"sm_{capability} {name} {problem} | {config}{' contiguous' * planar}"
    try:
        calls = candidate_calls(REGISTRY[name], problem, config, planar)
        return label, [compile_for(capability, c.kernel, c.args, **c.options) for c in calls]
    except Exception as error:
        return label, f"{type(error).__name__}: {str(error)[-500:]}"


def check(found: list, spills: bool = False) -> None:
    """Compile all and report every fault at once."""
    faults = []
    for job in found:
        label, kernels = compile_job(job)
        if isinstance(kernels, str):
            faults.append(f"{label}: {kernels}")
            continue
        _, problem, _, capability, _ = job
        for kernel in kernels:
            if kernel.shared > SHARED_LIMIT[capability]:
                faults.append(f"{label}: {kernel.shared} bytes of shared memory")
            if kernel.stack and not spills:
                faults.append(f"{label}: spills, {kernel.stack} bytes of stack")
            wanted = problem.dtype.itemsize == 2 or "tf32" in problem.flags
            if wanted and kernel.name in PRODUCTS and not kernel.tensor_cores:
                faults.append(f"{label}: no tensor-core instruction")
    assert found and not faults, f"{len(faults)} of {len(found)}:\n" + "\n".join(faults)


@pytest.mark.gate
@pytest.mark.parametrize(
    "capability, networks, part, parts",
    PIECES,
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_first_choices_in_bf16(capability, networks, part, parts):
    found = jobs(capability, networks, (torch.bfloat16,))
    check((found if capability == 90 else largest_of_each_kind(found))[part::parts])


@pytest.mark.gate
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("batch", [1, 3, 32, 256])
def test_first_choices_of_every_type_and_batch(capability, batch):
    check(jobs(capability, tuple(NETWORKS), (torch.bfloat16, torch.float16, torch.float32), (batch,)))


@pytest.mark.gate
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_first_choices_in_tf32(capability):
    check(jobs(capability, tuple(NETWORKS), (torch.float32,), flags=("tf32",)))


@pytest.mark.gate
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_whatever_tune_may_try(capability):
    """Spills only cost time there."""
    check(jobs(capability, BLOCK_NETWORKS, (torch.bfloat16,), choices=100), spills=True)


@pytest.mark.gate
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_training_primitives(capability, monkeypatch):
    """Both layouts: 16-byte accesses where the channels lie side by side, and no spills anywhere."""
    recorded = []
    monkeypatch.setattr(
        triton_ops, "_launch", lambda kernel, programs, *args: recorded.append((kernel, args))
    )
    for layout in (torch.channels_last, torch.contiguous_format):

        def tensor(layout=layout):
            return torch.empty(64, 256, 14, 14, dtype=torch.bfloat16, device="meta").contiguous(
                memory_format=layout
            )

        def channels():
            return torch.empty(256, device="meta")

        x, grad, residual, out = tensor(), tensor(), tensor(), tensor()
        triton_ops.add_relu(x, residual, out)
        triton_ops.add_relu_backward(grad, out, grad)
        triton_ops.bn_stats(x, channels(), channels())
        statistics = (channels() for _ in range(6))
        triton_ops.bn_finalize(*statistics, 0.1, 1e-5, 64 * 14 * 14, *(channels() for _ in range(3)))
        triton_ops.bn_act(x, residual, channels(), channels(), 1, 0.0, out)
        common = (grad, x, residual, out, *(channels() for _ in range(4)), 1, 0.0)
        triton_ops.bn_act_backward_reduce(*common, channels(), channels(), residual)
        triton_ops.bn_act_backward(*common, channels(), channels(), out, residual)
        for kernel, args in recorded:
            compiled = compile_for(
                capability, kernel, dict(zip(kernel.arg_names, args, strict=True)), num_warps=4
            )
            assert compiled.stack == 0, compiled.name
            if (
                layout is torch.channels_last
                and "merge" not in compiled.name
                and "finalize" not in compiled.name
            ):
                assert "ld.global.v4.b32" in compiled.ptx, compiled.name
        recorded.clear()


# Weights resident, a loop over the reduction, and rows that descriptors cannot step by.
CONV_STATS = [(64, 256, 56), (512, 128, 28), (17, 100, 28)]


@pytest.mark.gate
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_conv_stats(capability, monkeypatch):
    recorded = []
    monkeypatch.setattr(
        triton_ops,
        "_launch",
        lambda kernel, programs, *args, **options: recorded.append((kernel, args, options)),
    )
    monkeypatch.setattr(triton_ops, "_target", lambda x: replace(H100, arch=f"sm{capability}"))
    for c, k, size in CONV_STATS:
        x, out = (
            torch.empty(256, channels, size, size, dtype=torch.bfloat16, device="meta").contiguous(
                memory_format=torch.channels_last
            )
            for channels in (c, k)
        )
        weight = torch.empty(k, c, 1, 1, dtype=x.dtype, device="meta")
        statistics = (torch.empty(k, device="meta") for _ in "mv")
        triton_ops.conv_stats(x, weight, (1, 1), (0, 0), (1, 1), 1, out, *statistics)
        (kernel, args, options), _merge = recorded
        recorded.clear()
        compiled = compile_for(capability, kernel, dict(zip(kernel.arg_names, args, strict=True)), **options)
        assert compiled.stack == 0 and compiled.tensor_cores, (c, k, compiled)
        assert compiled.shared <= SHARED_LIMIT[capability], (c, k, compiled.shared)
