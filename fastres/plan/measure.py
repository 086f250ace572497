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
        planar = candidate.planar(problem) if planar is None else planar
        inputs = {name: random_input(problem, name, device, name in planar) for name in problem.inputs}
        parameters = {role: LayerParameters(node) for role, node in random_nodes(problem, device).items()}
        return inputs, *call_of(candidate, problem, config, parameters, inputs)


def call_of(
    candidate: Candidate,
    problem: Problem,
    config: Any,
    parameters: dict[str, LayerParameters],
    inputs: dict[str, Tensor],
) -> tuple[Buffers, Any]:
    """(buffers, constants) of one call on these inputs, with memory of its own for what it writes."""
    constants = candidate.prepare(problem, config, parameters)
    if candidate.allocates:
        return Buffers({}), constants
    device = next(iter(inputs.values())).device
    outputs = {role: _empty(problem.output_shape(role), problem.dtype, device) for role in problem.outputs}
    count, scratch = candidate.counters(problem, config), candidate.workspace(problem, config)
    counters = torch.zeros(count, dtype=torch.int32, device=device) if count else None
    workspace = torch.empty(scratch, dtype=torch.uint8, device=device) if scratch else None
    return Buffers(inputs | outputs, counters, workspace), constants


def runner(
    candidate: Candidate,
    problem: Problem,
    config: Any,
    inputs: dict[str, Tensor],
    buffers: Buffers,
    constants: Any,
) -> Callable[[], dict[str, Tensor]]:
    """The candidate bound; each call computes and returns its outputs by role."""
    with torch.inference_mode(False), torch.no_grad():
        launch = candidate.bind(problem, config, buffers, constants)
    if candidate.allocates:
        arguments = tuple(inputs.values())

        def run() -> dict[str, Tensor]:
            made = launch(*arguments)
            return dict(zip(problem.outputs, made if isinstance(made, tuple) else (made,), strict=True))

        return run
    counters, outputs = buffers.counters, {role: buffers[role] for role in problem.outputs}

    def write() -> dict[str, Tensor]:
        if counters is not None:
            counters.zero_()
        launch()
        return outputs

    return write


def bind_alone(
    candidate: Candidate, problem: Problem, config: Any, device: torch.device
) -> Callable[[], Any]:
    """The candidate bound to what `alone` makes; ready to be called and timed."""
    return runner(candidate, problem, config, *alone(candidate, problem, config, device))


def time_launch(run: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of a call: the median of a few, after one that compiles."""
    from fastres.bench.timing import time_gpu, time_interleaved

    with torch.inference_mode(False), torch.no_grad():
        run()
        if device.type == "cuda":
            return time_gpu([run], budget_s=_BUDGET_S).median
        return time_interleaved({"": run}, budget_s=_BUDGET_S, warmup_s=0.0)[""].median


def random_nodes(problem: Problem, device: torch.device | str) -> dict[str, Node]:
    """Layers with parameters of the right shapes, by role; activations keep their scale through every layer."""
    return {role: _node(role, spec, problem.dtype, device) for role, spec in problem.layers}


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
            bn = _bn(spec.k, device) if spec.affine else None
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


def _bn(channels: int, device: torch.device | str) -> nn.BatchNorm2d:
    """Of which every parameter and statistic counts."""
    bn = nn.BatchNorm2d(channels, device=device).eval()
    for tensor, low, high in (
        (bn.weight, 0.5, 1.5),
        (bn.bias, -0.5, 0.5),
        (bn.running_mean, -0.5, 0.5),
        (bn.running_var, 0.5, 2.0),
    ):
        nn.init.uniform_(tensor, low, high)
    return bn


def random_input(problem: Problem, name: str, device: torch.device | str, planar: bool) -> Tensor:
    """Normal values, or bytes where it is an image of them."""
    shape, dtype = problem.input_shape(name), problem.input_dtype(name)
    made = torch.empty(shape, dtype=dtype, device=device) if planar else _empty(shape, dtype, device)
    return made.random_(0, 256) if dtype == torch.uint8 else made.normal_()


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return torch.empty_strided(shape, nhwc_strides(shape), dtype=dtype, device=device)
