"""From a kernel and its arguments to a callable that launches it with next to no host time.

`kernel[grid](...)` inspects and hashes every argument on each call, 20-50 us. A plan binds once and runs
often, so the compiled kernel is looked up once (`warmup`) and only its launcher is called again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Call:
    """One kernel launch, described without a device: what `resolve` launches and the compile gate compiles.

    Attributes:
        kernel: a `@triton.jit` function.
        args: every parameter by name, compile-time ones too.
        programs: how many programs there is work for.
        num_warps, num_stages: compile options.
        multiple: 0: one program a piece of work. Else the kernel is persistent: it gets as many programs as
            fit on the device at once, a multiple of this, at most `programs`.
    """

    kernel: Any
    args: dict[str, Any]
    programs: int
    num_warps: int = 4
    num_stages: int = 3
    multiple: int = 0

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    @property
    def positional(self) -> list[Any]:
        return [self.args[name] for name in self.kernel.arg_names]


def interpreted() -> bool:
    """True where Triton runs kernels in Python on CPU tensors (TRITON_INTERPRET=1)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def resolve(call: Call, device: torch.device) -> Callable[[], None]:
    """Compile `call` for `device` and bind it. It runs on the current stream of the current device."""
    if interpreted():
        # Two programs a multiple, so that a persistent loop takes more than one step in a test.
        programs = min(call.programs, 2 * call.multiple) if call.multiple else call.programs
        return lambda: call.kernel[(programs,)](**call.args, **call.options)
    from triton.runtime.driver import driver

    with torch.cuda.device(device):
        compiled = call.kernel.warmup(*call.positional, grid=(1,), **call.options)
        compiled = compiled.result() if hasattr(compiled, "result") else compiled
        run = compiled.run
    programs = call.programs
    if call.multiple:
        fit = _resident(compiled, call.num_warps, device)
        programs = min(programs, max(fit // call.multiple, 1) * call.multiple)
    function, metadata, args = compiled.function, compiled.packed_metadata, call.positional
    get_stream, index = driver.active.get_current_stream, torch.device(device).index or 0

    def launch() -> None:
        run(programs, 1, 1, get_stream(index), function, metadata, None, None, None, *args)

    return launch


def sequence(launches: Sequence[Callable[[], None]]) -> Callable[[], None]:
    """One launch that performs several in order."""
    if len(launches) == 1:
        return launches[0]

    def launch() -> None:
        for one in launches:
            one()

    return launch


def _resident(compiled: Any, num_warps: int, device: torch.device) -> int:
    """How many programs of a compiled kernel fit on the device at once."""
    properties = torch.cuda.get_device_properties(device)
    threads = num_warps * properties.warp_size
    registers = max(compiled.n_regs, 1) * threads
    # PyTorch names neither on every build for AMD, where a compute unit has 64 KB of shared memory.
    shared = getattr(properties, "shared_memory_per_multiprocessor", 64 * 1024)
    held = getattr(properties, "regs_per_multiprocessor", 65536)
    # Each block takes 1 KB of shared memory beside its own (CUDA programming guide, from capability 8.0).
    each_sm = min(
        shared // (compiled.metadata.shared + 1024),
        held // registers,
        properties.max_threads_per_multi_processor // threads,
    )
    return max(each_sm, 1) * properties.multi_processor_count


def rows(tensor: Tensor) -> Tensor:
    """[N, C, H, W] in channels_last, or [N, C], as the matrix [N H W, C] that its memory is."""
    return tensor.permute(0, 2, 3, 1).reshape(-1, tensor.shape[1]) if tensor.dim() == 4 else tensor


def descriptor(matrix: Tensor, block: Sequence[int]) -> Any:
    """A host-side tensor descriptor over a row-major matrix: TMA where the GPU has it, pointers elsewhere."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrix, list(matrix.shape), [matrix.shape[1], 1], list(block))
