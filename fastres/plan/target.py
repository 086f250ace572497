"""The machine at hand as a `Target`, and machines on paper."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import cache

import torch

from fastres.plan.problem import Target

# Copy bandwidth (read + written), bandwidth of the L2, matmul rates. H100: measured on an H100 80GB HBM3 (torch 2.11,
# CUDA 13.0); the floors use 3.0 TB/s and 750 TFLOP/s. H200: as reported for one by others, the L2 is the H100's. A100:
# NVIDIA's data sheet, not measured; half of its L2's.
_RATES = {
    "H100": (3.0e12, 5.5e12, (("bf16", 7.5e14), ("fp16", 7.5e14), ("fp32", 3.5e14))),
    "H200": (4.3e12, 5.5e12, (("bf16", 7.9e14), ("fp16", 7.9e14), ("fp32", 3.5e14))),
    "A100": (1.4e12, 3.6e12, (("bf16", 3.12e14), ("fp16", 3.12e14), ("fp32", 1.56e14))),
}
# Of another GPU, from what its driver says: dense 16-bit operations a clock and multiprocessor (NVIDIA's architecture
# white papers), of which a large product reaches 70 %; a copy reaches 85 % of the memory's clock times its width.
_OPERATIONS = {80: 2048, 86: 512, 87: 1024, 89: 1024, 90: 4096, 100: 8192, 103: 8192, 120: 1024, 121: 1024}
_PAPER = {
    "sm80": Target("cuda", "sm80", "A100", 108, *_RATES["A100"], triton=(3, 6), on_paper=True),
    "sm90": Target("cuda", "sm90", "H100", 132, *_RATES["H100"], triton=(3, 6), on_paper=True),
    "sm100": Target("cuda", "sm100", "B200", 148, triton=(3, 6), on_paper=True),
}


def detect(device: torch.device) -> Target:
    """The target of a device that is here."""
    if device.type == "cuda":
        return _cuda(torch.cuda.current_device() if device.index is None else device.index)
    return Target(
        device.type, device.type, _cpu_name() if device.type == "cpu" else "", torch.get_num_threads()
    )


def on_paper(arch: str) -> Target:
    """A GPU that need not be here: "sm80" (A100), "sm90" (H100) or "sm100" (B200)."""
    if arch == "cpu":
        return replace(detect(torch.device("cpu")), on_paper=True)
    if arch not in _PAPER:
        raise ValueError(f"arch: got {arch!r}, takes one of cpu, {', '.join(_PAPER)}")
    return _PAPER[arch]


@cache
def triton_version() -> tuple[int, int] | None:
    """(major, minor) of Triton without importing it; None where it is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    from importlib.metadata import PackageNotFoundError, version

    try:
        major, minor = version("triton").split(".")[:2]
    except PackageNotFoundError:
        import triton

        major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


@cache
def _cuda(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    # AMD's major and minor are of the gfx name: a gfx90a would pass for an H100's 9.0.
    arch = f"sm{properties.major}{properties.minor}"
    if torch.version.hip is not None:
        arch = properties.gcnArchName.split(":")[0]
    known = next((rates for name, rates in _RATES.items() if name in properties.name), None)
    rates = known or rates_of(properties)
    return Target(
        "cuda", arch, properties.name, properties.multi_processor_count, *rates, triton=triton_version()
    )


def rates_of(properties) -> tuple[float, float, tuple[tuple[str, float], ...]]:
    """(bandwidth, L2 bandwidth, flops) of a GPU that nobody has measured, by its `torch.cuda.get_device_properties`;
    zeros where they do not tell."""
    # kHz, twice a clock; bits
    clock, width = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)
    bandwidth = 0.85 * 2e3 * clock * width / 8
    nvidia = torch.version.hip is None
    operations = _OPERATIONS.get(10 * properties.major + properties.minor, 0) if nvidia else 0
    rate = 0.7 * operations * properties.multi_processor_count * 1e3 * getattr(properties, "clock_rate", 0)
    if not bandwidth or not rate:
        return 0.0, 0.0, ()
    # 64 bytes a clock and multiprocessor by NVIDIA's documents, of which an H100 reached 0.4
    l2 = 0.4 * 64 * properties.multi_processor_count * 1e3 * properties.clock_rate
    return bandwidth, l2, (("bf16", rate), ("fp16", rate), ("fp32", rate / 2))


@cache
def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return ""
