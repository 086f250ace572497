"""Whole networks on photographs: throughput, latency, first call, peak memory."""

from __future__ import annotations

import copy
from functools import lru_cache

import torch
from torch import nn

from benchmarks.case import Case, Subject, to_device
from benchmarks.scope import Scope
from benchmarks.shapes import NETWORKS, parts
from fastres.bench.calibrate import calibrate_bn
from fastres.bench.models import load_model
from fastres.bench.photographs import photographs

CALIBRATION_IMAGES = 32


def cases(scope: Scope) -> list[Case]:
    networks = scope.networks or scope.pick(
        smoke=("resnet18",), quick=("resnet50", "resnet18"), cuda_quick=("resnet50",), full=NETWORKS
    )
    batches = scope.batches or scope.pick(
        smoke=(2,), quick=(8, 1), cuda_quick=(256, 1), full=(8, 1), cuda_full=(256, 1, 32, 8, 128)
    )
    return [
        case(network, n, scope.image, dtype, scope.device)
        for network in networks
        for dtype in scope.dtypes
        for n in batches
        # On a GPU kernels are compiled for every type and batch: a second 16-bit type once.
        if not (scope.cuda and scope.size == "quick" and dtype != scope.dtypes[0] and n != batches[0])
    ]


def case(network: str, n: int, image: int, dtype: torch.dtype, device: torch.device) -> Case:
    def make() -> Subject:
        # A copy: what is prepared for a module in one case shall not shorten a first call in another.
        module = copy.deepcopy(_network(network, image, device))
        x = photographs(n, size=image).to(device, dtype).contiguous(memory_format=torch.channels_last)
        return Subject(module, (x,))

    return Case(
        "model",
        network,
        f"n{n} {network} @{image}x{image}",
        n,
        dtype,
        device,
        parts(network, n, dtype, image),
        make,
        model=network,
        clock="call",
    )


@lru_cache(maxsize=1)
def _network(name: str, image: int, device: torch.device) -> nn.Module:
    """The same for every batch and dtype, which follow each other."""
    module = to_device(load_model(name), device)
    return calibrate_bn(module, photographs(CALIBRATION_IMAGES, size=image).to(device))
