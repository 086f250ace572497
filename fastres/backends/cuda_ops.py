"""The CUDA kernels as functions: schemas of `torch.ops.fastres_cuda`, the primitives, launching by records.

The primitives mean what fastres/ops/torch_primitives.py says; device code is in kernels/cuda. A *record* is a
kernel call that is ready to go (function, grid, parameters with pointers), 1536 bytes of CPU memory. C++
launches a row of them in one call, each overlapping its start with the end of the one before where it can.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastres import native

_LIB = torch.library.Library("fastres_cuda", "DEF")
_BACKWARD = (
    "Tensor grad, Tensor{x} x, Tensor? residual, Tensor? out, Tensor mean, Tensor invstd, Tensor? weight, "
    "Tensor? bias, int act, float act_param"
)
_SCHEMAS = (
    "add_relu(Tensor a, Tensor b, Tensor(a!) out) -> ()",
    "add_relu_backward(Tensor grad, Tensor out, Tensor(a!) grad_in) -> ()",
    "bn_stats(Tensor x, Tensor(c!) scratch, Tensor(a!) mean, Tensor(b!) var) -> ()",
    "bn_finalize(Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, float momentum, float eps, int count, Tensor(c!) invstd, Tensor(d!) scale, "
    "Tensor(e!) shift) -> ()",
    "bn_act(Tensor x, Tensor? residual, Tensor scale, Tensor shift, int act, float act_param, "
    "Tensor(a!) out) -> ()",
    f"bn_act_backward_reduce({_BACKWARD.format(x='')}, Tensor(c!) scratch, Tensor(a!) sum_dy, "
    "Tensor(b!) sum_dy_xhat, Tensor(d!)? grad_residual) -> ()",
    f"bn_act_backward({_BACKWARD.format(x='?')}, Tensor? mean_dy, Tensor? mean_dy_xhat, Tensor(a!) grad_x, "
    "Tensor(b!)? grad_residual) -> ()",
    "bn_act_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor? mean, Tensor? var, bool training, float momentum, float eps, int act, "
    "float act_param, Tensor(c!)? out) -> Tensor[]",
    "bn_act_gradients(Tensor grad, Tensor? x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor invstd, Tensor? out, bool batch_stats, int act, float act_param, int wanted) -> Tensor[]",
    "run_records(Tensor records, int device) -> ()",
    # geometry: filter height and width, stride, padding, dilation (height, width each), groups.
    "sm80_conv_bn_act(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, Tensor out, "
    "Tensor? workspace, Tensor? counters, int[] geometry, int act, float act_param, "
    "int block_m, int block_n, int splits, Tensor(a!) record) -> ()",
    # box: images, rows and columns of output pixels that a block takes.
    "sm90_conv_latency(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, Tensor out, "
    "int[] geometry, int act, float act_param, Tensor? second, int[] second_stride, int[] box, int filters, "
    "int cluster, Tensor(a!) record) -> ()",
    "sm90_conv_bn_act(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, Tensor out, "
    "Tensor counter, int[] geometry, int act, float act_param, Tensor? second, Tensor? second_weight, "
    "int[] second_stride, int filters, int pixels, int cluster, bool by_position, Tensor(a!) record) -> ()",
    "sm90_conv_stats(Tensor x, Tensor weight, Tensor(a!) out, Tensor(b!) counter, Tensor(c!) scratch, "
    "int[] geometry, int filters, int pixels, int cluster, bool by_position, Tensor(d!) mean, Tensor(e!) var) -> ()",
    # conv, expand, reduce: (scale, shift) by channel, [C, 2].
    "sm90_shifted_block(Tensor x, Tensor conv_weight, Tensor conv, Tensor expand_weight, Tensor expand, "
    "Tensor? reduce_weight, Tensor? reduce, Tensor residual, Tensor out, Tensor? next, Tensor counter, "
    "Tensor(a!) record) -> ()",
    # normalize: (factor, offset) by channel of uint8 images, [3, 2]; constants: (|scale|, shift), [64, 2].
    "sm90_stem_pool(Tensor x, Tensor weight, Tensor constants, Tensor? normalize, Tensor out, int rows, "
    "Tensor(a!) record) -> ()",
    "any_max_pool(Tensor x, Tensor out, int[] window, Tensor(a!) record) -> ()",
    "any_pool_linear(Tensor x, Tensor weight, Tensor? bias, Tensor out, Tensor workspace, Tensor counters, "
    "Tensor(a!) record) -> ()",
)
for _schema in _SCHEMAS:
    _LIB.define(_schema)
_ops = torch.ops.fastres_cuda

RECORD_BYTES = 1536
_MAX_CHUNKS = 512  # of any_bn_act.h
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def why_not(dtype: torch.dtype) -> str | None:
    """None if the primitives run here for tensors of `dtype`, else the reason."""
    if dtype not in _DTYPES:
        return f"no {str(dtype).removeprefix('torch.')} kernels"
    return native.available("cuda")


def _call(op: Callable, *args) -> None:
    """C++ says which argument is wrong; Python gives it its type."""
    try:
        op(*args)
    except RuntimeError as error:
        # Only the first line: PyTorch appends a C++ stack trace.
        text = str(error).splitlines()[0]
        for kind in (TypeError, ValueError):
            at = text.find(f"{kind.__name__}: ")
            if at >= 0:
                raise kind(text[at + len(kind.__name__) + 2 :]) from None
        raise


def _reduce_scratch(x: Tensor) -> Tensor:
    channels = x.shape[1]
    values = x.numel() // max(channels, 1)
    size = 8 if x.dtype == torch.float64 else 4
    return x.new_empty(min(_MAX_CHUNKS, values // 8 + 1) * channels * 3 * size, dtype=torch.uint8)


def add_relu(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = max(a + b, 0); out may be a or b."""
    _call(_ops.add_relu, a, b, out)


