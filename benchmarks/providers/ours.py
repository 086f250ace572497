"""fastres: the plan, each backend alone, and the drop-in blocks in a network of someone else's."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from benchmarks.case import Call, Case, Subject
from benchmarks.providers.base import Provider
from benchmarks.scope import Scope
from fastres.plan.context import Context
from fastres.plan.planner import NoCandidate

BACKENDS = {
    "reference": ("cpu", "cuda"),
    "onednn": ("cpu",),
    "cpu": ("cpu",),
    "cudnn": ("cuda",),
    "triton": ("cuda",),
    "hopper": ("cuda",),
    "cuda": ("cuda",),
}


class Plan(Provider):
    """`fastres.accelerate(module)`; at the op level the public op."""

    levels = frozenset(("op", "layer", "fused", "block", "model", "training", "host"))

    def __init__(self, backend: str = "auto"):
        self.backend = backend
        self.name = "fastres" if backend == "auto" else f"fastres {backend}"
        if backend != "auto":
            self.levels = frozenset(("layer", "fused", "model"))

    def brief(self, case: Case, scope: Scope) -> bool:
        if self.backend == "auto":
            return True
        # A network of one backend's kernels alone is compiled anew, and hardly differs from the plan.
        return scope.size == "quick" and self.backend != "reference" and case.level == "fused"

    def skip(self, case: Case) -> str:
        if self.backend != "auto" and case.device.type not in BACKENDS[self.backend]:
            return f"the {self.backend} backend does not run on {case.device.type}"
        return ""

    def build(self, subject: Subject, case: Case) -> Call:
        import fastres

        if subject.fastres is not None:
            return subject.fastres()
        plan = fastres.accelerate(subject.module, dtype=case.dtype, backend=self.backend)
        if self.backend != "auto":
            self._require_its_own_kernels(plan, subject)
        return (
            kernels_alone(plan, subject.inputs)
            if case.clock == "kernel" and case.device.type == "cuda"
            else plan
        )

    def _require_its_own_kernels(self, plan: torch.nn.Module, subject: Subject) -> None:
        """A backend that has no kernel for the problem leaves it to PyTorch: that is not its time."""
        try:
            plan(*subject.inputs)
        except NoCandidate as error:
            raise NotImplementedError(f"no kernel of its own here: {error}") from error
        report = plan.report(measure=False)
        steps = [row for part in (report, *report.parts) for row in part.rows]
        if any(row.candidate.startswith(f"{self.backend}.") for row in steps):
            return
        reasons = [why for row in steps for name, why in row.others if name.startswith(f"{self.backend}.")]
        raise NotImplementedError(f"no kernel of its own here: {reasons[0] if reasons else 'none covers it'}")


def kernels_alone(plan: torch.nn.Module, inputs: tuple[Tensor, ...]) -> Call:
    """The kernels that `plan` runs on inputs like these, reading the caller's memory, their outputs left where
    they write them: what a network made of such layers runs. A call of `plan` itself copies inputs into a
    graph's memory and outputs out of the arena, which is as much traffic as the layer's own.
    """
    plan(*inputs)  # what fails on this machine has been replaced after it
    engine = plan._fastres.engine
    cover = engine.plan_for(plan.original, inputs)
    context = Context(cover, engine.prepared.constants, inputs[0].device, static_inputs=False)

    def call(*given: Tensor) -> list[Tensor]:
        for _ in context.observe(given):
            pass
        return [context.values[value] for value in cover.graph.output_values]

    return call


class Blocks(Provider):
    """torchvision's ResNet of `fastres.Bottleneck` or `fastres.BasicBlock`: no graph over the network."""

    name = "fastres blocks"
    levels = frozenset(("block", "model", "training"))

    def build(self, subject: Subject, case: Case) -> Call:
        module = copy.deepcopy(subject.module)
        if hasattr(module, "body"):
            module.body = drop_in(module.body)
        else:
            module = drop_in(module)
        module = module.to(memory_format=torch.channels_last)
        return module if subject.keeps_dtype else module.to(case.dtype)


def drop_in(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of a torchvision block or ResNet with every block replaced by fastres's, weights loaded."""
    from torchvision.models import resnet

    import fastres

    ours = {resnet.BasicBlock: fastres.BasicBlock, resnet.Bottleneck: fastres.Bottleneck}

    def replaced(block: torch.nn.Module) -> torch.nn.Module:
        first = block.conv1
        wide = isinstance(block, resnet.Bottleneck)
        groups = block.conv2.groups
        # width = planes * base_width / 64 * groups; with base_width 64 / groups it is planes itself
        planes = block.conv3.out_channels // resnet.Bottleneck.expansion if wide else first.out_channels
        base_width = first.out_channels * 64 // (planes * groups) if wide else 64
        made = ours[type(block)](
            first.in_channels,
            planes,
            block.stride,
            copy.deepcopy(block.downsample),
            groups,
            base_width,
            block.conv2.dilation[0] if wide else 1,
        )
        made.load_state_dict(block.state_dict())
        return made.to(next(block.parameters()).device).train(block.training)

    if type(module) in ours:
        return replaced(module)
    if type(module) is not resnet.ResNet:
        raise NotImplementedError(f"the drop-in blocks replace torchvision's, not {type(module).__name__}")
    module = copy.deepcopy(module)
    for stage in (module.layer1, module.layer2, module.layer3, module.layer4):
        for i, block in enumerate(stage):
            stage[i] = replaced(block)
    return module


PROVIDERS = [Plan(), *(Plan(backend) for backend in BACKENDS), Blocks()]
