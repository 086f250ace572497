"""The primitives of training at one real size, for triage: checked against fp64 PyTorch, and timed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache

import torch
from oracle import relative_norm
from torch import Tensor

from fastres.ops import primitives, torch_primitives

# ResNet-50's first residual blocks at batch 64: the tensors are larger than an L2.
SHAPE, SMALL = (64, 256, 56, 56), (2, 16, 14, 14)
_GEOMETRY = {"conv_stats": ((1, 1), (0, 0), (1, 1), 1), "conv_stats 3x3": ((1, 1), (1, 1), (1, 1), 1)}
# Tensors of SHAPE that are read and written. conv_stats: 1x1 of 64 channels to 256, which Triton's takes, and 3x3 of 64
# channels, which CUDA's takes.
_PASSES = {
    "add_relu": 3,
    "bn_stats": 1,
    "bn_finalize": 0,
    "bn_act": 3,
    "bn_act_backward_reduce": 4,
    "bn_act_backward": 5,
    "conv_stats": 1.25,
    "conv_stats 3x3": 0.5,
}


def names(device: str, dtype: torch.dtype) -> list[str]:
    """ "backend.primitive" of all that can run on a device, PyTorch's arithmetic left out."""
    found = []
    for primitive in (*primitives.NAMES, primitives.OPTIONAL[0]):
        for backend, function, _ in primitives.candidates(primitive, device, dtype):
            if function is not None and backend != "torch":
                found.append(f"{backend}.{primitive}")
    return found


def nbytes(name: str) -> float:
    count, itemsize = 1, 2
    for extent in SHAPE:
        count *= extent
    return _PASSES[_case(name)] * count * itemsize


def _case(name: str) -> str:
    return "conv_stats 3x3" if name == "cuda.conv_stats" else name.partition(".")[2]


def _shape(device: str) -> tuple[int, ...]:
    return SHAPE if torch.device(device).type == "cuda" else SMALL


@cache
def _tensors(device: str) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    shape = _shape(device)
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32

    def big(channels: int = shape[1], offset: float = 0.3) -> Tensor:
        whole = (shape[0], channels, *shape[2:])
        x = torch.randn(whole, generator=generator, device=device) + offset
        return x.to(dtype).contiguous(memory_format=torch.channels_last)

    def vector() -> Tensor:
        return torch.rand(shape[1], generator=generator, device=device) + 0.5

    k, c = shape[1], shape[1] // 4
    weight = torch.randn(k, c, 1, 1, generator=generator, device=device).div_(c**0.5).to(dtype)
    wide = torch.randn(c, c, 3, 3, generator=generator, device=device).div_(3 * c**0.5).to(dtype)
    wide = wide.contiguous(memory_format=torch.channels_last)
    made = {name: big() for name in ("x", "residual", "grad", "kept")} | {
        "narrow": big(c),
        "weight": weight,
        "weight3": wide,
    }
    made |= {name: vector() for name in ("mean", "var", "scale", "shift", "sum", "sum2", "rm", "rv")}
    return made


def _call(case: str, given: dict[str, Tensor]) -> tuple[tuple, list[Tensor]]:
    """(arguments, outputs) of one call on tensors like `given`."""
    t = given
    big, big2 = torch.empty_like(t["x"]), torch.empty_like(t["x"])
    one, two, three = (torch.empty_like(t["mean"]) for _ in range(3))
    backward = (
        t["grad"],
        t["x"],
        t["residual"],
        t["kept"],
        t["mean"],
        t["scale"],
        t["var"],
        t["shift"],
        1,
        0.0,
    )
    match case:
        case "add_relu":
            return (t["x"], t["residual"], big), [big]
        case "bn_stats":
            return (t["x"], one, two), [one, two]
        case "bn_finalize":
            running = t["rm"].clone(), t["rv"].clone()
            vectors = (t["mean"], t["var"], t["scale"], t["shift"], *running)
            return (*vectors, 0.1, 1e-5, 200704, one, two, three), [*running, one, two, three]
        case "bn_act":
            return (t["x"], t["residual"], t["scale"], t["shift"], 1, 0.0, big), [big]
        case "bn_act_backward_reduce":
            return (*backward, one, two, big), [one, two, big]
        case "bn_act_backward":
            return (*backward, t["sum"], t["sum2"], big, big2), [big, big2]
        case "conv_stats":
            return (t["narrow"], t["weight"], *_GEOMETRY[case], big, one, two), [big, one, two]
        case "conv_stats 3x3":
            k = t["weight3"].shape[0]
            outputs = [torch.empty_like(t["narrow"]), one[:k], two[:k]]
            return (t["narrow"], t["weight3"], *_GEOMETRY[case], *outputs), outputs
    raise ValueError(f"case: got {case!r}, takes one of {', '.join(_PASSES)}")


def _conv_stats(x: Tensor, weight: Tensor, stride, padding, dilation, groups, out, mean, var) -> None:
    y = torch.nn.functional.conv2d(x, weight, None, stride, padding, dilation, groups)
    out.copy_(y)
    torch_primitives.bn_stats(y, mean, var)


def _function(name: str) -> Callable[..., None]:
    backend, _, primitive = name.partition(".")
    if backend == "torch":
        return _conv_stats if primitive == "conv_stats" else getattr(torch_primitives, primitive)
    (found,) = [b for b in primitives.BACKENDS if b.name == backend]
    return getattr(importlib.import_module(found.module), primitive)


def _run(function: Callable[..., None], case: str, given: dict[str, Tensor]) -> list[Tensor]:
    arguments, outputs = _call(case, given)
    # running statistics are read too
    for out in outputs if case != "bn_finalize" else outputs[2:]:
        out.fill_(float("nan"))
    function(*arguments)
    return outputs


def check(name: str, device: str) -> float:
    """The largest relative error of the outputs; AssertionError where it is more than 1.5 x PyTorch's own and two
    roundings, or where two runs differ."""
    given, case, function = _tensors(device), _case(name), _function(name)
    theirs = _function(f"torch.{name.partition('.')[2]}")
    first, second = _run(function, case, given), _run(function, case, given)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other), f"{name}: two runs differ"
    own = _run(theirs, case, given)
    exact = _run(theirs, case, {key: t.double() for key, t in given.items()})
    worst = 0.0
    for index, (ours, plain, ref) in enumerate(zip(first, own, exact, strict=True)):
        error, allowed = relative_norm(ours, ref), 1.5 * relative_norm(plain, ref)
        allowed = max(allowed, 2 * torch.finfo(ours.dtype).eps)
        assert error <= allowed, f"{name}: output {index} is {error:.2e} off, {allowed:.2e} may be"
        worst = max(worst, error)
    return worst


def timed(name: str, device: str, like: str | None = None) -> float:
    """Milliseconds of a call; `like`: on what that backend's primitive of the name is tried."""
    from fastres.bench.timing import time_gpu, time_interleaved

    arguments, _ = _call(_case(like or name), _tensors(device))
    function = _function(name)

    def run() -> None:
        function(*arguments)

    run()
    if torch.device(device).type == "cuda":
        return time_gpu(run, budget_s=0.03).median
    return time_interleaved({"": run}, budget_s=0.03, warmup_s=0.01)[""].median
