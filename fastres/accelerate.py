"""accelerate(model): the same network, another way to run it."""

from __future__ import annotations

import logging
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastres.engine import FLOATS, Engine, Options, check_inputs, plannable, wants_gradient
from fastres.graph import known
from fastres.graph.capture import CaptureError
from fastres.graph.evaluate import normalize as normalize_images
from fastres.graph.ir import Conv

log = logging.getLogger("fastres")

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
    made._fastres.look(made)
    return made


class _State:
    """What an accelerated model has beside its original's state."""

    def __init__(self, original: nn.Module, engine: Engine):
        self.original, self.engine = original, engine
        self.warned = False
        self.parts: nn.Module | None = None
        self.why = ""

    def look(self, module: nn.Module) -> None:
        """Captures the module in its present mode, so that later calls (and torch.compile) find the graph made."""
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
            graph = engine.graphs.get(original.training)
            if kwargs or graph is None or isinstance(graph, CaptureError):
                return type(original).forward(original, *args, **kwargs)
            return engine.plain(graph, args)
        try:
            if kwargs:
                raise CaptureError("it was called with keyword arguments")
            graph = engine.graph(original)
            if len(args) != len(graph.inputs):
                raise CaptureError(
                    f"it was called with {len(args)} arguments, its graph takes {len(graph.inputs)}"
                )
        except CaptureError as error:
            return self._by_parts(error, args, kwargs)
        if plannable(original, args, kwargs):
            return engine(original, args)
        if not original.training:
            check_inputs(original, args, engine.options)
        if not original.training and not state.warned and wants_gradient(original, args):
            state.warned = True
            warnings.warn(
                "an accelerated model in eval mode was called with gradients wanted: it takes the differentiable path, "
                "which is slower than its plan. Use torch.no_grad() or torch.inference_mode() for inference.",
                stacklevel=3,
            )
        engine.renew_structure(original)
        return engine.plain(engine.graph(original), args)

    def _by_parts(self, error: CaptureError, args: tuple, kwargs: dict) -> Any:
        """The model's own forward over accelerated submodules, where the whole cannot be traced."""
        state: _State = self._fastres
        engine = state.engine
        state.why = str(error)
        if engine.renew_structure(state.original) or state.parts is None:
            state.parts = _parts(state.original, engine.options)
        if (
            engine.options.normalize is not None
            and args
            and isinstance(args[0], Tensor)
            and args[0].dtype == torch.uint8
        ):
            dtype = engine.compute_dtype(state.original, args[0].device)
            args = (normalize_images(args[0], *engine.options.normalize, dtype), *args[1:])
        return type(state.original).forward(state.parts, *args, **kwargs)

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
        for part in self._accelerated_parts():
            part.refold()

    def release(self) -> None:
        """Gives up all plans, prepared constants, buffers and CUDA graphs."""
        self._fastres.engine.release()
        self._fastres.parts = None

    def warmup(self, shapes: Any) -> None:
        """Plans, compiles and (on a GPU) captures for inputs of these shapes.

        Args:
            shapes: one shape, e.g. (8, 3, 224, 224), or a list of shapes.
        """
        many = shapes if shapes and isinstance(shapes[0], (tuple, list, torch.Size)) else [shapes]
        device, dtype = _device_of(self.original), _input_dtype(self)
        with torch.no_grad():
            for shape in many:
                for _ in range(2):
                    self(torch.zeros(tuple(shape), device=device, dtype=dtype))

    def train(self, mode: bool = True):
        self._fastres.original.train(mode)
        self._fastres.engine.refold()
        self._fastres.look(self)
        return self

    def _accelerated_parts(self) -> list[nn.Module]:
        parts = self._fastres.parts
        return [] if parts is None else [m for m in parts.modules() if isinstance(m, Accelerated)]

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
    return type(
        f"Accelerated{kind.__name__}",
        (Accelerated, kind),
        {"__slots__": ("_fastres",), "__module__": kind.__module__, "__doc__": kind.__doc__},
    )


def _parts(module: nn.Module, options: Options) -> nn.Module:
    """A copy of the module's own shell over the same parameters, in which every submodule that can be traced and holds
    a convolution is accelerated."""
    shell = object.__new__(type(module))
    state = dict(module.__dict__)
    state["_modules"] = {name: child and _part(child, options) for name, child in module._modules.items()}
    object.__setattr__(shell, "__dict__", state)
    return shell


def _part(child: nn.Module, options: Options) -> nn.Module:
    if known.is_layer(child) or not any(isinstance(m, nn.Conv2d) for m in child.modules()):
        return child
    inner = Options(options.dtype, None, options.graphs, options.backend, options.tune)
    if not known.has_hooks(child) and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
        made = _restore(child, inner)
        graph = made._fastres.engine.graphs.get(child.training)
        if not isinstance(graph, CaptureError) and any(isinstance(node, Conv) for node in graph.nodes):
            return made
    return _parts(child, inner)


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
    from fastres.engine import parameter_dtype

    options = model.options
    return torch.uint8 if options.normalize is not None else options.dtype or parameter_dtype(model.original)
