"""The engine: what stands between a module's call and its plans. It serves one module, any input, any thread."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastres import env
from fastres.ahead import compile_plan
from fastres.calls import (
    Options,
    check_inputs,
    device_of,
    floating_type,
    in_type,
    parameter_dtype,
)
from fastres.graph.capture import CaptureError, capture
from fastres.graph.evaluate import evaluate, normalize
from fastres.graph.ir import Graph
from fastres.graph.versions import Watch
from fastres.plan import planner
from fastres.plan.candidate import REGISTRY
from fastres.plan.context import Context
from fastres.plan.planner import Plan
from fastres.plan.problem import Problem
from fastres.plan.specs import Unplannable, propagate
from fastres.plan.steps import CandidateFailed
from fastres.plan.target import detect
from fastres.prepared import Asleep, Facts, Prepared, finite
from fastres.proof.plan import prove_plan

log = logging.getLogger("fastres")

# Contexts and plans kept at once; the least recently used goes first. A ResNet-50 at batch 256 holds about 1 GB.
MAX_PLANS = 32
MAX_GRAPH_BYTES = 8 << 30


@dataclass(frozen=True)
class Key:
    """What a plan depends on beside the network: shapes, types, device and PyTorch's numerical flags."""

    inputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    device: torch.device
    dtype: torch.dtype
    flags: tuple[str, ...]
    threads: int
    autocast: bool = False


