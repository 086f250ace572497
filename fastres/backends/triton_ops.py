"""The raw primitives of training on CUDA, by Triton: names and meaning as on the other devices.

Tensors x, residual, grad, out are dense, NCHW-contiguous or channels_last, [N, C, *spatial], all with equal
strides; statistics and parameters are [C], fp32 (fp64 for fp64 x). Outputs are given; scratch memory for the
two-stage reductions comes from PyTorch's allocator. Nothing is checked here: that is done by the callers.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastres.backends.triton_portable.base import LIMIT, shared_limit
from fastres.backends.triton_portable.launch import descriptor, interpreted, rows
from fastres.kernels.triton import add_relu as _add_relu
from fastres.kernels.triton import bn_act as _bn_act
from fastres.kernels.triton import conv_stats as _conv_stats
from fastres.plan.problem import ConvSpec, Target
from fastres.plan.target import detect
from fastres.tuning.portable_config import ConvConfig, conv_stats_config

_BLOCK = 2048  # elements a program of 4 warps: 16 a thread, two 16-byte loads in bf16
_PROGRAMS = (
    8 * 132
)  # of a reduction: eight for each multiprocessor of an H100; fixed, so that bits do not vary
_CHANNELS = 128  # a program, one each thread
_WARPS = 4
# Of conv_stats: as many as stay on an H100 at once, or half of them do, so each fills its pipeline once or twice.
_CONV_PROGRAMS = 2 * 132
_MOST_TILES = 128  # of a chunk of conv_stats: its error may grow with them


def add_relu(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = max(a + b, 0); out may be a or b."""
    n = a.numel()
    _launch(_add_relu.add_relu_fwd_kernel, -(-n // _BLOCK), a, b, out, n, _BLOCK)


def add_relu_backward(grad: Tensor, out: Tensor, grad_in: Tensor) -> None:
    """grad_in = grad where out > 0 (or NaN), else 0; grad_in may be grad."""
    n = out.numel()
    _launch(_add_relu.add_relu_bwd_kernel, -(-n // _BLOCK), grad, out, grad_in, n, _BLOCK)


def bn_stats(x: Tensor, mean: Tensor, var: Tensor) -> None:
    """Mean and biased variance of each channel."""
    s = _Shape(x)
    chunks, chunk = s.chunks()
    part = torch.empty((2, chunks, s.c), dtype=mean.dtype, device=x.device)
    _launch(
        _bn_act.bn_stats_kernel,
        chunks * s.c_tiles,
        *(x, part[0], part[1], s.m, s.c, s.hw, chunk),
        *(s.channels_last, s.wide, s.block_m, s.block_c),
    )
    _merge_statistics(part, mean, var, s.m, chunk)


def conv_stats(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    out: Tensor,
    mean: Tensor,
    var: Tensor,
) -> None:
    """out = conv2d(x, weight), 1x1 of stride 1 without padding or groups, with the mean and biased variance of
    each channel before it is rounded. x and out are channels_last; fp32 is multiplied in TF32."""
    n, c, h, w = x.shape
    spec, m = ConvSpec(n, c, h, w, weight.shape[0], (1, 1)), n * h * w
    config, descriptors = _conv_config(spec, x, weight)
    chunks, chunk = _conv_chunks(m, spec.k, config)
    part = torch.empty((2, chunks, spec.k), dtype=mean.dtype, device=x.device)
    matrices = (rows(x), weight.reshape(spec.k, c).contiguous(), rows(out))
    if descriptors:
        boxes = ((config.block_m, config.block_k), (config.block_n, config.block_k))
        boxes += ((config.block_m, config.block_n),)
        matrices = [descriptor(*pair) for pair in zip(matrices, boxes, strict=True)]
    _launch(
        _conv_stats.conv_stats_kernel,
        chunks * -(-spec.k // config.block_n),
        *(*matrices, part[0], part[1], m, chunk, c, spec.k),
        *(descriptors, not descriptors and m * max(c, spec.k) >= LIMIT, "tf32"),
        *(config.block_m, config.block_n, config.block_k, config.num_stages),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    _merge_statistics(part, mean, var, m, chunk)


def conv_stats_takes(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> bool:
    """Whether `conv_stats` can compute this, and is believed to be no slower than cuDNN's convolution and then
    `bn_stats`. Unmeasured as a whole. On an H100 at batch 256 the products alone were within 3 % of cuDNN's at
    56x56 and 28x28 with up to 512 input channels, and up to 5 % slower with 1024 at 14x14, where the read of a
    small output that is saved comes from the L2. So: Hopper, up to 512 input channels, and no fewer than 2^15
    pixels, as 14x14 has at batch 168: below that nothing was measured."""
    n, c, h, w = x.shape
    if tuple(weight.shape[2:]) != (1, 1) or tuple(stride) != (1, 1) or any(padding) or groups != 1:
        return False
    if x.dtype not in (torch.bfloat16, torch.float16) and not (
        x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    ):
        return False
    if not x.is_contiguous(memory_format=torch.channels_last) or not 2**15 <= n * h * w <= 2**30:
        return False
    return c <= 512 and _target(x).capability == 90


def bn_finalize(
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    count: int,
    invstd: Tensor,
    scale: Tensor,
    shift: Tensor,
) -> None:
    """invstd, scale, shift and the running statistics of all channels in one launch."""
    c = mean.numel()
    _launch(
        _bn_act.bn_finalize_kernel,
        -(-c // _CHANNELS),
        *(mean, var, _or(weight, mean), _or(bias, mean), _or(running_mean, mean), _or(running_var, mean)),
        *(invstd, scale, shift, c, count, _bits(momentum), _bits(eps)),
        *(weight is not None, bias is not None, running_mean is not None, _CHANNELS),
    )


def bn_act(
    x: Tensor, residual: Tensor | None, scale: Tensor, shift: Tensor, act: int, act_param: float, out: Tensor
) -> None:
    """out = act(x * scale[c] + shift[c] + residual); out may be x."""
    s = _Shape(x)
    _launch(
        _bn_act.bn_act_fwd_kernel,
        -(-s.m // s.block_m) * s.c_tiles,
        *(x, x if residual is None else residual, scale, shift, out, s.m, s.c, s.hw),
        *(act, act_param, residual is not None),
        *(s.channels_last, s.wide, s.block_m, s.block_c),
    )


def bn_act_backward_reduce(
    grad: Tensor,
    x: Tensor,
    residual: Tensor | None,
    out: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    act: int,
    act_param: float,
    sum_dy: Tensor,
    sum_dy_xhat: Tensor,
    grad_residual: Tensor | None = None,
) -> None:
    """sum_dy = sum dz, sum_dy_xhat = sum dz * xhat, with dz = grad * act'(z), xhat = (x - mean) * invstd;
    grad_residual = dz."""
    s = _Shape(x)
    chunks, chunk = s.chunks()
    part = torch.empty((2, chunks, s.c), dtype=mean.dtype, device=x.device)
    _launch(
        _bn_act.bn_act_bwd_reduce_kernel,
        chunks * s.c_tiles,
        *(grad, x, _or(residual, x), _or(out, x), mean, invstd, _or(weight, mean), _or(bias, mean)),
        *(part[0], part[1], _or(grad_residual, grad), s.m, s.c, s.hw, chunk),
        *(act, act_param, residual is not None, out is not None, weight is not None, bias is not None),
        *(grad_residual is not None, s.channels_last, s.wide, s.block_m, s.block_c),
    )
    programs, block_j, block_c = _merge(s.c, chunks)
    _launch(
        _bn_act.bn_act_bwd_merge_kernel,
        programs,
        *(part[0], part[1], sum_dy, sum_dy_xhat, s.c, chunks, block_j, block_c),
    )


def bn_act_backward(
    grad: Tensor,
    x: Tensor,
    residual: Tensor | None,
    out: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    act: int,
    act_param: float,
    mean_dy: Tensor | None,
    mean_dy_xhat: Tensor | None,
    grad_x: Tensor,
    grad_residual: Tensor | None,
) -> None:
    """grad_x = weight * invstd * (dz - mean_dy - xhat * mean_dy_xhat), grad_residual = dz; without `mean_dy`
    the statistics are constants. grad_x or grad_residual may be grad."""
    s = _Shape(x)
    _launch(
        _bn_act.bn_act_bwd_kernel,
        -(-s.m // s.block_m) * s.c_tiles,
        *(grad, x, _or(residual, x), _or(out, x), mean, invstd, _or(weight, mean), _or(bias, mean)),
        *(_or(mean_dy, mean), _or(mean_dy_xhat, mean), grad_x, _or(grad_residual, grad_x), s.m, s.c, s.hw),
        *(act, act_param, residual is not None, out is not None, weight is not None, bias is not None),
        *(mean_dy is not None, grad_residual is not None),
        *(s.channels_last, s.wide, s.block_m, s.block_c),
    )


class _Shape:
    """How a tensor is cut into tiles of [block_m rows, block_c channels]."""

    def __init__(self, x: Tensor):
        n, c = x.shape[:2]
        self.c, self.hw = c, math.prod(x.shape[2:])
        self.m = n * self.hw
        # Channels last: the channels are what lies side by side (or there is one element a plane).
        self.channels_last = self.hw == 1 or (c > 1 and x.stride(1) == 1)
        if self.channels_last:
            self.block_c = min(_pow2(c), 64)
            self.block_m = _BLOCK // self.block_c
        else:
            self.block_c, self.block_m = 1, min(_BLOCK, max(_pow2(self.m), 32))
        self.c_tiles = -(-c // self.block_c)
        self.wide = x.numel() >= 2**31

    def chunks(self) -> tuple[int, int]:
        """(how many, rows of each) for a reduction."""
        tiles = -(-self.m // self.block_m)
        chunks = min(tiles, max(1, _PROGRAMS // self.c_tiles))
        chunk = -(-tiles // chunks) * self.block_m
        return -(-self.m // chunk), chunk


def _target(x: Tensor) -> Target:
    return detect(x.device)


def _conv_config(spec: ConvSpec, x: Tensor, weight: Tensor) -> tuple[ConvConfig, bool]:
    """(tile, whether matrices are read through descriptors: they start and step by 16 bytes)."""
    size, target = x.element_size(), _target(x)
    aligned = not any(v % 16 for v in (spec.c * size, spec.k * size, x.data_ptr(), weight.data_ptr()))
    config = conv_stats_config(spec, size, target, shared_limit(target), aligned)
    return config, config.form != "implicit"


def _conv_chunks(m: int, k: int, config: ConvConfig) -> tuple[int, int]:
    """(how many, rows of each)."""
    tiles = -(-m // config.block_m)
    chunks = min(tiles, max(1, _CONV_PROGRAMS // -(-k // config.block_n)))
    chunk = min(-(-tiles // chunks), _MOST_TILES) * config.block_m
    return -(-m // chunk), chunk


def _merge_statistics(part: Tensor, mean: Tensor, var: Tensor, m: int, chunk: int) -> None:
    """mean and var from those of chunks of rows, part [2, chunks, C]."""
    _, chunks, c = part.shape
    programs, block_j, block_c = _merge(c, chunks)
    _launch(
        _bn_act.bn_stats_merge_kernel,
        programs,
        *(part[0], part[1], mean, var, m, c, chunk, chunks, block_j, block_c),
    )


def _merge(c: int, chunks: int) -> tuple[int, int, int]:
    """(programs, parts a step, channels a program) of a second stage: 32-byte rows, few dependent steps."""
    block_c = min(_pow2(c), 8)
    return -(-c // block_c), min(_pow2(chunks), 256), block_c


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A kernel argument that is not read: any tensor of the right kind."""
    return other if tensor is None else tensor


def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _pow2(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


_compiled: dict[tuple, Any] = {}


@cache
def _constexprs(kernel: Any) -> tuple[bool, ...]:
    return tuple(parameter.is_constexpr for parameter in kernel.params)


def _launch(kernel: Any, programs: int, *args: Any, num_warps: int = _WARPS, num_stages: int = 3) -> None:
    """`kernel[(programs,)](*args)` at less host time (see triton_portable/launch.py)."""
    if not programs:
        return
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if interpreted():
        kernel[(programs,)](*args, **options)
        return
    from triton.runtime.driver import driver

    first = args[0] if isinstance(args[0], Tensor) else args[0].base
    index = first.device.index
    if index != torch.cuda.current_device():
        with torch.cuda.device(index):
            _launch(kernel, programs, *args, num_warps=num_warps, num_stages=num_stages)
        return
    key = [kernel, index, num_warps, num_stages]
    for arg, constant in zip(args, _constexprs(kernel), strict=True):
        if constant:
            key.append(arg)
        elif isinstance(arg, Tensor):
            key.append((arg.dtype, arg.data_ptr() % 16))
        elif isinstance(arg, int):
            # What Triton specialises an integer by: 1, divisible by 16, 32 bits.
            key.append((arg == 1, arg % 16 == 0, arg < 2**31))
        else:
            key.append((arg.base.dtype, *arg.block_shape))
    compiled = _compiled.get(key := tuple(key))
    if compiled is None:
        compiled = kernel.warmup(*args, grid=(1,), **options)
        compiled = compiled.result() if hasattr(compiled, "result") else compiled
        _compiled[key] = compiled
    stream = driver.active.get_current_stream(index)
    run = compiled.run
    run(programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *args)
