"""What ran, node by node: the table behind `model.report()`."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastres.engine import Engine, Key
from fastres.plan.context import Context
from fastres.plan.planner import Plan, Segment
from fastres.plan.problem import Target, dtype_name

_REPEATS = 5


@dataclass(frozen=True)
class Row:
    """One step of a plan.

    Attributes:
        layers: the layers' names in the user's model, in order.
        problem: shapes and options, or "" for a call that no kernel takes.
        candidate: what ran, "backend.kernel"; "PyTorch" for a call as it is.
        source: the file under kernels/ that holds its device code, or the PyTorch call it makes.
        config: its configuration, as text.
        ms: measured milliseconds, or None.
        predicted_ms: what the plan was chosen by, and `basis`: "measured", "nearest", "now", "prototype", "estimate".
        floor_ms: what memory and arithmetic of the device allow, or None where its rates are unknown.
        reason: why no kernel took it.
        others: (candidate, why it did not run) for every other candidate that could have begun at this layer.
    """

    layers: tuple[str, ...]
    problem: str
    candidate: str
    source: str
    config: str
    ms: float | None
    predicted_ms: float | None
    basis: str
    floor_ms: float | None
    reason: str = ""
    others: tuple[tuple[str, str], ...] = ()


@dataclass
class Report:
    """Printed, it is a table; `rows` and `parts` are its data."""

    title: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parts: list[Report] = field(default_factory=list)

    @property
    def ms(self) -> float | None:
        """Sum of the steps' measured times."""
        times = [row.ms for row in self.rows if row.ms is not None]
        return sum(times) if times else None

    def why(self, layer: str) -> str:
        """Every candidate that could have begun at `layer`, and why it did not run there."""
        for row in self.rows:
            if layer in row.layers:
                lines = [
                    f"{layer}: {row.candidate} ({row.source}) {row.config}",
                    *(f"  {n}: {w}" for n, w in row.others),
                ]
                return "\n".join(lines)
        raise ValueError(
            f"layer: {layer!r} is in no row; the first is {self.rows[0].layers[0] if self.rows else 'none'}"
        )

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        console = Console(file=text, width=200)
        if self.rows:
            console.print(self._table())
        for note in self.notes:
            console.print(note)
        return "\n".join([text.getvalue().rstrip(), *(str(part) for part in self.parts)])

    __repr__ = __str__

    def _table(self):
        from rich.table import Table

        table = Table(title=self.title, title_justify="left", header_style="bold")
        for name in ("layer", "problem", "ran", "config"):
            table.add_column(name, overflow="fold")
        for name in ("ms", "predicted", "floor", "% of floor"):
            table.add_column(name, justify="right")
        for row in self.rows:
            share = f"{100 * row.floor_ms / row.ms:.0f}" if row.floor_ms and row.ms else ""
            predicted = "" if row.predicted_ms is None else f"{row.predicted_ms:.3f} {row.basis}"
            times = (_ms(row.ms), predicted, _ms(row.floor_ms), share)
            table.add_row("\n".join(row.layers), row.problem or row.reason, row.candidate, row.config, *times)
        return table


def report(module: nn.Module, inputs: Any, measure: bool, name: str = "") -> Report:
    """The report of an accelerated model or of a module that plans for itself; see their `report`."""
    state = getattr(module, "_fastres", None)
    engine: Engine = state.engine if state is not None else module._engine
    original = state.original if state is not None else module
    kind = type(original).__name__
    name = f"{name} ({kind})" if name else kind
    if inputs is not None:
        if module.training:
            raise ValueError("report: the model is in training mode, plans run in eval mode")
        _run(module, inputs)
    made = Report(name)
    if engine.prepared.plans:
        key, plan = next(reversed(engine.prepared.plans.items()))
        made = of_plan(plan, key=key, engine=engine if measure else None, name=name)
        refused = {c.graph_refused for contexts in engine._idle.values() for c in contexts if c.graph_refused}
        made.notes += [f"no CUDA graph: {why}" for why in refused]
        made.notes += [
            f"left out: {candidate} on {p}: {why}" for (candidate, p), why in engine.dropped.items()
        ]
    for refused, why in engine.prepared.refused.items():
        shapes = ", ".join("x".join(map(str, shape)) for shape, _ in refused.inputs)
        made.notes.append(f"{name} {shapes}: no plan, PyTorch's own calls run: {why}")
    if state is not None and state.parts is not None:
        made.notes.append(f"{name} runs in parts: {state.why}")
        made.parts = [
            report(part, None, measure, part_name) for part_name, part in module._accelerated_parts()
        ]
        made.notes += _left_out(original, [part_name for part_name, _ in module._accelerated_parts()])
    if not made.rows and not made.notes:
        made.notes.append(f"{name}: no plan yet; call the model in eval mode without gradients first")
    return made