def add_relu_backward(grad: Tensor, out: Tensor, grad_in: Tensor) -> None:
    """grad_in = grad where out > 0 (or NaN), else 0; grad_in may be grad."""
    _call(_ops.add_relu_backward, grad, out, grad_in)


def bn_stats(x: Tensor, mean: Tensor, var: Tensor) -> None:
    """Mean and biased variance of every channel; the same bits every time, on every GPU."""
    _call(_ops.bn_stats, x, _reduce_scratch(x), mean, var)


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
    """invstd, scale, shift and the running statistics, for all channels in one launch."""
    _call(
        _ops.bn_finalize,
        mean,
        var,
        weight,
        bias,
        running_mean,
        running_var,
        momentum,
        eps,
        count,
        invstd,
        scale,
        shift,
    )


def bn_act(
    x: Tensor, residual: Tensor | None, scale: Tensor, shift: Tensor, act: int, act_param: float, out: Tensor
) -> None:
    """out = act(x * scale[c] + shift[c] + residual); out may be x."""
    _call(_ops.bn_act, x, residual, scale, shift, act, act_param, out)


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
    """With dz = grad * act'(z): sum_dy = sum dz; sum_dy_xhat = sum dz * (x - mean) * invstd; grad_residual = dz."""
    shared = (grad, x, residual, out, mean, invstd, weight, bias, act, act_param)
    _call(_ops.bn_act_backward_reduce, *shared, _reduce_scratch(grad), sum_dy, sum_dy_xhat, grad_residual)


def bn_act_backward(
    grad: Tensor,
    x: Tensor | None,
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
    """grad_x = weight * invstd * (dz - mean_dy - xhat * mean_dy_xhat); grad_residual = dz."""
    shared = (grad, x, residual, out, mean, invstd, weight, bias, act, act_param)
    _call(_ops.bn_act_backward, *shared, mean_dy, mean_dy_xhat, grad_x, grad_residual)


# One call each way for all of bn_act, as they are: on small tensors every frame counts. backends/cpu_ops.py says what
# they take and return; here running statistics are float64 exactly where the activations are.
bn_act_forward = _ops.bn_act_forward.default
bn_act_gradients = _ops.bn_act_gradients.default


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
    """out = conv2d(x, weight), one group, with the mean and biased variance of each channel before it is rounded.
    x and out are channels_last."""
    from fastres.backends.cuda import conv_stats as kernel

    kernel.launch(x, weight, kernel.spec_of(x, weight, stride, padding, dilation, groups), out, mean, var)


def conv_stats_takes(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> bool:
    """Whether `conv_stats` can compute this and is believed to be no slower than two passes."""
    from fastres.backends.cuda import conv_stats as kernel

    return kernel.takes(x, kernel.spec_of(x, weight, stride, padding, dilation, groups))


class RecordLaunch:
    """One C++ call that launches the kernels of `records`, in order, on the current stream.

    A launch that CUDA refuses raises LaunchError. What is joined has one record each.

    Args:
        records: uint8 on the CPU, a multiple of RECORD_BYTES.
        device: index of the GPU.
        keep: everything that the records point to.
    """

    def __init__(self, records: Tensor, device: int, keep: Sequence) -> None:
        self.records, self.device, self.keep = records, device, keep
        self._run = _ops.run_records.default

    def __call__(self) -> None:
        try:
            self._run(self.records, self.device)
        except RuntimeError as error:
            text = str(error).splitlines()[0]
            if (found := re.search(r"records\[(\d+)\] ", text)) is None:
                raise
            raise LaunchError(text[found.end() :], int(found[1])) from None

    @staticmethod
    def join(launches: Sequence[RecordLaunch]) -> RecordLaunch:
        """One launch that does what these do."""
        records = torch.cat([launch.records for launch in launches])
        return RecordLaunch(records, launches[0].device, [launch.keep for launch in launches])


class LaunchError(RuntimeError):
    """CUDA refused a launch. `index`: of its record, and so of the joined launch that it came from."""

    def __init__(self, text: str, index: int) -> None:
        super().__init__(text)
        self.index = index


def make_record(op: Callable, *args) -> Tensor:
    """The record that `op(*args, record)` fills in."""
    record = torch.empty(RECORD_BYTES, dtype=torch.uint8)
    _call(op, *args, record)
    return record