class Engine:
    """Plans and runs a module's inference. Copies and pickles start empty, so that modules may hold one."""

    def __init__(self, options: Options | None = None):
        self.options = options or Options()
        self.lock = threading.RLock()
        self._clear()

    def _clear(self) -> None:
        self.prepared = Prepared()
        self._asleep = Asleep()
        # (candidate, problem) that failed when it ran or was proved, and why
        self.dropped: dict[tuple[str, Problem], str] = {}
        self._idle: OrderedDict[tuple, list[Context]] = OrderedDict()
        self._expired = False

    def __deepcopy__(self, memo):
        return Engine(self.options)

    def __reduce__(self):
        return Engine, (self.options,)

    # -- the call ----------------------------------------------------------------------------------------------------

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        """The module's inference result for positional `inputs`. `plannable` said that it may be planned."""
        watch, facts = self.prepared.watch, self.prepared.facts
        # (constants that lie where the network was before it moved fail every kernel, which would be left out for good)
        ahead = facts is not None and any(
            isinstance(x, Tensor) and x.is_cuda and x.device == facts.device for x in inputs
        )
        if not ahead:
            watch, facts = self._renew(module)
        while True:
            self._check(module, inputs, facts)
            key = self._key(inputs, facts)
            if (
                key in self.prepared.refused
                or any(isinstance(x, Tensor) and x.shape[:1] == (0,) for x in inputs)
                or (key.device.type == "cpu" and not (facts.finite and finite(inputs)))
            ):
                self._renew(module)
                return self.plain(module, inputs)
            try:
                context = self._take(key, module, inputs)
                with (
                    torch.inference_mode(False),
                    torch.no_grad(),
                    torch.autocast(key.device.type, enabled=False),
                ):
                    result = self._run(context, inputs)
            except CandidateFailed as failure:
                self._drop(failure)
                continue
            except Unplannable as error:
                log.info("no plan for %s: %s", key.inputs, error)
                self.prepared.refused[key] = str(error)
                continue
            self._give_back(key, context)
            # asked while a GPU works: what was stale is prepared again and run again
            if not ahead or (not self._expired and watch.same_structure() and watch.same_tensors()):
                return in_type(result, self.options.dtype)
            watch, facts = self._renew(module)
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
            except Exception as error:
                # another kernel may be captured; PyTorch's own calls have no successor, but they ran without a graph
                if isinstance(error, CandidateFailed) and error.segment.candidate.backend != "reference":
                    raise
                # CUDA's first line says it, the others where to read about it
                words = (str(error).strip().splitlines() or [""])[0]
                context.graph_refused = f"{type(error).__name__}: {words}"
                log.warning("no CUDA graph for this network: %s", context.graph_refused)
        return context.run(inputs)

    def plain(self, module: nn.Module, inputs: tuple[Any, ...], graph: Graph | None = None) -> Any:
        """Node by node with PyTorch's own calls, differentiable. `graph`: the module's, if it is at hand."""
        graph = graph or self.graph(module)
        _check_count(graph, inputs)
        dtype = None if module.training else self.options.dtype
        normalized = self.options.normalize is not None and not module.training
        if dtype is None:
            return evaluate(graph, inputs, self._plain_dtype(module, inputs) if normalized else None)
        inputs = in_type(inputs, dtype)
        if dtype in (torch.bfloat16, torch.float16):
            with torch.autocast(device_of(inputs).type, dtype, enabled=dtype != parameter_dtype(module)):
                return in_type(evaluate(graph, inputs, dtype), dtype)
        if normalized:
            inputs = (normalize(inputs[0], *self.options.normalize, dtype), *inputs[1:])
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return torch.func.functional_call(module, in_type(tensors, dtype), inputs)

    def _plain_dtype(self, module: nn.Module, inputs: tuple[Any, ...]) -> torch.dtype:
        return parameter_dtype(module) or torch.get_default_dtype()

    # -- graphs, plans, contexts -------------------------------------------------------------------------------------

    def graph(self, module: nn.Module) -> Graph:
        """The module's graph in its present mode. Raises CaptureError, always the same one, where there is none."""
        with self.lock:
            made = self.prepared.graphs.get(module.training)
            if made is None:
                try:
                    made = capture(module, None if module.training else self.options.normalize)
                except CaptureError as error:
                    made = error
                self.prepared.graphs[module.training] = made
        if isinstance(made, CaptureError):
            raise made
        return made

    def plan_for(self, module: nn.Module, inputs: tuple[Any, ...]) -> Plan:
        """The plan that inputs like these run; made now if there is none."""
        return self._plan(self.key(module, inputs), self.graph(module), inputs)

    def key(self, module: nn.Module, inputs: tuple[Any, ...]) -> Key:
        """What the plan for inputs like these is kept under."""
        _, facts = self._renew(module)
        return self._key(inputs, facts)

    def _plan(self, key: Key, graph: Graph, inputs: tuple[Any, ...]) -> Plan:
        with self.lock:
            plan = self.prepared.plans.get(key)
            if plan is None:
                started = time.perf_counter()
                plan = self._make_plan(key, graph, inputs)
                self.prepared.plans[key] = plan
                while len(self.prepared.plans) > MAX_PLANS:
                    self.prepared.plans.popitem(last=False)
                took = time.perf_counter() - started
                log.info("planned %s in %.2f s: %d steps", key.inputs, took, len(plan.segments))
            self.prepared.plans.move_to_end(key)
            return plan

    def _make_plan(self, key: Key, graph: Graph, inputs: tuple[Any, ...]) -> Plan:
        import fastres.backends

        missing = fastres.backends.load()
        _check_count(graph, inputs)
        shapes = propagate(graph, inputs, key.dtype, key.autocast)
        cost_model = planner.table_cost
        if self.options.tune == "off":
            cost_model = planner.estimated_cost
        elif self.options.tune == "measure":
            from fastres.plan.measure import Measure

            cost_model = Measure(key.device)
        allowed, target = _allowed(), detect(key.device)
        make = partial(
            planner.make_plan, graph, shapes, key.dtype, target, key.flags, cost_model, dropped=self.dropped
        )
        wanted = self.options.backend
        if wanted == "auto":
            return make(backends=allowed, strict=False)
        if wanted in missing:
            raise planner.NoCandidate(f"backend: {wanted!r} is not here: {missing[wanted]}")
        return make(backends=(wanted,))

    def _take(self, key: Key, module: nn.Module, inputs: tuple[Any, ...]) -> Context:
        """An idle context for this key and stream, or a new one."""
        stream = torch.cuda.current_stream(key.device).cuda_stream if key.device.type == "cuda" else 0
        with self.lock:
            idle = self._idle.get((key, stream))
            while idle:
                context = idle.pop()
                if context.generation == self.prepared.constants.generation:
                    if key in self.prepared.plans:
                        self.prepared.plans.move_to_end(key)
                    context.slot = (key, stream)
                    return context
        plan = self._ready(key, module, inputs)
        graphs = key.device.type == "cuda" and self.options.graphs != "off"
        context = Context(plan, self.prepared.constants, key.device, static_inputs=graphs)
        context.slot = (key, stream)
        return context

    def _ready(self, key: Key, module: nn.Module, inputs: tuple[Any, ...]) -> Plan:
        """The plan with its kernels compiled and proved, where that is to be done."""
        while True:
            with self.lock:
                plan = self._plan(key, self.graph(module), inputs)
            compile_plan(plan, inputs)
            faults = prove_plan(plan, inputs, key.device)
            if not faults:
                return plan
            self._leave_out(faults)

    def _give_back(self, key: Key, context: Context) -> None:
        with self.lock:
            now = self.prepared
            if context.generation != now.constants.generation or now.plans.get(key) is not context.plan:
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
        reason = str(failure.error).strip().splitlines() or [repr(failure.error)]
        self._leave_out({(segment.candidate.name, segment.problem): f"failed: {reason[0]}"})

    def _leave_out(self, faults: Mapping[tuple[str, Problem], str]) -> None:
        """Plans anew without these."""
        for (name, problem), reason in faults.items():
            log.warning("%s on %s: %s; the next best runs instead", name, problem, reason)
        with self.lock:
            self.dropped.update(faults)
            self.prepared.plans.clear()
            self._idle.clear()

    # -- staleness ---------------------------------------------------------------------------------------------------

    def _renew(self, module: nn.Module, check_tensors: bool = True) -> tuple[Watch, Facts]:
        """Brings graphs, constants and facts up to date."""
        with self.lock:
            if self.prepared.watch is not None and not self.prepared.watch.same_structure():
                self._leave()
            prepared = self.prepared
            if prepared.watch is None:
                prepared.watch = Watch(module, self._apart(module))
                prepared.facts = Facts.of(module)
            elif check_tensors and (self._expired or not prepared.watch.same_tensors()):
                device = prepared.facts.device
                if prepared.watch.moved() and device is not None and device.type == "cuda":
                    # what is called as it is reads its parameters where a CUDA graph found them
                    prepared.constants.generation += 1
                self.refold()
                prepared.facts = Facts.of(module)
            return prepared.watch, prepared.facts

    def _leave(self) -> None:
        """The network has changed. If it is only in other modes, what is prepared is kept for when it comes back;
        buffers and CUDA graphs are given up, training wants the memory."""
        left = self.prepared
        modes = left.watch.modes_now()
        if modes == left.watch.modes:
            self._clear()
            return
        self._asleep.put(left)
        self._idle.clear()
        awake = self._asleep.wake(modes)
        self.prepared = awake or Prepared()
        self._expired = awake is not None

    def _apart(self, module: nn.Module) -> tuple[nn.Module, ...]:
        """What no trace looks into."""
        try:
            return self.graph(module).opaque
        except CaptureError:
            return (module,)

    def renew_structure(self, module: nn.Module) -> Watch:
        """Forgets graphs of a structure that has changed; another watch than before tells that it had."""
        watch, _ = self._renew(module, check_tensors=False)
        return watch

    def refold(self) -> None:
        """Prepares every constant again from the parameters as they are now."""
        with self.lock:
            self._expired = False
            if self.prepared.watch is not None:
                self.prepared.watch.renew()
                self.prepared.constants.renew()

    def expire(self) -> None:
        """Prepares every constant again at the next call."""
        self._expired = True

    def release(self) -> None:
        """Gives up every plan, constant, buffer and CUDA graph."""
        with self.lock:
            self._clear()

    def _key(self, inputs: tuple[Any, ...], facts: Facts) -> Key:
        device = device_of(inputs)
        flags = []
        if device.type == "cuda":
            if torch.backends.cudnn.allow_tf32:
                flags.append("tf32")
            if torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic:
                flags.append("deterministic")
        shapes = tuple((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else ((), type(x)) for x in inputs)
        dtype = self._compute_dtype(facts.dtype, device) or floating_type(inputs)
        # under autocast, or a narrower `dtype`, what no kernel takes runs as it does under autocast
        mixed = dtype in (torch.bfloat16, torch.float16) and (
            dtype != facts.dtype or torch.is_autocast_enabled(device.type)
        )
        return Key(shapes, device, dtype, tuple(flags), torch.get_num_threads(), mixed)

    def _check(self, module: nn.Module, inputs: tuple[Any, ...], facts: Facts) -> None:
        """`check_inputs`, skipped for the one input that a network usually has, where it is what the parameters are."""
        first = inputs[0]
        usual = len(inputs) == 1 and isinstance(first, Tensor) and self.options.normalize is None
        if not (usual and first.dtype == facts.dtype and first.device == facts.device):
            check_inputs(module, inputs, self.options)

    def compute_dtype(self, module: nn.Module, device: torch.device) -> torch.dtype:
        """`Options.dtype`, else autocast's, else the parameters' type."""
        return self._compute_dtype(parameter_dtype(module), device) or torch.get_default_dtype()

    def _compute_dtype(self, parameters: torch.dtype | None, device: torch.device) -> torch.dtype | None:
        if self.options.dtype is not None:
            return self.options.dtype
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return parameters


def _allowed() -> tuple[str, ...] | None:
    """The families that automatic choice may use; ValueError for a name in FASTRES_BACKENDS that nobody has."""
    from fastres.backends import FAMILIES, load
    from fastres.ops.primitives import names_of_primitives

    names = env.backends()
    unknown = [name for name in names or () if name not in FAMILIES]
    if unknown:
        raise ValueError(f"FASTRES_BACKENDS names {', '.join(unknown)}, it takes {', '.join(FAMILIES)}")
    known = {*FAMILIES, *REGISTRY.candidates, *names_of_primitives()}
    # the candidates of a family that cannot be imported are not known here
    strange = sorted(n for n in env.excluded() - known if n.partition(".")[0] not in load())
    if strange:
        raise ValueError(
            f"FASTRES_BACKENDS leaves out {', '.join(strange)}: no backend or kernel bears such a name"
        )
    return names


def _check_count(graph: Graph, inputs: tuple[Any, ...]) -> None:
    if len(inputs) != len(graph.inputs):
        raise CaptureError(f"it was called with {len(inputs)} arguments, its graph takes {len(graph.inputs)}")
