"""The machine at hand as a `Target`, and machines on paper."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import cache

import torch

from fastres.plan.problem import Target

# Copy bandwidth (read + written) and matmul rates. H100: measured on an H100 80GB HBM3 (torch 2.11, CUDA 13.0); the
# floors use 3.0 TB/s and 750 TFLOP/s. A100: NVIDIA's data sheet, not measured.
_RATES = {
    "H100": (3.0e12, (("bf16", 7.5e14), ("fp16", 7.5e14), ("fp32", 3.5e14))),
    "A100": (1.4e12, (("bf16", 3.12e14), ("fp16", 3.12e14), ("fp32", 1.56e14))),
}
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
    arch = f"sm{properties.major}{properties.minor}"
    rates = next((rates for name, rates in _RATES.items() if name in properties.name), (0.0, ()))
    return Target(
        "cuda", arch, properties.name, properties.multi_processor_count, *rates, triton=triton_version()
    )


@cache
def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return ""
