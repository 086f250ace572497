"""Eager PyTorch: as it comes, in channels_last, under a CUDA graph, with BN folded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.case import Call, Case, Subject
from benchmarks.providers.base import Provider, converted, folded
from fastres.bench.timing import capture


class EagerNCHW(Provider):
    name = "eager NCHW"
    levels = frozenset(("layer", "block", "model", "training"))

    def inputs(self, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x.contiguous() for x in given)

    def build(self, subject: Subject, case: Case) -> Call:
        return converted(subject, case, torch.contiguous_format)


class EagerChannelsLast(Provider):
    name = "eager channels_last"
    levels = frozenset(("op", "layer", "fused", "block", "model", "training", "host"))

    def build(self, subject: Subject, case: Case) -> Call:
        return converted(subject, case)


class Folded(Provider):
    name = "folded"
    levels = frozenset(("layer", "fused", "block", "model"))

    def build(self, subject: Subject, case: Case) -> Call:
        return folded(subject, case)


class Graphed(Provider):
    """A provider's call under a CUDA graph. The input is copied into the graph's own, which counts."""

    levels = frozenset(("model",))

    def __init__(self, name: str, make: Callable[[Subject, Case], nn.Module | Call]):
        self.name = name
        self.make = make

    def skip(self, case: Case) -> str:
        return "" if case.device.type == "cuda" else "needs a CUDA GPU"

    def build(self, subject: Subject, case: Case) -> Call:
        return graphed(self.make(subject, case), subject.inputs)


def graphed(call: Call, inputs: tuple[Tensor, ...]) -> Call:
    """`call` captured into a CUDA graph for inputs like these: copies the inputs in, replays."""
    static = tuple(x.clone() for x in inputs)
    replay = capture([lambda: call(*static)])
    (result,) = replay.kept

    def run(*given: Tensor):
        for own, x in zip(static, given, strict=True):
            own.copy_(x)
        replay()
        return result

    return run


PROVIDERS = [
    EagerChannelsLast(),
    EagerNCHW(),
    Graphed("eager channels_last + graph", converted),
    Folded(),
    Graphed("folded + graph", folded),
]
