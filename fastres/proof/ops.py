"""The primitives of training, held to PyTorch's arithmetic in fp64 by the ops that they serve.

faults_of_primitives(device, dtype)   {"cuda.bn_act": why it is left out, …}
prove_op(piece, dtype, device)        one op on one backend's primitives, in this process; raises Disproved
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastres import backends
from fastres.ops import primitives
from fastres.proof.record import Disproved, faults_of, wanted

log = logging.getLogger("fastres")

# An op and the primitives that it runs, on its backend's kernels.
SERVES = {
    "add_relu": ("add_relu",),
    "bn_act": ("bn_stats", "bn_finalize", "bn_act", "bn_act_backward_reduce", "bn_act_backward"),
    "conv_stats": ("conv_stats",),
}
# [N, C, H, W] and memory order: wide rows, contiguous ones, and what ends raggedly. Of convolutions: the channels in.
_SHAPES = (
    ((8, 256, 28, 28), torch.channels_last),
    ((4, 64, 14, 14), torch.contiguous_format),
    ((3, 40, 9, 7), torch.channels_last),
)
# (channels out, kernel, stride): what kernels with statistics take
_CONVOLUTIONS = ((64, 1, 1), (256, 1, 1), (64, 3, 1), (128, 1, 2))
# What a gradient's relative norm may be off where rounding takes a value across zero, and so ReLU's mask with it.
_FLIPPED = 1e-2
_known: dict[tuple[torch.device, torch.dtype], dict[str, str]] = {}
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Piece:
    """An op on the primitives of one backend."""

    backend: str
    op: str


def faults_of_primitives(
    device: torch.device, dtype: torch.dtype, work: Callable[..., None] | None = None
) -> dict[str, str]:
    """ "backend.primitive" → why it must not run, of all backends' own kernels for tensors of `dtype` there."""
    if not wanted(device):
        return {}
    with _one_at_a_time:
        if (device, dtype) not in _known:
            pieces = {f"{p.backend}.{p.op} in training, {dtype}": p for p in _pieces(device.type, dtype)}
            faults = faults_of(pieces, device, work or prove_op, dtype, str(device))
            _known[device, dtype] = {
                f"{pieces[key].backend}.{primitive}": fault
                for key, fault in faults.items()
                for primitive in SERVES[pieces[key].op]
            }
            for name, fault in _known[device, dtype].items():
                log.warning("%s: %s; the next best runs instead", name, fault)
        return _known[device, dtype]


def _pieces(device: str, dtype: torch.dtype) -> list[Piece]:
    return [
        Piece(backend, op)
        for op, parts in SERVES.items()
        for backend, function, _ in primitives.candidates(parts[0], device, dtype)
        if function is not None and backend != "torch"
    ]


def prove_op(piece: Piece, dtype: torch.dtype, device: torch.device | str) -> float:
    """The largest relative error of outputs, gradients and statistics; two runs must agree bit by bit.

    A tensor's relative norm has to be within 2 x that of PyTorch's arithmetic + the rounding of the type, and where
    ReLU's mask decides + 1 %. Raises Disproved where it is not, and what the kernels raise.
    """
    backends.load()
    run, worst = _RUNS[piece.op], 0.0
    for shape, order in _SHAPES:

        def computed(backend: str, kind: torch.dtype, shape=shape, order=order) -> dict[str, Tensor]:
            given = _Given(shape, order, dtype, kind, torch.device(device))
            with torch.inference_mode(False), torch.enable_grad(), primitives.pinned(backend):
                return {name: t.detach() for name, t in run(given).items()}

        first, second = computed(piece.backend, dtype), computed(piece.backend, dtype)
        own, exact = computed("torch", dtype), computed("torch", torch.float64)
        for name, ours in first.items():
            where = f"{name} of {'x'.join(map(str, shape))}"
            error, theirs = _off(ours, exact[name]), _off(own[name], exact[name])
            allowed = 2 * theirs + max(torch.finfo(ours.dtype).eps, 1e-5) + _FLIPPED * ("grad" in name)
            if not error <= allowed:
                raise Disproved(
                    f"{where}: {error:.2g} off, {allowed:.2g} may be, PyTorch is {theirs:.2g} off"
                )
            if not torch.equal(ours, second[name]):
                raise Disproved(f"{where}: two runs differ")
            worst = max(worst, error)
    return worst


