"""torch.compile in its modes, with and without freezing."""

from __future__ import annotations

import torch

from benchmarks.case import Call, Case, Subject
from benchmarks.providers.base import Provider, converted
from benchmarks.scope import Scope


class Compiled(Provider):
    compiles = True

    def __init__(
        self,
        name: str,
        mode: str,
        *levels: str,
        freezing: bool = False,
        quick_cpu: tuple[str, ...] = (),
        quick_cuda: tuple[str, ...] = (),
    ):
        self.name = name
        self.mode = mode
        self.freezing = freezing
        self.quick = {"cpu": quick_cpu, "cuda": quick_cuda}
        self.levels = frozenset(levels)
        # Both modes bring CUDA graphs of their own.
        self.capturable = mode == "default"

    def brief(self, case: Case, scope: Scope) -> bool:
        # A network takes it half a minute; on a GPU one 16-bit type is as fast as the other.
        one = not scope.cuda or case.dtype == scope.dtypes[0]
        return scope.size == "quick" and case.level in self.quick[case.device.type] and one

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
    Compiled(
        "compile",
        "default",
        "op",
        *INFERENCE,
        "training",
        quick_cpu=("op", "model"),
        quick_cuda=("training",),
    ),
    Compiled("compile freezing", "default", *INFERENCE, freezing=True, quick_cpu=("block", "model")),
    Compiled("compile reduce-overhead", "reduce-overhead", "model"),
    Compiled(
        "compile reduce-overhead freezing", "reduce-overhead", "model", freezing=True, quick_cuda=("model",)
    ),
    Compiled("compile max-autotune", "max-autotune", "model"),
    Compiled("compile max-autotune freezing", "max-autotune", "block", "model", freezing=True),
]
