"""An execution context: a plan bound to memory on one device, for one stream, used by one caller at a time."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastres.graph.ir import Opaque, map_refs
from fastres.plan.arena import ALIGNMENT, Life, layout
from fastres.plan.constants import Constants
from fastres.plan.planner import Plan, Segment
from fastres.plan.specs import Info
from fastres.plan.steps import (
    Allocating,
    Convert,
    Evaluate,
    Step,
    Values,
    Writing,
    activation_strides,
    join,
    nhwc_strides,
    on_device,
)

log = logging.getLogger("fastres")

# A stream records for one capture: what another thread launches into it meanwhile would be part of the graph. So there
# is one capture at a time, on a stream of our own (torch.cuda.graph's default is everybody's).
_capturing = threading.Lock()
_capture_stream = cache(torch.cuda.Stream)


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
        self.graph_refused = _why_no_graph(plan)
        self._graph_bytes = 0
        self.runs = 0
        self._count = 1 + max(plan.shapes.values, default=0)
        self._allocate()
        self._steps = self._unjoined = self._build()
        self._planar = _planar_inputs(plan)
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
        scratch = max(map(_workspace, writers), default=0)
        with torch.inference_mode(False):
            self.arena = _block(total, self.device)
            self.workspace = _block(scratch, self.device) if scratch else None
            self.counters = _block(4 * sum(map(_padded, counters)), self.device).view(torch.int32).zero_()
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

    def _scratch(self, segment: Segment) -> Tensor | None:
        """The part of the common workspace that the segment asked for."""
        size = _workspace(segment)
        return self.workspace[:size] if size else None

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
        deaths = [[v for v in dead if v not in lasting] for dead in _deaths(plan)]
        # other values are brought into form for kernels, in a place of their own: opaque calls read them as they came
        places: dict[tuple[int, torch.dtype, bool], int] = {}
        last_use: dict[int, int] = {}
        steps: list[Step] = []
        for index, segment in enumerate(plan.segments):
            if segment.candidate is None:
                steps.append(Evaluate(segment, plan, self.device, deaths[index]))
                # the call may have changed what it read
                read = set(segment.nodes[0].inputs)
                places = {key: place for key, place in places.items() if key[0] not in read}
                continue
            reads: dict[str, int] = {}
            planar = segment.candidate.planar(segment.problem)
            for name, value in segment.match.inputs:
                if value in ready:
                    reads[name] = value
                    continue
                form = value, segment.problem.input_dtype(name), name in planar
                if form not in places:
                    places[form] = self._count
                    steps.append(Convert(value, self._count, *form[1:]))
                    self._count += 1
                reads[name] = places[form]
                last_use[reads[name]] = index
            make = Allocating if segment.candidate.allocates else Writing
            steps.append(make(segment, self, index, reads, deaths[index]))
        for place, index in last_use.items():
            deaths[index].append(place)
        return steps

    def donated(self, segment: Segment, index: int) -> frozenset[str]:
        """Names of the segment's inputs that die with it and that nothing else can see."""
        last = self._last_of(index)
        reads = [value for _, value in segment.match.inputs]
        # what an allocating launch returns may be the donated tensor: that must not be the arena's
        kept = self._pinned | (self.buffers.keys() if segment.candidate.allocates else set())
        return frozenset(
            name
            for name, value in segment.match.inputs
            if value in last and value not in kept and reads.count(value) == 1
        )

    def _last_of(self, index: int) -> set[int]:
        return set(_deaths(self.plan)[index]) - set(self.plan.graph.inputs)

    # -- running -----------------------------------------------------------------------------------------------------

    def run(self, inputs: tuple[Any, ...]) -> Any:
        """The graph's outputs for `inputs` (tensors of the shapes that the plan is for)."""
        with on_device(self.device):
            return self._run(inputs)

    def _run(self, inputs: tuple[Any, ...]) -> Any:
        self._set(inputs)
        # the user's own capture takes the launches: a graph cannot be launched into another
        if self.graph is not None and not torch.cuda.is_current_stream_capturing():
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
                    planar = value in self._planar
                    held = values[value] = _input_buffer(x, self._input_dtype(x), self.device, planar)
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
            with on_device(self.device):
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
            self._steps, self._joined = join(self._steps), True

    def capture(self) -> None:
        """Captures the next runs as one CUDA graph. The context has run before, so that everything is compiled."""
        graph = torch.cuda.CUDAGraph()
        with _capturing, torch.cuda.device(self.device):
            before = torch.cuda.memory_reserved(self.device)
            stream = _capture_stream(self.device)
            # `stream` twice: where a capture cannot begin or end, torch.cuda.graph leaves it current
            with (
                torch.cuda.stream(stream),
                torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
            ):
                self._execute(self.values)
        self.graph = graph
        # the graph's own pool: what allocating candidates and opaque calls return
        self._graph_bytes = max(0, torch.cuda.memory_reserved(self.device) - before)


def _block(size: int, device: torch.device) -> Tensor:
    """`size` bytes, aligned as a CUDA allocation is; on the CPU PyTorch promises 64 bytes only."""
    made = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=device)
    skip = -made.data_ptr() % ALIGNMENT
    return made[skip : skip + size]


def _input_buffer(x: Tensor, dtype: torch.dtype, device: torch.device, planar: bool) -> Tensor:
    with torch.inference_mode(False):
        return torch.empty_strided(x.shape, activation_strides(x, planar), dtype=dtype, device=device)


def _planar_inputs(plan: Plan) -> set[int]:
    """The graph's inputs that every kernel which reads them takes contiguous too: their buffers get the first call's
    order, and the copy into them is a plain one."""
    taken: dict[int, bool] = {}
    for segment in plan.segments:
        if segment.candidate is not None:
            planar = segment.candidate.planar(segment.problem)
            for name, value in segment.match.inputs:
                taken[value] = taken.get(value, True) and name in planar
    return {value for value in plan.graph.inputs if taken.get(value, False)}


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


def _why_no_graph(plan: Plan) -> str:
    """Why a CUDA graph would not do what the plan does; "" where it would."""
    for segment in plan.segments:
        for node in segment.nodes:
            if isinstance(node, Opaque) and node.python:
                return f"{node.name} is called as it is, and only Python knows what it does: {node.reason}"
    return ""


def _workspace(segment: Segment) -> int:
    return segment.candidate.workspace(segment.problem, segment.cost.config)


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
