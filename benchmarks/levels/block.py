"""Residual blocks: torchvision's BasicBlock and Bottleneck, with and without a projection."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.case import Case, Subject, activations, to_device
from benchmarks.modules import calibrated
from benchmarks.scope import Scope
from benchmarks.shapes import module_parts


def cases(scope: Scope) -> list[Case]:
    batches = scope.batches or scope.pick(
        smoke=(1,), quick=(8,), cuda_quick=(256,), full=(1, 8), cuda_full=(1, 32, 256)
    )
    # name, kind, inplanes, planes, stride, groups, base width, size
    blocks = [
        ("bottleneck 256, stage 1", "Bottleneck", 256, 64, 1, 1, 64, 56),
        ("bottleneck 512/2, stage 2", "Bottleneck", 256, 128, 2, 1, 64, 56),
        ("basic 64, stage 1", "BasicBlock", 64, 64, 1, 1, 64, 56),
        ("bottleneck 1024, stage 3", "Bottleneck", 1024, 256, 1, 1, 64, 14),
        ("bottleneck 2048, stage 4", "Bottleneck", 2048, 512, 1, 1, 64, 7),
        ("basic 128/2, stage 2", "BasicBlock", 64, 128, 2, 1, 64, 56),
        ("ResNeXt 32x4d 256, stage 1", "Bottleneck", 256, 64, 1, 32, 4, 56),
        ("wide 256, stage 1", "Bottleneck", 256, 64, 1, 1, 128, 56),
    ]
    tiny = [("bottleneck 64, small", "Bottleneck", 64, 16, 1, 1, 64, 8)]
    blocks = scope.pick(smoke=tiny, quick=blocks[:3], full=blocks)
    return [
        _case(*block, n, dtype, scope.device)
        for dtype in scope.part_dtypes
        for n in batches
        for block in blocks
    ]


def _block(kind: str, inplanes: int, planes: int, stride: int, groups: int, base_width: int) -> nn.Module:
    from torchvision.models import resnet

    block = getattr(resnet, kind)
    out = planes * block.expansion
    downsample = None
    if stride != 1 or inplanes != out:
        downsample = nn.Sequential(nn.Conv2d(inplanes, out, 1, stride, bias=False), nn.BatchNorm2d(out))
    return block(inplanes, planes, stride, downsample, groups, base_width)


def _case(name, kind, inplanes, planes, stride, groups, base_width, size, n, dtype, device) -> Case:
    arguments = (kind, inplanes, planes, stride, groups, base_width)
    shape = (n, inplanes, size, size)

    def make() -> Subject:
        torch.manual_seed(0)
        x = activations(shape, dtype, device)
        return Subject(calibrated(to_device(_block(*arguments), device), x), (x,))

    return Case(
        "block",
        name,
        f"n{n} {kind} {inplanes}->{planes}/{stride} g{groups} w{base_width} @{size}x{size}",
        n,
        dtype,
        device,
        module_parts(_block(*arguments).eval(), shape, dtype),
        make,
    )
