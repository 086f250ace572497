"""What a provider is, and what several of them need."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from benchmarks.case import Call, Case, Entry, Subject
from benchmarks.scope import Scope


class Provider:
    """One way to run a module in inference.

    Attributes:
        name: in tables and files.
        levels: where it takes part.
        capturable: its call may be captured into a CUDA graph from outside.
        compiles: its first call may take minutes.
    """

    name = ""
    levels: frozenset[str] = frozenset(("layer", "fused", "block", "model"))
    capturable = True
    compiles = False

    def takes_part(self, case: Case, scope: Scope) -> bool:
        """Whether it is listed at `case` in a run of `scope`."""
        return case.level in self.levels and (scope.size == "full" or self.brief(case, scope))

    def brief(self, case: Case, scope: Scope) -> bool:
        """Whether it is listed in a quick or a smoke run: not where its first calls would take minutes."""
        return True

    def skip(self, case: Case) -> str:
        """Why it cannot run `case`, or an empty string."""
        return ""

    def build(self, subject: Subject, case: Case) -> Call:
        """The call for `subject`. It must leave the subject's module as it is."""
        raise NotImplementedError

    def inputs(self, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The inputs in the form that this provider wants its users to have them in; not timed."""
        return given

    def entry(self, case: Case) -> Entry:
        skip = self.skip(case)
        if skip:
            return Entry(self.name, skip=skip)
        return Entry(
            self.name,
            lambda s: self.build(s, case),
            self.inputs,
            capturable=self.capturable,
            compiles=self.compiles,
        )


class Runtime(Provider):
    """Another program that a module is exported to; it takes its time, so a quick run has networks alone."""

    levels = frozenset(("block", "model"))
    capturable = False
    compiles = True

    def brief(self, case: Case, scope: Scope) -> bool:
        return scope.size == "quick" and case.level == "model"


def converted(
    subject: Subject, case: Case, memory_format: torch.memory_format = torch.channels_last
) -> nn.Module:
    """A copy of the subject's module in a memory format, and in the case's dtype unless it keeps its own."""
    module = copy.deepcopy(subject.module).to(memory_format=memory_format)
    return module if subject.keeps_dtype else module.to(case.dtype)


def folded(subject: Subject, case: Case) -> nn.Module:
    """A copy with every BN folded into the convolution before it (in fp32, rounded after), channels_last."""
    module = copy.deepcopy(subject.module)
    for conv_name, bn_name in conv_bn_pairs(module):
        conv, bn = module.get_submodule(conv_name), module.get_submodule(bn_name)
        _replace(module, conv_name, fuse_conv_bn_eval(conv, bn))
        _replace(module, bn_name, nn.Identity())
    return module.to(dtype=case.dtype, memory_format=torch.channels_last).requires_grad_(False)


def conv_bn_pairs(module: nn.Module) -> list[tuple[str, str]]:
    """Names of every convolution and of the BN that alone reads it, by fx."""
    from fastres.graph.capture import capture
    from fastres.graph.ir import Conv

    return [(n.name, n.bn_name) for n in capture(module).nodes if isinstance(n, Conv) and n.bn is not None]


def _replace(root: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, new)
