"""The steps of a plan: what runs one segment, or brings a value into form, on the values of a context."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastres.graph.evaluate import cast_node, evaluate_node
from fastres.plan.candidate import Buffers
from fastres.plan.planner import Plan, Segment
from fastres.plan.specs import Info, Unplannable, autocast

if TYPE_CHECKING:
    from fastres.plan.context import Context


def on_device(device: torch.device):
    """A context with `device` current: Triton launches on the current device, wherever its arguments lie."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# Values are kept in a plain list; a step is a callable that reads and writes it.
Values = list
Step = Callable[[Values], None]


class CandidateFailed(RuntimeError):
    """A candidate raised while it was bound or launched."""

    def __init__(self, segment: Segment, error: Exception):
        super().__init__(f"{segment.candidate.name} on {segment.problem}: {type(error).__name__}: {error}")
        self.segment, self.error = segment, error


def nhwc_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a dense channels_last tensor [N, C, H, W], or of a row-major [N, C]."""
    if len(shape) != 4:
        return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    _, c, h, w = shape
    return (c * h * w, 1, w * c, c)


class Convert:
    """Brings a value of the user's (or an opaque call's) making into dense channels_last in the compute type; with
    `planar`, a contiguous value keeps its order."""

    segment = None

    def __init__(self, value: int, place: int, dtype: torch.dtype, planar: bool = False):
        self.value, self.place, self.dtype, self.planar = value, place, dtype, planar

    def __call__(self, values: Values) -> None:
        values[self.place] = as_activation(values[self.value], self.dtype, self.planar)


class Evaluate:
    """A node that no kernel takes: PyTorch's own call, under autocast where the compute type is narrower than the
    parameters', with parameters cast where it is wider."""

    def __init__(self, segment: Segment, plan: Plan, device: torch.device, deaths: list[int]):
        self.segment, self.deaths = segment, deaths
        self.dtype, self.device, self.autocast = plan.dtype, device, plan.shapes.autocast
        (node,) = segment.nodes
        self.node = node
        self.cast = not self.autocast and cast_node(node, plan.dtype) is not node
        self.expected = plan.shapes.values[node.output]

    def __call__(self, values: Values) -> None:
        node = cast_node(self.node, self.dtype) if self.cast else self.node
        with autocast(self.device.type, self.dtype, self.autocast):
            made = evaluate_node(node, values)
        expected = self.expected
        if isinstance(expected, Info) and (not isinstance(made, Tensor) or made.shape != expected.shape):
            got = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise Unplannable(f"{self.node.name}: it returned {got}, planned was {expected.shape}")
        values[self.node.output] = made
        for value in self.deaths:
            values[value] = None


class Allocating:
    def __init__(
        self, segment: Segment, context: Context, index: int, reads: dict[str, int], deaths: list[int]
    ):
        # not the context itself: a cycle would hold its memory until the next garbage collection
        self.segment, self.constants, self.deaths = segment, context.constants, deaths
        self.reads = tuple(reads.values())
        self.writes = tuple(value for _, value in segment.match.outputs)
        self.donated = context.donated(segment, index)
        self.launch = None

    def __call__(self, values: Values) -> None:
        try:
            if self.launch is None:
                self.launch = self._bind()
            made = self.launch(*[values[v] for v in self.reads])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise CandidateFailed(self.segment, error) from error
        if len(self.writes) == 1:
            values[self.writes[0]] = made
        else:
            for value, tensor in zip(self.writes, made, strict=True):
                values[value] = tensor
        for value in self.deaths:
            values[value] = None

    def _bind(self):
        segment = self.segment
        constants = self.constants.get(segment)
        return segment.candidate.bind(
            segment.problem, segment.cost.config, Buffers({}, donated=self.donated), constants
        )


class Writing:
    def __init__(
        self, segment: Segment, context: Context, index: int, reads: dict[str, int], deaths: list[int]
    ):
        self.segment, self.constants, self.reads, self.deaths = segment, context.constants, reads, deaths
        self.counters, self.workspace = context._counter_views[id(segment)], context._scratch(segment)
        self.outputs = {role: context.buffers[value] for role, value in segment.match.outputs}
        self.writes = tuple((value, context.buffers[value]) for _, value in segment.match.outputs)
        self.dynamic = tuple(v for v in reads.values() if v not in context.buffers)
        self.donated = context.donated(segment, index)
        self.launch = None
        self.memory: list[tuple] = []

    def __call__(self, values: Values) -> None:
        try:
            # the same address may hold a tensor of another order
            memory = [(values[v].data_ptr(), values[v].stride()) for v in self.dynamic]
            if self.launch is None or memory != self.memory:
                self.launch, self.memory = self._bind(values), memory
            self.launch()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise CandidateFailed(self.segment, error) from error
        for value, tensor in self.writes:
            values[value] = tensor
        for value in self.deaths:
            values[value] = None

    def _bind(self, values: Values):
        segment = self.segment
        inputs = {name: values[place] for name, place in self.reads.items()}
        buffers = Buffers(inputs | self.outputs, self.counters, self.workspace, self.donated)
        return segment.candidate.bind(
            segment.problem, segment.cost.config, buffers, self.constants.get(segment)
        )


class Bound:
    """A launch, or several joined ones, on fixed memory."""

    def __init__(self, segments: list[Segment], launch):
        self.segments, self.launch = segments, launch

    def __call__(self, values: Values) -> None:
        try:
            self.launch()
        except Exception as error:
            # joined launches say which of them it was
            failed = self.segments[getattr(error, "index", 0)]
            raise CandidateFailed(failed, error) from error


def join(steps: list[Step]) -> list[Step]:
    """Bound steps for all that read and write fixed memory; runs of launches with the same `join` become one."""
    made: list[Step] = []
    for step in steps:
        if not isinstance(step, Writing) or step.dynamic:
            made.append(step)
            continue
        wanted = getattr(step.launch, "join", None)
        before = made[-1] if made else None
        if wanted is not None and isinstance(before, _Joinable) and before.join is wanted:
            before.add(step)
        elif wanted is not None:
            made.append(_Joinable(step, wanted))
        else:
            made.append(Bound([step.segment], step.launch))
    return [step.joined() if isinstance(step, _Joinable) else step for step in made]


class _Joinable:
    def __init__(self, step: Writing, join):
        self.join, self.segments, self.launches = join, [step.segment], [step.launch]

    def add(self, step: Writing) -> None:
        self.segments.append(step.segment)
        self.launches.append(step.launch)

    def joined(self) -> Bound:
        single = len(self.launches) == 1
        return Bound(self.segments, self.launches[0] if single else self.join(self.launches))


def activation_strides(x: Tensor, planar: bool) -> tuple[int, ...]:
    """The strides in which a kernel takes x: its own where it is contiguous and that is taken, else `nhwc_strides`."""
    shape = tuple(x.shape)
    row_major = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return row_major if planar and x.stride() == row_major else nhwc_strides(shape)


def as_activation(x: Tensor, dtype: torch.dtype, planar: bool = False) -> Tensor:
    """x in `dtype`, dense in channels_last (4 dimensions) or row-major strides; `planar`: contiguous is taken too."""
    wanted = activation_strides(x, planar)
    # Kernels are promised 16-byte alignment, which a view that starts anywhere need not have.
    if x.dtype == dtype and x.stride() == wanted and x.data_ptr() % 16 == 0:
        return x
    made = torch.empty_strided(x.shape, wanted, dtype=dtype, device=x.device)
    return made.copy_(x)
