"""The `fastres` namespace of PyTorch operators, and the one way in which an op enters it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import _C
from torch.autograd import _profiler_enabled, forward_ad
from torch.autograd.graph import increment_version as count_versions

LIB = torch.library.Library("fastres", "FRAGMENT")
_DEVICES = ("CPU", "CUDA")
_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))
_ORDINARY = _TENSORS | {type(None), bool, int, float, str, list, tuple}
_AUTOCAST = _C.DispatchKeySet(_C.DispatchKey.AutocastCPU) | _C.DispatchKeySet(_C.DispatchKey.AutocastCUDA)


def register(
    schema: str,
    impl: Callable,
    fake: Callable,
    *,
    autograd: Callable | None = None,
    autocast: Callable | None = None,
    direct: Callable | None = None,
) -> Callable:
    """Define `fastres::<schema>`, give it everything that PyTorch may ask of it, and return how it is called.

    Args:
        schema: name, arguments (all positional, none with a default) and results.
        impl: computes on real tensors, CPU and CUDA alike; it chooses the backend.
        fake: shapes, dtypes and strides of the results, for tracing.
        autograd: `(below, *args)`, called when a gradient is wanted; `below(*args)` is the op without
            autograd.
        autocast: `(dtype, *args) -> args` under `torch.autocast`; without it the op runs in its inputs'
            dtypes.
        direct: what stands for `autograd` where `below` is `impl` itself; default `autograd`.

    Returns:
        The op as a function, which goes through the dispatcher only where somebody would see the difference (see
        `unwatched`); its attribute `op` is the operator itself.

    Autograd stands on the Autograd dispatch key, so that `torch.ops.fastres.*` are differentiable too: that
    costs less a call than `torch.library.register_autograd` and lets the formula choose what it saves.
    """
    name = schema[: schema.index("(")]
    LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.fastres, name).default
    computes = counting_versions(op, impl)
    for device in _DEVICES:
        LIB.impl(name, computes, device)
    torch.library.register_fake(f"fastres::{name}", fake, lib=LIB)
    LIB.impl(name, _on_autograd_key(op, autograd), "Autograd", with_keyset=True)
    if autocast is not None:
        for device in _DEVICES:
            LIB.impl(name, _on_autocast_key(op, autocast, device), f"Autocast{device}")
    return _caller(op, computes, direct or autograd, autocast)


def _caller(
    op: torch._ops.OpOverload, computes: Callable, direct: Callable | None, autocast: Callable | None
):
    def call(*args):
        if not unwatched(args):
            return op(*args)
        if autocast is not None and _C._is_any_autocast_enabled():
            device = args[0].device.type
            if torch.is_autocast_enabled(device):
                # Below autocast's dispatch key ops run in their inputs' dtypes.
                with _C._ExcludeDispatchKeyGuard(_AUTOCAST):
                    return below_autocast(*autocast(torch.get_autocast_dtype(device), *args))
        return below_autocast(*args)

    def below_autocast(*args):
        if direct is not None and _C.is_grad_enabled() and _C._any_requires_grad(*args):
            return direct(computes, *args)
        return computes(*args)

    call.op = op
    return call


def counting_versions(op: torch._ops.OpOverload, impl: Callable) -> Callable:
    """`impl` that counts a version of what it writes, whatever kernel wrote it: caches are keyed by versions."""
    arguments = enumerate(op._schema.arguments)
    written = [i for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]
    if not written:
        return impl

    def counting(*args):
        result = impl(*args)
        count_versions([args[i] for i in written if args[i] is not None])
        return result

    return counting


def _on_autograd_key(op: torch._ops.OpOverload, autograd: Callable | None) -> Callable:
    def kernel(keyset, *args):
        def below(*args):
            with _C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & _C._after_autograd_keyset, *args)

        if _C.is_grad_enabled() and _C._any_requires_grad(*args):
            if autograd is None:
                raise RuntimeError(f"{op}: has no derivative, but an input requires a gradient")
            return autograd(below, *args)
        if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
            raise RuntimeError(f"{op}: has no forward-mode derivative, but an input has a tangent")
        return below(*args)

    return kernel


def _on_autocast_key(op: torch._ops.OpOverload, autocast: Callable, device: str) -> Callable:
    keys = _C.DispatchKeySet(getattr(_C.DispatchKey, f"Autocast{device}"))
    device_type = device.lower()

    def kernel(*args):
        dtype = torch.get_autocast_dtype(device_type)
        with _C._ExcludeDispatchKeyGuard(keys):
            return op(*autocast(dtype, *args))

    return kernel


def _has_tangent(arg: object) -> bool:
    return isinstance(arg, torch.Tensor) and forward_ad.unpack_dual(arg).tangent is not None


def unwatched(args: Sequence[object]) -> bool:
    """Whether an op may be computed without the dispatcher, because nobody would see the difference.

    The dispatcher enters Python twice a call, which costs about as much as all else that the host does.
    False for subclasses and meta tensors, under torch.compile, tracing, function transforms, dispatch and
    function modes, in forward-mode differentiation, and where a profiler wants the op's name. Autocast is the
    caller's affair. The first of `args` is a tensor, the others what operators take.
    """
    if torch.compiler.is_compiling():
        return False
    x = args[0]
    return (
        _ORDINARY.issuperset(map(type, args))
        and type(x) in _TENSORS
        and (x.is_cpu or x.is_cuda)
        and forward_ad._current_level < 0
        and not _C._len_torch_dispatch_stack()
        and not _C._len_torch_function_stack()
        and _C._functorch.peek_interpreter_stack() is None
        and _C._get_tracing_state() is None
        and not _profiler_enabled()
    )


def autocast_to(dtype: torch.dtype, t: torch.Tensor | None) -> torch.Tensor | None:
    """`t` in autocast's `dtype`, under PyTorch's own rule: fp64 and integers stay as they are."""
    if t is None or not t.is_floating_point() or t.dtype == torch.float64:
        return t
    return t.to(dtype)
