"""accelerate(model): the same network, another way to run it."""

from __future__ import annotations

import copy
import inspect
import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastres.calls import (
    FLOATS,
    Options,
    check_inputs,
    parameter_dtype,
    plannable,
    wants_gradient,
    watched,
)
from fastres.engine import Engine
from fastres.graph import known
from fastres.graph.capture import CaptureError
from fastres.graph.evaluate import normalize as normalize_images
from fastres.graph.ir import Conv
from fastres.parts import Parts

GRAPHS = ("auto", "off")
TUNES = ("table", "measure", "off")


def accelerate(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    normalize: tuple[Any, Any] | None = None,
    graphs: str = "auto",
    backend: str = "auto",
    tune: str = "table",
) -> nn.Module:
    """The same network, run by fastres: same class (a subclass of it), same parameters, same `state_dict`.

    The result shares everything with `model`: parameters, buffers, submodules, modes. A change of the one is a change
    of the other; `model` itself still runs as it always did. In eval mode without gradients a plan of fused kernels
    runs; in eval mode with gradients, and in training, differentiable fused ops do.

    On a GPU the first call with a shape compiles the plan's kernels and proves them (see `fastres.proof`), which takes
    seconds to a minute; a second process finds both done.

    Args:
        model: any nn.Module; layers that are known run in fused kernels, the rest is called as it is.
        dtype: compute type of inference, one of float32, float64, bfloat16, float16. Parameters stay as they are,
            floating-point inputs are cast on entry, the output comes in this type. None: autocast's type where that is
            on, else the parameters'. Ignored in training.
        normalize: (mean, std), one number a channel: takes uint8 images [N, C, H, W] and computes
            (x / 255 - mean) / std first.
        graphs: "auto" replays a CUDA graph from the second call with the same shapes on; "off" never does.
        backend: "auto", or one family that must run what it can: "reference", "onednn", "cpu", "cudnn", "triton",
            "hopper", "cuda". What it has no kernel for is left to PyTorch.
        tune: where times come from that the plan is chosen by: "table" (measured tables, else estimates), "measure"
            (every candidate is timed at the first call with a shape), "off" (estimates only).

    Returns:
        An object of a subclass of `type(model)` with, beside the model's own: `report()`, `original`, `refold()`,
        `warmup(shapes)`, `release()`. Accelerating it again gives another way to run the same original.

    Raises:
        TypeError: `model` is no nn.Module, or a ScriptModule; `dtype` is no floating-point type.
        ValueError: an unknown backend, `graphs` or `tune`; a `normalize` that is no pair of equally long sequences.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model: got {type(model).__name__}, takes an nn.Module that is no ScriptModule")
    options = _options(dtype, normalize, graphs, backend, tune)
    if isinstance(model, Accelerated):
        if model.options == options:
            return model
        model = model.original
    made = object.__new__(_class_of(type(model)))
    # one state, two classes: neither can be stale against the other
    object.__setattr__(made, "__dict__", model.__dict__)
    object.__setattr__(made, "_fastres", _State(model, Engine(options)))
    made._fastres.look()
    return made


class _State:
    """What an accelerated model has beside its original's state."""

    def __init__(self, original: nn.Module, engine: Engine):
        self.original, self.engine = original, engine
        self.warned = False
        self.parts: Parts | None = None
        self.parts_of: Any = None
        self.why = ""

    def look(self) -> None:
        """Captures the original in its present mode, so that later calls (and torch.compile) find the graph made."""
        self.engine.renew_structure(self.original)
        try:
            self.engine.graph(self.original)
        except CaptureError as error:
            self.why = str(error)


