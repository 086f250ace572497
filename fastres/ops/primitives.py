"""Which implementation of an elementwise or reducing primitive runs on a device.

A primitive is a function with one meaning everywhere (listed in `torch_primitives`): it writes into tensors
that the caller made. Every backend that has it keeps it under the same name in its own module; the first one
that can run here is taken, and PyTorch's arithmetic is always the last.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from .. import env

NAMES = (
    "add_relu",
    "bn_stats",
    "bn_finalize",
    "bn_act",
    "bn_act_backward_reduce",
    "bn_act_backward",
)
# Only where a kernel has them. conv_stats(x, weight, stride, padding, dilation, groups, out, mean, var):
# out = conv2d(x, weight), and the mean and biased variance of every channel of out from the epilogue, before
# out is rounded. conv_stats_takes(x, weight, stride, padding, dilation, groups) -> bool: it can, and is believed
# to be no slower than the convolution and bn_stats. Who has one has both.
OPTIONAL = ("conv_stats", "conv_stats_takes")
# All of bn_act in one call each way (see backends/cpu_ops.py), and the primitives that it stands for: it takes what
# these take, and returns [] for everything else, having written nothing. Who has one has both.
WHOLE = {
    "bn_act_forward": ("bn_stats", "bn_finalize", "bn_act"),
    "bn_act_gradients": ("bn_act_backward_reduce", "bn_act_backward"),
}


class Backend(NamedTuple):
    """A module of primitives.

    name: as users pin it. module: imported on first use; it may define `why_not(dtype) -> str | None`.
    device: a device type, or "any". library: the native library that it needs, if any.
    """

    name: str
    module: str
    device: str
    library: str | None = None


# Order is preference; a primitive that a module lacks comes from the next one.
BACKENDS = (
    Backend("cuda", "fastres.backends.cuda_ops", "cuda", library="cuda"),
    Backend("triton", "fastres.backends.triton_ops", "cuda"),
    Backend("cpu", "fastres.backends.cpu_ops", "cpu", library="cpu"),
    Backend("torch", "fastres.ops.torch_primitives", "any"),
)


def names_of_primitives() -> list[str]:
    """As FASTRES_BACKENDS may leave them out: "cuda.bn_act"."""
    names = (*NAMES, OPTIONAL[0], *WHOLE)
    return [f"{backend.name}.{name}" for backend in BACKENDS[:-1] for name in names]


_found: dict[tuple[str, torch.device, torch.dtype], tuple[Callable, ...]] = {}
_pinned: str | None = None


def candidates(name: str, device: str, dtype: torch.dtype) -> list[tuple[str, Callable | None, str | None]]:
    """(backend, function or None, reason why it cannot run or None), in the order in which they are tried."""
    rows: list[tuple[str, Callable | None, str | None]] = []
    excluded = frozenset() if _pinned else env.excluded()
    allowed = (_pinned,) if _pinned else env.backends()
    for backend in BACKENDS:
        if backend.device not in (device, "any"):
            continue
        if allowed is not None and backend.name not in (*allowed, "torch"):
            rows.append((backend.name, None, f"only {', '.join(allowed)} may be used"))
            continue
        if excluded & {backend.name, *_named(backend.name, name)}:
            rows.append((backend.name, None, "FASTRES_BACKENDS leaves it out"))
            continue
        function, reason = _load(backend, name, dtype)
        rows.append((backend.name, function, reason))
    return rows


def _named(backend: str, name: str) -> set[str]:
    """What leaves a primitive out, by names: who has conv_stats_takes has conv_stats; what runs the kernels of others
    goes with them."""
    return {f"{backend}.{part}" for part in (name.removesuffix("_takes"), *WHOLE.get(name, ()))}


def _load(backend: Backend, name: str, dtype: torch.dtype) -> tuple[Callable | None, str | None]:
    try:
        module = importlib.import_module(backend.module)
    except ImportError as error:
        return None, f"cannot be imported: {error}"
    if backend.library:
        # Here, so that `python -m fastres.native` does not find itself imported already.
        from .. import native

        if reason := native.available(backend.library):
            return None, reason
    if hasattr(module, "why_not") and (reason := module.why_not(dtype)):
        return None, reason
    function = getattr(module, name, None)
    return function, None if function else f"has no {name}"


def every(name: str, x: torch.Tensor) -> tuple[Callable, ...]:
    """The functions of all backends that compute the primitive `name` for tensors like `x`, best first; without those
    that failed their proof on its device."""
    key = (name, x.device, x.dtype)
    if key not in _found:
        rows = candidates(name, x.device.type, x.dtype)
        faults = {} if _pinned else _faults(x)
        _found[key] = tuple(
            f for backend, f, _ in rows if f is not None and not faults.keys() & _named(backend, name)
        )
    return _found[key]


def _faults(x: torch.Tensor) -> dict[str, str]:
    from fastres.proof.ops import faults_of_primitives

    return faults_of_primitives(x.device, x.dtype)


def find(name: str, x: torch.Tensor) -> Callable | None:
    """The function that computes the primitive `name` for tensors like `x`, if there is one."""
    functions = every(name, x)
    return functions[0] if functions else None


def get(name: str, x: torch.Tensor) -> Callable:
    """`find` for a primitive in `NAMES`, which PyTorch's arithmetic always has."""
    return find(name, x)


@contextlib.contextmanager
def pinned(backend: str) -> Iterator[None]:
    """Inside, only the named backend (and PyTorch's arithmetic for what it lacks) computes primitives.

    Raises ValueError for a name that is no backend's.
    """
    global _pinned
    names = [b.name for b in BACKENDS]
    if backend not in names:
        raise ValueError(f"backend: expected one of {', '.join(names)}, got {backend!r}")
    before, _pinned = _pinned, backend
    _found.clear()
    try:
        yield
    finally:
        _pinned = before
        _found.clear()