def _off(out: Tensor, exact: Tensor) -> float:
    norm = exact.double().norm().clamp_min(torch.finfo(torch.float64).tiny)
    return ((out.double() - exact).norm() / norm).item()


@dataclass(frozen=True)
class _Given:
    """Random tensors in `kind`, of values that `dtype` holds; the same whenever they are asked for in the same turn."""

    shape: tuple[int, int, int, int]
    order: torch.memory_format
    dtype: torch.dtype
    kind: torch.dtype
    device: torch.device
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def tensor(self, shape: Sequence[int] | None = None, scale: float = 1.0, offset: float = 0.3) -> Tensor:
        made = torch.randn(tuple(shape or self.shape), generator=self.generator) * scale + offset
        made = made.to(self.device, self.dtype).to(self.kind)
        made = made.contiguous(memory_format=self.order)
        return made.requires_grad_()

    def channels(self, low: float, high: float) -> Tensor:
        wide = torch.float64 if self.kind == torch.float64 else torch.float32
        made = torch.rand(self.shape[1], generator=self.generator) * (high - low) + low
        return made.to(self.device, wide)


def _add_relu(given: _Given) -> dict[str, Tensor]:
    from fastres.ops import add_relu

    a, b, grad = given.tensor(), given.tensor(offset=-0.2), given.tensor().detach()
    out = add_relu(a, b)
    return {"out": out, **_gradients(out, grad, a=a, b=b)}


def _bn_act(given: _Given) -> dict[str, Tensor]:
    from fastres.ops import bn_act

    made: dict[str, Tensor] = {}
    for which, wants_residual, act in (
        ("", True, "relu"),
        (" alone", False, "relu"),
        (" smooth", True, "silu"),
    ):
        x, residual, grad = given.tensor(), given.tensor(offset=-0.2), given.tensor().detach()
        weight, bias = (given.channels(*ends).requires_grad_() for ends in ((0.5, 1.5), (-0.5, 0.5)))
        mean, var = given.channels(-0.5, 0.5), given.channels(0.5, 2.0)
        leaves = {"x": x, "weight": weight, "bias": bias} | ({"residual": residual} if wants_residual else {})
        for training in (True, False):
            kind = f"{which}{' frozen' * (not training)}"
            running = mean.clone(), var.clone()
            out = bn_act(
                x, *running, weight, bias, training, act=act, residual=residual if wants_residual else None
            )
            found = {"out": out, "mean": running[0], "var": running[1], **_gradients(out, grad, **leaves)}
            made |= {f"{name}{kind}": t for name, t in found.items()}
    return made


def _conv_stats(given: _Given) -> dict[str, Tensor]:
    from fastres.ops.conv_stats import conv_stats

    x, made = given.tensor(), {}
    channels = given.shape[1]
    for k, size, stride in _CONVOLUTIONS:
        scale = 1 / math.sqrt(channels * size * size)
        weight = given.tensor((k, channels, size, size), scale, 0.0)
        with torch.no_grad():
            found = conv_stats(x, weight, stride, size // 2)
        named = zip(("out", "mean", "var"), found, strict=True)
        made |= {f"{name} {size}x{size}/{stride} to {k}": t for name, t in named}
    return made


def _gradients(out: Tensor, grad: Tensor, **leaves: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(out, list(leaves.values()), grad)
    return {f"grad {name}": t for name, t in zip(leaves, found, strict=True)}


_RUNS = {"add_relu": _add_relu, "bn_act": _bn_act, "conv_stats": _conv_stats}
