"""Timing one candidate on one problem, alone, on the device at hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastres.graph.fold import LayerParameters
from fastres.graph.ir import Conv, GlobalAvgPool, Linear, MaxPool, Node, Normalize
from fastres.plan.candidate import Buffers, Candidate
from fastres.plan.planner import Cost, table_cost
from fastres.plan.problem import ConvSpec, LinearSpec, NormalizeSpec, PoolSpec, Problem, Spec, Target
from fastres.plan.steps import nhwc_strides, on_device

# What a timing at the first call may cost, for one configuration
_BUDGET_S = 0.05
_MOST_CONFIGS = 8

# a second network, shape or plan asks again about the same layers
_MEASURED: dict[tuple, Cost] = {}


class Measure:
    """A cost model that times every configuration of a candidate once a process; what cannot run raises its reason."""

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, candidate: Candidate, problem: Problem, target: Target) -> Cost:
        if target.on_paper:
            return table_cost(candidate, problem, target)
        key = (candidate, problem, self.device, torch.get_num_threads())
        if key not in _MEASURED:
            _MEASURED[key] = self._measure(candidate, problem, target)
        return _MEASURED[key]

    def _measure(self, candidate: Candidate, problem: Problem, target: Target) -> Cost:
        best = None
        failure: Exception | None = None
        for config in list(candidate.configs(problem, target))[:_MOST_CONFIGS]:
            try:
                with on_device(self.device):
                    ms = time_launch(bind_alone(candidate, problem, config, self.device), self.device)
            except Exception as error:  # the next configuration may run
                failure = error
                continue
            if best is None or ms < best.ms:
                best = Cost(config, ms, "now")
        if best is None:
            raise failure or RuntimeError("it has no configuration for this problem")
        return best


def alone(
    candidate: Candidate,
    problem: Problem,
    config: Any,
    device: torch.device | str,
    planar: frozenset[str] | None = None,
) -> tuple[dict[str, Tensor], Buffers, Any]:
    """(inputs by name, buffers, constants) of one call of a candidate, all its own and random.

    `planar`: the inputs that come contiguous; default: all that the candidate takes so, as images are loaded."""
    with torch.inference_mode(False), torch.no_grad():
        constants = candidate.prepare(problem, config, random_parameters(problem, device))
        planar = candidate.planar(problem) if planar is None else planar
        inputs = {name: _random_input(problem, name, device, name in planar) for name in problem.inputs}
        if candidate.allocates:
            return inputs, Buffers({}), constants
        outputs = {
            role: _empty(problem.output_shape(role), problem.dtype, device) for role in problem.outputs
        }
        count, scratch = candidate.counters(problem, config), candidate.workspace(problem, config)
        counters = torch.zeros(count, dtype=torch.int32, device=device) if count else None
        workspace = torch.empty(scratch, dtype=torch.uint8, device=device) if scratch else None
        return inputs, Buffers(inputs | outputs, counters, workspace), constants


def bind_alone(
    candidate: Candidate, problem: Problem, config: Any, device: torch.device
) -> Callable[[], Any]:
    """The candidate bound to what `alone` makes; ready to be called and timed."""
    inputs, buffers, constants = alone(candidate, problem, config, device)
    with torch.inference_mode(False), torch.no_grad():
        launch = candidate.bind(problem, config, buffers, constants)
    if candidate.allocates:
        arguments = tuple(inputs.values())
        return lambda: launch(*arguments)
    counters = buffers.counters
    if counters is None:
        return launch

    def run() -> None:
        counters.zero_()
        launch()

    return run


def time_launch(run: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of a call: the median of a few, after one that compiles."""
    from fastres.bench.timing import time_gpu, time_interleaved

    with torch.inference_mode(False), torch.no_grad():
        run()
        if device.type == "cuda":
            return time_gpu([run], budget_s=_BUDGET_S).median
        return time_interleaved({"": run}, budget_s=_BUDGET_S, warmup_s=0.0)[""].median


def random_parameters(problem: Problem, device: torch.device | str) -> dict[str, LayerParameters]:
    """Parameters of the right shapes, by role; activations keep their scale through every layer."""
    return {role: LayerParameters(_node(role, spec, problem.dtype, device)) for role, spec in problem.layers}


def _node(role: str, spec: Spec, dtype: torch.dtype, device: torch.device | str) -> Node:
    common = dict(name=role, x=0, output=1)
    match spec:
        case ConvSpec():
            conv = nn.Conv2d(
                spec.c,
                spec.k,
                spec.kernel,
                spec.stride,
                spec.padding,
                spec.dilation,
                spec.groups,
                bias=spec.bias and not spec.affine,
                device=device,
                dtype=dtype,
            )
            nn.init.normal_(conv.weight, std=1 / math.sqrt(math.prod(spec.weight_shape[1:])))
            bn = nn.BatchNorm2d(spec.k, device=device).eval() if spec.affine else None
            return Conv(conv=conv, bn=bn, act=spec.act, residual=0 if spec.residual else None, **common)
        case LinearSpec():
            return Linear(linear=nn.Linear(spec.c, spec.k, spec.bias, device=device, dtype=dtype), **common)
        case NormalizeSpec():
            return Normalize(mean=(0.5,) * spec.c, std=(0.25,) * spec.c, **common)
        case PoolSpec(kernel=None):
            return GlobalAvgPool(flat=spec.flat, **common)
        case PoolSpec():
            window = (spec.kernel, spec.stride, spec.padding, spec.dilation)
            return MaxPool(
                **dict(zip(("kernel", "stride", "padding", "dilation"), window, strict=True)), **common
            )


def _random_input(problem: Problem, name: str, device: torch.device | str, planar: bool) -> Tensor:
    shape, dtype = problem.input_shape(name), problem.input_dtype(name)
    made = torch.empty(shape, dtype=dtype, device=device) if planar else _empty(shape, dtype, device)
    return made.random_(0, 256) if dtype == torch.uint8 else made.normal_()


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return torch.empty_strided(shape, nhwc_strides(shape), dtype=dtype, device=device)
