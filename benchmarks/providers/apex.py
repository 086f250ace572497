"""apex.contrib.bottleneck: cuDNN's fused bottleneck, fp16, frozen BN, stride on the first convolution."""

from __future__ import annotations

import torch

from benchmarks.case import Call, Case, Subject
from benchmarks.providers.base import Provider, folded
from benchmarks.providers.missing import missing


class Apex(Provider):
    name = "apex bottleneck"
    levels = frozenset(("block",))

    def skip(self, case: Case) -> str:
        if case.device.type != "cuda":
            return "needs a CUDA GPU"
        if case.dtype != torch.float16:
            return f"takes fp16, not {case.dtype}"
        return missing("apex.contrib.bottleneck")

    def build(self, subject: Subject, case: Case) -> Call:
        from apex.contrib.bottleneck import Bottleneck

        block = subject.module
        if not hasattr(block, "conv3") or block.stride != 1 or block.conv2.groups != 1:
            raise NotImplementedError("it knows bottlenecks of stride 1 without groups (its stride is v1's)")
        ours = folded(subject, case)
        theirs = Bottleneck(
            block.conv1.in_channels,
            block.conv1.out_channels,
            block.conv3.out_channels,
            use_cudnn=True,
            explicit_nhwc=False,
        )
        theirs = theirs.to(case.device, case.dtype).to(memory_format=torch.channels_last).eval()
        convs = ["conv1", "conv2", "conv3"]
        pairs = [(getattr(theirs, name), getattr(ours, name)) for name in convs]
        norms = [getattr(theirs, name.replace("conv", "bn")) for name in convs]
        if block.downsample is not None:
            pairs.append((theirs.downsample[0], ours.downsample[0]))
            norms.append(theirs.downsample[1])
        for (own, given), norm in zip(pairs, norms, strict=True):
            own.weight.data.copy_(given.weight)
            # Its frozen BN has no eps: with these buffers it is the folded bias alone.
            norm.weight.fill_(1), norm.running_mean.zero_(), norm.running_var.fill_(1)
            norm.bias.copy_(given.bias)
        return theirs


PROVIDERS = [Apex()]