class Accelerated:
    """The methods of accelerated models; see `accelerate`."""

    __slots__ = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: _State = self._fastres
        engine, original = state.engine, state.original
        if torch.compiler.is_compiling():
            graph = engine.prepared.graphs.get(original.training)
            if kwargs or graph is None or isinstance(graph, CaptureError):
                return type(original).forward(original, *args, **kwargs)
            return engine.plain(original, args, graph)
        if watched() or any(isinstance(x, torch.fx.Proxy) for x in args):
            return type(original).forward(original, *args, **kwargs)
        if kwargs:
            args, kwargs = _positional(type(original), args, kwargs)
        try:
            if kwargs:
                raise CaptureError("it was called with keyword arguments that have defaults")
            if plannable(original, args, kwargs):
                return engine(original, args)
            return self._differentiable(args)
        except CaptureError as error:
            return self._by_parts(error, args, kwargs)

    def _differentiable(self, args: tuple) -> Any:
        state: _State = self._fastres
        engine, original = state.engine, state.original
        if original.training:
            args = self._normalized(args)
        else:
            check_inputs(original, args, engine.options)
            self._warn_of_gradients(args)
        engine.renew_structure(original)
        return engine.plain(original, args)

    def _warn_of_gradients(self, args: tuple) -> None:
        state: _State = self._fastres
        if not state.warned and wants_gradient(state.original, args):
            state.warned = True
            warnings.warn(
                "an accelerated model in eval mode was called with gradients wanted: it takes the differentiable path, "
                "which is slower than its plan. Use torch.no_grad() or torch.inference_mode() for inference.",
                stacklevel=7,
            )

    def _by_parts(self, error: CaptureError, args: tuple, kwargs: dict) -> Any:
        """The model's own forward over accelerated submodules, where the whole cannot be traced."""
        state: _State = self._fastres
        engine, original = state.engine, state.original
        state.why = str(error)
        if not original.training:
            self._warn_of_gradients(args)
        with engine.lock:
            watch = engine.renew_structure(original)
            if state.parts is None or state.parts_of is not watch:
                state.parts = Parts(original, lambda child: _part(child, engine.options))
                state.parts_of = watch
        return state.parts(*self._normalized(args), **kwargs)

    def _normalized(self, args: tuple) -> tuple:
        """The arguments with uint8 images normalised, where that was asked for."""
        state: _State = self._fastres
        engine = state.engine
        pair = engine.options.normalize
        if pair is None or not args or not isinstance(args[0], Tensor) or args[0].dtype != torch.uint8:
            return args
        dtype = engine.compute_dtype(state.original, args[0].device)
        return normalize_images(args[0], *pair, dtype), *args[1:]

    @property
    def original(self) -> nn.Module:
        """The model that was accelerated."""
        return self._fastres.original

    @property
    def options(self) -> Options:
        return self._fastres.engine.options

    def report(self, inputs: Any = None, *, measure: bool = True):
        """What ran, node by node. See `fastres.report.Report`.

        Args:
            inputs: example input or shape; default: the last shapes that ran.
            measure: time every step now (on the device at hand); else only predicted times are shown.
        """
        from fastres.report import report

        return report(self, inputs, measure)

    def refold(self) -> None:
        """Prepares all constants again; needed only after a write through `.data` in eval mode."""
        self._fastres.engine.refold()
        for _, part in self._accelerated_parts():
            part.refold()

    def release(self) -> None:
        """Gives up all plans, prepared constants, buffers and CUDA graphs."""
        self._fastres.engine.release()
        self._fastres.parts = None

    def warmup(self, shapes: Any) -> None:
        """Plans and compiles for inputs of these shapes; on a GPU also proves the kernels and captures.

        Args:
            shapes: one shape, e.g. (8, 3, 224, 224), or a list of shapes.
        """
        many = shapes if shapes and isinstance(shapes[0], (tuple, list, torch.Size)) else [shapes]
        if self.training:
            raise ValueError("warmup: the model is in training mode, takes one in eval mode")
        device, dtype = _device_of(self.original), _input_dtype(self)
        with torch.no_grad():
            for shape in many:
                for _ in range(2):
                    self(torch.zeros(tuple(shape), device=device, dtype=dtype))

    def train(self, mode: bool = True):
        self._fastres.original.train(mode)
        self._fastres.engine.expire()
        for _, part in self._accelerated_parts():
            part._fastres.engine.expire()
        self._fastres.look()
        return self

    def _accelerated_parts(self) -> list[tuple[str, nn.Module]]:
        """(name, accelerated submodule), where the model runs in parts."""
        parts = self._fastres.parts
        return (
            [] if parts is None else [(n, m) for n, m in parts.named_modules() if isinstance(m, Accelerated)]
        )

    def __deepcopy__(self, memo):
        return _restore(copy.deepcopy(self._fastres.original, memo), self._fastres.engine.options)

    def __reduce_ex__(self, protocol):
        return _restore, (self._fastres.original, self._fastres.engine.options)

    def __reduce__(self):
        return self.__reduce_ex__(2)

    def __repr__(self) -> str:
        return f"fastres.accelerate({self._fastres.original!r})"


