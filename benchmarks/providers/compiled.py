"""torch.compile in its modes, with and without freezing."""

from __future__ import annotations

import torch

from benchmarks.case import Call, Case, Subject
from benchmarks.providers.base import Provider, converted


class Compiled(Provider):
    def __init__(
        self,
        name: str,
        mode: str,
        *levels: str,
        freezing: bool = False,
        quick: tuple[str, ...] = (),
    ):
        self.name = name
        self.mode = mode
        self.freezing = freezing
        self.quick = bool(quick)
        self.quick_levels = frozenset(quick)
        self.levels = frozenset(levels)
        # Both modes bring CUDA graphs of their own.
        self.capturable = mode == "default"

    def takes_part(self, case: Case, size: str) -> bool:
        # On a CPU compiling a training step takes minutes.
        if size == "quick" and case.level == "training" and case.device.type == "cpu":
            return False
        return super().takes_part(case, size)

    def skip(self, case: Case) -> str:
        if case.device.type == "cpu" and self.mode == "reduce-overhead":
            return "CUDA graphs are all that this mode adds"
        return ""

    def build(self, subject: Subject, case: Case) -> Call:
        # Options instead of a mode: dynamo tells compilations of the same code apart by them.
        options = dict(torch._inductor.list_mode_options(self.mode))
        if self.freezing:
            options["freezing"] = True
        module = converted(subject, case)
        if hasattr(module, "body"):  # ops with gradients, training steps: what surrounds the body stays eager
            module.body = torch.compile(module.body, dynamic=False, options=options)
            return module
        return torch.compile(module, dynamic=False, options=options)


INFERENCE = ("layer", "fused", "block", "model")
PROVIDERS = [
    Compiled("compile", "default", "op", *INFERENCE, "training", quick=("op", "training")),
    Compiled("compile freezing", "default", *INFERENCE, freezing=True, quick=("block", "model")),
    Compiled("compile reduce-overhead", "reduce-overhead", "model", quick=("model",)),
    Compiled("compile reduce-overhead freezing", "reduce-overhead", "model", freezing=True, quick=("model",)),
    Compiled("compile max-autotune", "max-autotune", "model"),
    Compiled("compile max-autotune freezing", "max-autotune", "block", "model", freezing=True),
]
