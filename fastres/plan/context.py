"""An execution context: a plan bound to memory on one device, for one stream, used by one caller at a time."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastres.graph.evaluate import evaluate_node
from fastres.graph.ir import Node, map_refs
from fastres.plan.arena import ALIGNMENT, Life, layout
from fastres.plan.candidate import Buffers
from fastres.plan.constants import Constants
from fastres.plan.planner import Plan, Segment
from fastres.plan.specs import Info

log = logging.getLogger("fastres")

# Values are kept in a plain list; a step is a callable that reads and writes it.
Values = list
Step = Callable[[Values], None]


class CandidateFailed(RuntimeError):
    """A candidate raised while it was bound or launched."""

    def __init__(self, segment: Segment, error: Exception):
        super().__init__(f"{segment.candidate.name} on {segment.problem}: {type(error).__name__}: {error}")
        self.segment, self.error = segment, error


class Context:
    """Runs one plan. `run(inputs)` returns the graph's outputs in fresh memory.

    Writing candidates get buffers of an arena planned by liveness; allocating candidates and opaque calls bring their
    own memory, and whoever reads it is bound again when its address has changed.
    """

    def __init__(self, plan: Plan, constants: Constants, device: torch.device, static_inputs: bool):
        self.plan, self.constants, self.device = plan, constants, device
        self.static_inputs = static_inputs
        self.generation = constants.generation
        self.graph: torch.cuda.CUDAGraph | None = None
        self.graph_refused = ""
        self._graph_bytes = 0
        self.runs = 0
        self._count = 1 + max(plan.shapes.values, default=0)
        self._allocate()
        self._steps = self._unjoined = self._build()
        self._joined = False
        self.values: Values = [None] * self._count

    # -- memory ------------------------------------------------------------------------------------------------------

    def _allocate(self) -> None:
        plan = self.plan
        first, last, self._pinned = _lifetimes(plan)
        sizes: dict[int, int] = {}
        for segment in plan.segments:
            if segment.candidate is not None and not segment.candidate.allocates:
                for role, value in segment.match.outputs:
                    sizes[value] = (
                        math.prod(segment.problem.output_shape(role)) * segment.problem.dtype.itemsize
                    )
        offsets, total = layout([Life(v, size, first[v], last[v]) for v, size in sizes.items()])
        writers = [s for s in plan.segments if s.candidate is not None and not s.candidate.allocates]
        counters = [s.candidate.counters(s.problem, s.cost.config) for s in writers]
        scratch = max((s.candidate.workspace(s.problem, s.cost.config) for s in writers), default=0)
        with torch.inference_mode(False):
            self.arena = torch.empty(total, dtype=torch.uint8, device=self.device)
            self.workspace = torch.empty(scratch, dtype=torch.uint8, device=self.device) if scratch else None
            self.counters = torch.zeros(sum(map(_padded, counters)), dtype=torch.int32, device=self.device)
        self._counter_views = {}
        at = 0
        for segment, count in zip(writers, counters, strict=True):
            self._counter_views[id(segment)] = self.counters[at : at + count] if count else None
            at += _padded(count)
        self.buffers: dict[int, Tensor] = {}
        for value, offset in offsets.items():
            info: Info = plan.shapes.values[value]
            piece = self.arena[offset : offset + sizes[value]].view(info.dtype)
            self.buffers[value] = piece.as_strided(info.shape, nhwc_strides(info.shape))

    @property
    def memory(self) -> int:
        """Bytes that the context holds."""
        return (
            self.arena.numel()
            + self._graph_bytes
            + 4 * self.counters.numel()
            + (0 if self.workspace is None else self.workspace.numel())
        )

    # -- steps -------------------------------------------------------------------------------------------------------

    def _build(self) -> list[Step]:
        plan = self.plan
        # values that a kernel may read as they are: dense channels_last in the compute type
        ready = {v for s in plan.segments if s.candidate is not None for _, v in s.match.outputs}
        lasting = {*plan.graph.inputs, *self.buffers}
        deaths = [tuple(v for v in dead if v not in lasting) for dead in _deaths(plan)]
        steps: list[Step] = []
        for index, segment in enumerate(plan.segments):
            if segment.candidate is None:
                steps.append(_EvaluateStep(segment, plan.dtype, self.device, deaths[index]))
                continue
            for name, value in segment.match.inputs:
                if value not in ready:
                    steps.append(_ConvertStep(value, segment.problem.input_dtype(name)))
                    ready.add(value)
            if segment.candidate.allocates:
                steps.append(_AllocatingStep(segment, self, index, deaths[index]))
            else:
                steps.append(_WritingStep(segment, self, index, deaths[index]))
        return steps

    def donated(self, segment: Segment, index: int) -> frozenset[str]:
        """Names of the segment's inputs that die with it and that nothing else can see."""
        last = self._last_of(index)
        reads = [value for _, value in segment.match.inputs]
        return frozenset(
            name
            for name, value in segment.match.inputs
            if value in last and value not in self._pinned and reads.count(value) == 1
        )

    def _last_of(self, index: int) -> set[int]:
        return set(_deaths(self.plan)[index]) - set(self.plan.graph.inputs)

    # -- running -----------------------------------------------------------------------------------------------------

    def run(self, inputs: tuple[Any, ...]) -> Any:
        """The graph's outputs for `inputs` (tensors of the shapes that the plan is for)."""
        self._set(inputs)
        if self.graph is not None:
            self.graph.replay()
        else:
            self._execute(self.values)
        self.runs += 1
        results = self.results()
        if not self.static_inputs:
            for value in self.plan.graph.inputs:
                self.values[value] = None
        return results

    def _set(self, inputs: tuple[Any, ...]) -> None:
        values = self.values
        for value, x in zip(self.plan.graph.inputs, inputs, strict=True):
            if self.static_inputs and isinstance(x, Tensor):
                held = values[value]
                if held is None:
                    held = values[value] = _input_buffer(x, self._input_dtype(x), self.device)
                held.copy_(x)
            else:
                values[value] = x

    def observe(self, inputs: tuple[Any, ...]) -> Iterator[Segment | None]:
        """Runs step by step, and yields after each: its segment, or None after a step that only brings a value into
        form. `values` then holds what the step wrote."""
        self._set(inputs)
        if self.counters.numel():
            self.counters.zero_()
        for step in self._unjoined:
            step(self.values)
            yield step.segment

    def results(self) -> Any:
        """The outputs of the last run, in memory of their own."""
        outputs = map_refs(lambda ref: self.values[ref.value], self.plan.graph.outputs)
        mine = {self.arena.untyped_storage().data_ptr()} if self.arena.numel() else set()
        mine |= {b.untyped_storage().data_ptr() for b in self.input_buffers()}
        return _own(outputs, mine, everything=self.graph is not None)

    def input_buffers(self) -> list[Tensor]:
        if not self.static_inputs:
            return []
        return [v for i in self.plan.graph.inputs if isinstance(v := self.values[i], Tensor)]

    def _input_dtype(self, x: Tensor) -> torch.dtype:
        return self.plan.dtype if x.dtype.is_floating_point else x.dtype

    def _execute(self, values: Values) -> None:
        if self.counters.numel():
            self.counters.zero_()
        for step in self._steps:
            step(values)
        if not self._joined:
            # everything is bound now: what reads and writes fixed memory becomes a bare launch
            self._steps, self._joined = _join(self._steps), True

    def capture(self) -> None:
        """Captures the next runs as one CUDA graph. The context has run before, so that everything is compiled."""
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.memory_reserved(self.device)
        with torch.cuda.device(self.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._execute(self.values)
        self.graph = graph
        # the graph's own pool: what allocating candidates and opaque calls return
        self._graph_bytes = max(0, torch.cuda.memory_reserved(self.device) - before)


def nhwc_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a dense channels_last tensor [N, C, H, W], or of a row-major [N, C]."""
    if len(shape) != 4:
        return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    n, c, h, w = shape
    return (c * h * w, 1, w * c, c)


class _ConvertStep:
    """Brings a value of the user's (or an opaque call's) making into dense channels_last in the compute type."""

    segment = None

    def __init__(self, value: int, dtype: torch.dtype):
        self.value, self.dtype = value, dtype

    def __call__(self, values: Values) -> None:
        values[self.value] = as_activation(values[self.value], self.dtype)


class _EvaluateStep:
    """A node that no kernel takes: PyTorch's own call, under autocast where the compute type is narrower."""

    def __init__(self, segment: Segment, dtype: torch.dtype, device: torch.device, deaths):
        self.segment, self.node, self.deaths = segment, segment.nodes[0], deaths
        self.dtype, self.device = dtype, device
        self.autocast = dtype in (torch.bfloat16, torch.float16) and _has_wider_parameters(self.node, dtype)

    def __call__(self, values: Values) -> None:
        with torch.autocast(self.device.type, self.dtype, enabled=self.autocast, cache_enabled=False):
            values[self.node.output] = evaluate_node(self.node, values)
        for value in self.deaths:
            values[value] = None