def _restore(original: nn.Module, options: Options) -> nn.Module:
    return accelerate(
        original,
        dtype=options.dtype,
        normalize=options.normalize,
        graphs=options.graphs,
        backend=options.backend,
        tune=options.tune,
    )


@cache
def _class_of(kind: type) -> type:
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return Accelerated.forward(self, *args, **kwargs)

    # torch.export asks for it
    forward.__signature__ = inspect.signature(kind.forward)
    names = {"__slots__": ("_fastres",), "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(f"Accelerated{kind.__name__}", (Accelerated, kind), {"forward": forward, **names})


def _part(child: nn.Module, options: Options) -> nn.Module | None:
    """The child accelerated, if it can be traced and holds a convolution."""
    if known.is_layer(child) or known.has_hooks(child) or isinstance(child, (nn.ModuleList, nn.ModuleDict)):
        return None
    if not any(isinstance(m, nn.Conv2d) for m in child.modules()):
        return None
    made = _restore(child, replace(options, normalize=None))
    graph = made._fastres.engine.prepared.graphs.get(child.training)
    if isinstance(graph, CaptureError) or not any(isinstance(node, Conv) for node in graph.nodes):
        return None
    # the whole model warns for all of its parts
    made._fastres.warned = True
    return made


@cache
def _parameters_of(kind: type) -> tuple[inspect.Parameter, ...]:
    return tuple(inspect.signature(kind.forward).parameters.values())[1:]


def _positional(kind: type, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Keyword arguments of parameters without defaults as positional ones; the rest stays."""
    args, kwargs = list(args), dict(kwargs)
    for parameter in _parameters_of(kind)[len(args) :]:
        plain = parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is parameter.empty
        if not plain or parameter.name not in kwargs:
            break
        args.append(kwargs.pop(parameter.name))
    return tuple(args), kwargs


def _options(dtype, normalize, graphs, backend, tune) -> Options:
    from fastres.backends import FAMILIES

    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype: got {dtype!r}, takes None or one of {', '.join(str(d) for d in FLOATS)}")
    for name, value, known_values in (
        ("graphs", graphs, GRAPHS),
        ("backend", backend, ("auto", *FAMILIES)),
        ("tune", tune, TUNES),
    ):
        if value not in known_values:
            raise ValueError(f"{name}: got {value!r}, takes one of {', '.join(known_values)}")
    return Options(dtype, _normalize_option(normalize), graphs, backend, tune)


def _normalize_option(normalize: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    if normalize is None:
        return None
    try:
        mean, std = (tuple(float(v) for v in part) for part in normalize)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"normalize: got {normalize!r}, takes (mean, std), each one number a channel"
        ) from error
    if len(mean) != len(std) or not mean or not all(std):
        raise ValueError(
            f"normalize: mean has {len(mean)} entries, std {len(std)}; takes as many, and no zero std"
        )
    return mean, std


def _device_of(module: nn.Module) -> torch.device:
    return next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def _input_dtype(model) -> torch.dtype:
    options = model.options
    if options.normalize is not None:
        return torch.uint8
    return options.dtype or parameter_dtype(model.original) or torch.get_default_dtype()
