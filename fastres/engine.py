"""The engine: what stands between a module's call and its plans. One engine serves one module, any input, any thread."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastres import env
from fastres.graph.capture import CaptureError, capture
from fastres.graph.evaluate import evaluate
from fastres.graph.ir import Graph
from fastres.graph.versions import Watch
from fastres.plan import planner
from fastres.plan.constants import Constants
from fastres.plan.context import CandidateFailed, Context
from fastres.plan.planner import Plan
from fastres.plan.problem import Problem, dtype_name
from fastres.plan.specs import propagate
from fastres.plan.target import detect

log = logging.getLogger("fastres")

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Contexts and plans kept at once; the least recently used goes first. A ResNet-50 at batch 256 holds about 1 GB.
MAX_PLANS = 32
MAX_GRAPH_BYTES = 8 << 30


@dataclass(frozen=True)
class Options:
    """See `fastres.accelerate`."""

    dtype: torch.dtype | None = None
    normalize: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    graphs: str = "auto"
    backend: str = "auto"
    tune: str = "table"


@dataclass(frozen=True)
class Key:
    """What a plan depends on beside the network: shapes, types, device and PyTorch's numerical flags."""

    inputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    device: torch.device
    dtype: torch.dtype
    flags: tuple[str, ...]
    threads: int