class _AllocatingStep:
    def __init__(self, segment: Segment, context: Context, index: int, deaths):
        self.segment, self.context, self.deaths = segment, context, deaths
        self.reads = tuple(value for _, value in segment.match.inputs)
        self.writes = tuple(value for _, value in segment.match.outputs)
        self.donated = context.donated(segment, index)
        self.launch = None

    def __call__(self, values: Values) -> None:
        try:
            if self.launch is None:
                self.launch = self._bind()
            made = self.launch(*[values[v] for v in self.reads])
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
        constants = self.context.constants.get(segment)
        return segment.candidate.bind(
            segment.problem, segment.cost.config, Buffers({}, donated=self.donated), constants
        )


class _WritingStep:
    def __init__(self, segment: Segment, context: Context, index: int, deaths):
        self.segment, self.context, self.deaths = segment, context, deaths
        self.outputs = {role: context.buffers[value] for role, value in segment.match.outputs}
        self.writes = tuple((value, context.buffers[value]) for _, value in segment.match.outputs)
        self.dynamic = tuple(v for _, v in segment.match.inputs if v not in context.buffers)
        self.donated = context.donated(segment, index)
        self.launch = None
        self.pointers: list[int] = []

    def __call__(self, values: Values) -> None:
        try:
            pointers = [values[v].data_ptr() for v in self.dynamic]
            if self.launch is None or pointers != self.pointers:
                self.launch, self.pointers = self._bind(values), pointers
            self.launch()
        except Exception as error:
            raise CandidateFailed(self.segment, error) from error
        for value, tensor in self.writes:
            values[value] = tensor
        for value in self.deaths:
            values[value] = None

    def _bind(self, values: Values):
        segment, context = self.segment, self.context
        inputs = {name: values[value] for name, value in segment.match.inputs}
        buffers = Buffers(
            inputs | self.outputs, context._counter_views[id(segment)], context.workspace, self.donated
        )
        return segment.candidate.bind(
            segment.problem, segment.cost.config, buffers, context.constants.get(segment)
        )


