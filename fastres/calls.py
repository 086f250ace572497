"""What is asked of a call before anything runs: may it be planned, and are its inputs ones that the network takes."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastres.plan.problem import dtype_name

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Options:
    """See `fastres.accelerate`."""

    dtype: torch.dtype | None = None
    normalize: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    graphs: str = "auto"
    backend: str = "auto"
    tune: str = "table"


def parameter_dtype(module: nn.Module) -> torch.dtype | None:
    """The type of the first floating-point parameter that has more than one dimension, else of the first one."""
    parameters = [p for p in module.parameters() if p.is_floating_point()]
    weights = [p for p in parameters if p.dim() > 1]
    return (weights or parameters)[0].dtype if parameters else None


def device_of(inputs: tuple[Any, ...]) -> torch.device:
    return next((x.device for x in inputs if isinstance(x, Tensor)), torch.device("cpu"))


def floating_type(inputs: tuple[Any, ...]) -> torch.dtype:
    types = (x.dtype for x in inputs if isinstance(x, Tensor) and x.is_floating_point())
    return next(types, torch.get_default_dtype())


def in_type(tree: Any, dtype: torch.dtype | None) -> Any:
    """Every floating-point tensor of a nesting in `dtype`."""
    if dtype is None:
        return tree

    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return tree_map(cast, tree)


_unplanned = ContextVar("unplanned", default=False)


@contextmanager
def unplanned():
    """Inside, no module plans: PyTorch's own calls run."""
    token = _unplanned.set(True)
    try:
        yield
    finally:
        _unplanned.reset(token)


def watched() -> bool:
    """Whether somebody looks at every module call or operator: a function transform, a global hook."""
    return (
        nn.modules.module._has_any_global_hook() or torch._C._functorch.peek_interpreter_stack() is not None
    )


def plannable(module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call may run as a plan: eval mode, no gradient wanted, ordinary tensors, no transform watching."""
    # First, and alone: torch 2.11's compiler cannot read a ContextVar.
    if torch.compiler.is_compiling():
        return False
    if module.training or kwargs or not inputs or _unplanned.get():
        return False
    if torch.jit.is_scripting() or torch.jit.is_tracing():
        return False
    if not all(type(x) in (Tensor, nn.Parameter) for x in inputs):
        return False
    if torch._C._len_torch_dispatch_stack() or watched():
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
    parameter, wanted = next(module.parameters(), None), parameter_dtype(module)
    for position, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            continue
        name = "x" if position == 0 else f"input {position}"
        if parameter is not None and parameter.device != x.device:
            raise ValueError(f"{name}: is on {x.device}, the parameters are on {parameter.device}")
        if position:
            continue
        if options.normalize is not None:
            if x.dtype != torch.uint8:
                raise TypeError(
                    f"{name}: normalize=(mean, std) takes uint8 images, got {dtype_name(x.dtype)}"
                )
        elif x.dtype not in FLOATS:
            hint = (
                "; for uint8 images give accelerate normalize=(mean, std)" if x.dtype == torch.uint8 else ""
            )
            raise TypeError(f"{name}: got {dtype_name(x.dtype)}, takes a floating-point tensor{hint}")
        elif options.dtype is None and wanted is not None and x.dtype != wanted:
            if not torch.is_autocast_enabled(x.device.type):
                raise TypeError(
                    f"{name}: got {dtype_name(x.dtype)}, the parameters are {dtype_name(wanted)}; "
                    f"give accelerate dtype=… or use autocast to compute in another type"
                )