class Engine:
    """Plans and runs a module's inference. Copies and pickles start empty, so that modules may hold one."""

    def __init__(self, options: Options | None = None):
        self.options = options or Options()
        self._lock = threading.RLock()
        self._clear()

    def _clear(self) -> None:
        self.watch: Watch | None = None
        self._facts: _Facts | None = None
        self.graphs: dict[bool, Graph | CaptureError] = {}
        self.plans: OrderedDict[Key, Plan] = OrderedDict()
        self.dropped: dict[tuple[str, Problem], str] = {}
        self.constants = Constants()
        self._idle: OrderedDict[tuple, list[Context]] = OrderedDict()
        self._warned = False

    def __deepcopy__(self, memo):
        return Engine(self.options)

    def __reduce__(self):
        return Engine, (self.options,)

    # -- the call ----------------------------------------------------------------------------------------------------

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        """The module's inference result for positional `inputs`. `plannable` said that it may be planned."""
        ahead = self.watch is not None and any(isinstance(x, Tensor) and x.is_cuda for x in inputs)
        if not ahead:
            self._renew(module)
        while True:
            self._check(module, inputs)
            key = self._key(inputs)
            if any(isinstance(x, Tensor) and x.shape[:1] == (0,) for x in inputs):
                return self.plain(self.graph(module), inputs)
            context = self._take(key, module, inputs)
            try:
                with (
                    torch.inference_mode(False),
                    torch.no_grad(),
                    torch.autocast(key.device.type, enabled=False),
                ):
                    result = self._run(context, inputs)
            except CandidateFailed as failure:
                self._drop(failure)
                continue
            # asked while a GPU works: what was stale is prepared again and run again
            if not ahead or (self.watch.same_structure() and self.watch.same_tensors()):
                self._give_back(key, context)
                return result
            self._give_back(key, context)
            self._renew(module)
            ahead = False

    def _run(self, context: Context, inputs: tuple[Any, ...]) -> Any:
        wants_graph = context.static_inputs and not context.graph_refused
        if (
            wants_graph
            and context.graph is None
            and context.runs >= 1
            and not torch.cuda.is_current_stream_capturing()
        ):
            try:
                context.capture()
            except CandidateFailed:
                raise
            except Exception as error:
                context.graph_refused = f"{type(error).__name__}: {error}"
                log.warning("no CUDA graph for this network: %s", context.graph_refused)
        return context.run(inputs)

    def plain(self, graph: Graph, inputs: tuple[Any, ...]) -> Any:
        """Node by node with PyTorch's own calls, differentiable."""
        dtype = self.options.dtype
        device = next((x.device.type for x in inputs if isinstance(x, Tensor)), "cpu")
        if dtype is None or not dtype.is_floating_point:
            return evaluate(graph, inputs)
        inputs = tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
        narrow = dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(device, dtype, enabled=narrow):
            result = evaluate(graph, inputs)
        return result.to(dtype) if isinstance(result, Tensor) and result.is_floating_point() else result

    # -- graphs, plans, contexts -------------------------------------------------------------------------------------

    def graph(self, module: nn.Module) -> Graph:
        """The module's graph in its present mode. Raises CaptureError, always the same one, where there is none."""
        with self._lock:
            made = self.graphs.get(module.training)
            if made is None:
                try:
                    made = capture(module, None if module.training else self.options.normalize)
                except CaptureError as error:
                    made = error
                self.graphs[module.training] = made
        if isinstance(made, CaptureError):
            raise made
        return made

    def plan_for(self, module: nn.Module, inputs: tuple[Any, ...]) -> Plan:
        """The plan that inputs like these run; made now if there is none."""
        self._renew(module)
        return self._plan(self.key(module, inputs), self.graph(module), inputs)

    def key(self, module: nn.Module, inputs: tuple[Any, ...]) -> Key:
        """What the plan for inputs like these is kept under."""
        self._renew(module)
        return self._key(inputs)

    def _plan(self, key: Key, graph: Graph, inputs: tuple[Any, ...]) -> Plan:
        with self._lock:
            plan = self.plans.get(key)
            if plan is None:
                started = time.perf_counter()
                plan = self._make_plan(key, graph, inputs)
                self.plans[key] = plan
                while len(self.plans) > MAX_PLANS:
                    self.plans.popitem(last=False)
                took = time.perf_counter() - started
                log.info("planned %s in %.2f s: %d steps", key.inputs, took, len(plan.segments))
            self.plans.move_to_end(key)
            return plan

    def _make_plan(self, key: Key, graph: Graph, inputs: tuple[Any, ...]) -> Plan:
        import fastres.backends

        fastres.backends.load()
        shapes = propagate(graph, inputs, key.dtype)
        cost_model = planner.table_cost
        if self.options.tune == "off":
            cost_model = planner.estimated_cost
        elif self.options.tune == "measure":
            from fastres.plan.measure import Measure

            cost_model = Measure(key.device)
        backends = None if self.options.backend == "auto" else (self.options.backend,)
        target = detect(key.device)
        return planner.make_plan(
            graph, shapes, key.dtype, target, key.flags, cost_model, backends or env.backends(), self.dropped
        )

    def _take(self, key: Key, module: nn.Module, inputs: tuple[Any, ...]) -> Context:
        """An idle context for this key and stream, or a new one."""
        stream = torch.cuda.current_stream(key.device).cuda_stream if key.device.type == "cuda" else 0
        with self._lock:
            idle = self._idle.get((key, stream))
            while idle:
                context = idle.pop()
                if context.generation == self.constants.generation:
                    context.slot = (key, stream)
                    return context
            plan = self._plan(key, self.graph(module), inputs)
        graphs = key.device.type == "cuda" and self.options.graphs != "off"
        context = Context(plan, self.constants, key.device, static_inputs=graphs)
        context.slot = (key, stream)
        return context

    def _give_back(self, key: Key, context: Context) -> None:
        with self._lock:
            if context.generation != self.constants.generation or self.plans.get(key) is not context.plan:
                return
            self._idle.setdefault(context.slot, []).append(context)
            self._idle.move_to_end(context.slot)
            held = sum(c.memory for contexts in self._idle.values() for c in contexts)
            while len(self._idle) > 1 and (held > MAX_GRAPH_BYTES or len(self._idle) > MAX_PLANS):
                _, contexts = self._idle.popitem(last=False)
                held -= sum(c.memory for c in contexts)

    def _drop(self, failure: CandidateFailed) -> None:
        """A candidate that fails is left out for that problem; a reference that fails has no successor."""
        segment = failure.segment
        if segment.candidate.backend == "reference":
            raise failure.error
        log.warning("%s; the next best runs instead", str(failure).splitlines()[0])
        with self._lock:
            reason = str(failure.error).strip().splitlines()
            self.dropped[segment.candidate.name, segment.problem] = (
                f"failed: {reason[0] if reason else failure.error!r}"
            )
            self.plans.clear()
            self._idle.clear()

    # -- staleness ---------------------------------------------------------------------------------------------------

    def _renew(self, module: nn.Module, check_tensors: bool = True) -> None:
        """Brings graphs, constants and facts up to date."""
        with self._lock:
            if self.watch is not None and not self.watch.same_structure():
                self._clear()
            if self.watch is None:
                self.watch = Watch(module)
                self._facts = _Facts.of(module)
            elif check_tensors and not self.watch.same_tensors():
                self.refold()
                self._facts = _Facts.of(module)

    def renew_structure(self, module: nn.Module) -> bool:
        """Forgets graphs of a structure that has changed; true if it had, or was never looked at."""
        with self._lock:
            before = self.watch
            self._renew(module, check_tensors=False)
            return self.watch is not before

    def refold(self) -> None:
        """Prepares every constant again from the parameters as they are now."""
        with self._lock:
            if self.watch is not None:
                self.watch.renew()
                self.constants.renew()

    def release(self) -> None:
        """Gives up every plan, constant, buffer and CUDA graph."""
        with self._lock:
            self._clear()

    def _key(self, inputs: tuple[Any, ...]) -> Key:
        device = next(x.device for x in inputs if isinstance(x, Tensor))
        flags = []
        if device.type == "cuda":
            if torch.backends.cudnn.allow_tf32:
                flags.append("tf32")
            if torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic:
                flags.append("deterministic")
        shapes = tuple((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else ((), type(x)) for x in inputs)
        dtype = self._compute_dtype(self._facts.dtype, device)
        return Key(shapes, device, dtype, tuple(flags), torch.get_num_threads())

    def _check(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """`check_inputs`, skipped for the one input that a network usually has, where it is what the parameters are."""
        first, facts = inputs[0], self._facts
        usual = len(inputs) == 1 and isinstance(first, Tensor) and self.options.normalize is None
        if not (usual and first.dtype == facts.dtype and first.device == facts.device):
            check_inputs(module, inputs, self.options)

    def compute_dtype(self, module: nn.Module, device: torch.device) -> torch.dtype:
        """`Options.dtype`, else autocast's, else the parameters' type."""
        return self._compute_dtype(parameter_dtype(module), device)

    def _compute_dtype(self, parameters: torch.dtype, device: torch.device) -> torch.dtype:
        if self.options.dtype is not None:
            return self.options.dtype
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return parameters


@dataclass(frozen=True)
class _Facts:
    """What is asked about a module's parameters at every call, read once."""

    dtype: torch.dtype
    device: torch.device | None

    @classmethod
    def of(cls, module: nn.Module) -> _Facts:
        first = next(module.parameters(), None)
        return cls(parameter_dtype(module), None if first is None else first.device)


def parameter_dtype(module: nn.Module) -> torch.dtype:
    """The type of the first floating-point parameter that has more than one dimension, else of the first one."""
    parameters = [p for p in module.parameters() if p.is_floating_point()]
    weights = [p for p in parameters if p.dim() > 1]
    return (weights or parameters)[0].dtype if parameters else torch.get_default_dtype()


def plannable(module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call may run as a plan: eval mode, no gradient wanted, ordinary tensors, no transform watching."""
    if module.training or kwargs or not inputs:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_scripting() or torch.jit.is_tracing():
        return False
    if not all(type(x) in (Tensor, nn.Parameter) for x in inputs):
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if torch._C._is_torch_function_mode_enabled() and torch._C._len_torch_function_stack():
        return False
    return not wants_gradient(module, inputs)


def wants_gradient(module: nn.Module, inputs: tuple[Any, ...]) -> bool:
    if not torch.is_grad_enabled():
        return False
    if any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return True
    return any(p.requires_grad for p in module.parameters())


def check_inputs(module: nn.Module, inputs: tuple[Any, ...], options: Options) -> None:
    """Raises a TypeError or ValueError for what no plan can take, before anything runs."""
    for position, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            continue
        name = "x" if position == 0 else f"input {position}"
        if position == 0 and options.normalize is not None:
            if x.dtype != torch.uint8:
                raise TypeError(
                    f"{name}: normalize=(mean, std) takes uint8 images, got {dtype_name(x.dtype)}"
                )
        elif x.dtype not in FLOATS:
            hint = (
                "; for uint8 images give accelerate normalize=(mean, std)" if x.dtype == torch.uint8 else ""
            )
            raise TypeError(f"{name}: got {dtype_name(x.dtype)}, takes a floating-point tensor{hint}")
        parameter = next(module.parameters(), None)
        if parameter is not None and parameter.device != x.device:
            raise ValueError(f"{name}: is on {x.device}, the parameters are on {parameter.device}")
        if position == 0 and options.dtype is None and x.is_floating_point():
            wanted = parameter_dtype(module)
            if x.dtype != wanted and not torch.is_autocast_enabled(x.device.type):
                raise TypeError(
                    f"{name}: got {dtype_name(x.dtype)}, the parameters are {dtype_name(wanted)}; "
                    f"give accelerate dtype=… or use autocast to compute in another type"
                )