def _left_out(original: nn.Module, parts: list[str]) -> list[str]:
    """Convolutions that are in no part."""
    names = [n for n, m in original.named_modules() if isinstance(m, nn.Conv2d)]
    alone = [n for n in names if not any(n.startswith(f"{part}.") for part in parts)]
    return [f"called as they are, in no part: {', '.join(alone)}"] if alone else []


def of_plan(plan: Plan, key: Key | None = None, engine: Engine | None = None, name: str = "") -> Report:
    """The report of a plan; with an engine its steps are timed now."""
    target, times = plan.target, [None] * len(plan.segments)
    if engine is not None and key is not None:
        times = _measured(plan, key, engine)
        target = _with_rates(target, key)
    rows = [_row(segment, ms, target) for segment, ms in zip(plan.segments, times, strict=True)]
    shapes = ", ".join("x".join(map(str, plan.shapes.values[v].shape)) for v in plan.graph.inputs)
    measured = f", {sum(times):.3f} ms measured" if engine is not None else ""
    title = f"{name} {shapes} {dtype_name(plan.dtype)} on {target.name or target.arch}{measured}"
    notes = list(plan.graph.notes)
    notes.append(f"predicted: {plan.predicted_ms:.3f} ms in {len(rows)} steps")
    return Report(title, rows, notes)


def _row(segment: Segment, ms: float | None, target: Target) -> Row:
    layers = tuple(node.name for node in segment.nodes)
    if segment.candidate is None:
        return Row(layers, "", "PyTorch", "", "", ms, None, "", None, segment.reason)
    problem, cost = segment.problem, segment.cost
    config = "" if cost.config is None else ", ".join(f"{k}={v}" for k, v in vars(cost.config).items())
    others = tuple(
        (name, reason or f"{other.ms:.3f} ms ({other.kind}) is slower in this cover")
        for name, other, reason in segment.others
        if name != segment.candidate.name
    )
    candidate = segment.candidate
    text = problem.layer_key.removeprefix(problem.pattern).strip()
    return Row(
        layers,
        text,
        candidate.name,
        candidate.source,
        config,
        ms,
        cost.ms,
        cost.kind,
        target.floor_ms(problem),
        "",
        others,
    )


def _measured(plan: Plan, key: Key, engine: Engine) -> list[float]:
    """Milliseconds of every step: medians over a few runs on random inputs."""
    device = key.device
    context = Context(plan, engine.prepared.constants, device, static_inputs=False)
    inputs = tuple(_example(shape, dtype, device) for shape, dtype in key.inputs)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        context.run(inputs)
        samples = [_times(context, inputs, _clock(device)) for _ in range(_REPEATS)]
    return [sorted(times)[len(times) // 2] for times in zip(*samples, strict=True)]


def _times(context: Context, inputs: tuple[Tensor, ...], now) -> list[float]:
    """Milliseconds of each of the plan's segments in one run; bringing a value into form counts to its first reader."""
    marks: list[float] = []
    started = now()
    for segment in context.observe(inputs):
        if segment is not None:
            ended = now()
            marks.append(ended - started)
            started = ended
    return marks


def _clock(device: torch.device):
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1e3 * time.perf_counter()

    return now


def _example(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    made = torch.empty(shape, dtype=dtype, device=device)
    return made.normal_() if dtype.is_floating_point else made.random_(0, 256)


def _with_rates(target: Target, key: Key) -> Target:
    """The target with this device's own copy and matmul rates, measured now where none are known."""
    if target.bandwidth:
        return target
    from fastres.bench import roofline

    rates = roofline.measure(key.device, key.dtype)
    return replace(target, bandwidth=rates.copy, flops=((dtype_name(key.dtype), rates.matmul),))


def _run(module: nn.Module, inputs: Any) -> None:
    parameter = next(module.parameters(), torch.empty(0))
    if not isinstance(inputs, Tensor):
        inputs = _example(tuple(inputs), parameter.dtype, parameter.device)
    with torch.no_grad():
        module(inputs)


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