class _BoundStep:
    """A launch, or several joined ones, on fixed memory."""

    def __init__(self, segments: list[Segment], launch):
        self.segments, self.launch = segments, launch

    def __call__(self, values: Values) -> None:
        try:
            self.launch()
        except Exception as error:
            raise CandidateFailed(self.segments[0], error) from error


def _join(steps: list[Step]) -> list[Step]:
    """Bound steps for all that read and write fixed memory; runs of launches with the same `join` become one."""
    made: list[Step] = []
    for step in steps:
        if not isinstance(step, _WritingStep) or step.dynamic:
            made.append(step)
            continue
        join = getattr(step.launch, "join", None)
        before = made[-1] if made else None
        if join is not None and isinstance(before, _Joinable) and before.join is join:
            before.add(step)
        elif join is not None:
            made.append(_Joinable(step, join))
        else:
            made.append(_BoundStep([step.segment], step.launch))
    return [step.joined() if isinstance(step, _Joinable) else step for step in made]


class _Joinable:
    def __init__(self, step: _WritingStep, join):
        self.join, self.segments, self.launches = join, [step.segment], [step.launch]

    def add(self, step: _WritingStep) -> None:
        self.segments.append(step.segment)
        self.launches.append(step.launch)

    def joined(self) -> _BoundStep:
        single = len(self.launches) == 1
        return _BoundStep(self.segments, self.launches[0] if single else self.join(self.launches))


def as_activation(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, dense in channels_last (4 dimensions) or row-major strides."""
    wanted = nhwc_strides(tuple(x.shape))
    if x.dtype == dtype and x.stride() == wanted:
        return x
    made = torch.empty_strided(x.shape, wanted, dtype=dtype, device=x.device)
    return made.copy_(x)


def _input_buffer(x: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.empty_strided(x.shape, nhwc_strides(tuple(x.shape)), dtype=dtype, device=device)


def _own(tree: Any, mine: set[int], everything: bool) -> Any:
    if isinstance(tree, Tensor):
        shared = everything or (mine and tree.untyped_storage().data_ptr() in mine)
        return tree.clone() if shared else tree
    if isinstance(tree, tuple):
        items = [_own(item, mine, everything) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    if isinstance(tree, list):
        return [_own(item, mine, everything) for item in tree]
    if isinstance(tree, dict):
        made = {key: _own(item, mine, everything) for key, item in tree.items()}
        return made if type(tree) is dict else type(tree)(made)
    return tree


def _has_wider_parameters(node: Node, dtype: torch.dtype) -> bool:
    module = getattr(node, "conv", None) or getattr(node, "linear", None) or getattr(node, "call", None)
    if isinstance(module, torch.nn.Module):
        return any(p.dtype != dtype for p in module.parameters())
    # a function may read parameters as attributes: autocast leaves alone what is narrow already
    return True


def _padded(count: int) -> int:
    """Counters of different kernels never share a cache line."""
    return -(-count * 4 // ALIGNMENT) * ALIGNMENT // 4


def _lifetimes(plan: Plan) -> tuple[dict[int, int], dict[int, int], set[int]]:
    """(first step, last step) of every value, and the values that an opaque call reads: it may keep a view of them."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    pinned: set[int] = set(plan.graph.output_values)
    end = len(plan.segments)
    for index, segment in enumerate(plan.segments):
        for node in segment.nodes:
            first[node.output] = index
            last.setdefault(node.output, index)
            for value in node.inputs:
                last[value] = index
        if segment.candidate is None:
            pinned.update(segment.nodes[0].inputs)
            pinned.add(segment.nodes[0].output)
    for value in pinned:
        last[value] = end
    return first, last, pinned


def _deaths(plan: Plan) -> list[tuple[int, ...]]:
    """For each segment, the values that nobody reads after it (graph outputs never die)."""
    kept = set(plan.graph.output_values)
    seen: set[int] = set()
    made: list[tuple[int, ...]] = []
    for segment in reversed(plan.segments):
        now = {v for node in segment.nodes for v in (*node.inputs, node.output)} - kept - seen
        seen |= now
        made.append(tuple(now))
    return made[::-1]
