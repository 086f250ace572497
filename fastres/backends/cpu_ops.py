"""The C++ CPU kernels of kernels/cpu as Python functions.

Call them once `fastres.native.available("cpu")` has returned None. They write into tensors passed in and
allocate nothing that outlives the call.

Activations are [N, C, *spatial], dense, contiguous or channels_last, float32, float64, bfloat16 or float16;
all activations of one call have the first one's shape, dtype and memory format. Parameters and statistics are
[C], float32 (float64 with float64 activations). Arithmetic is float32 (float64). Results do not depend on the
number of threads. Wrong arguments raise TypeError (element type) or ValueError, from the C++ side, before
anything is written. `act` is an activation's code and `act_param` its parameter, as in `fastres.activation`.
"""

import torch
from torch import Tensor

_SCHEMAS = """
add_relu(Tensor a, Tensor b, Tensor(a!) out) -> ()
add_relu_backward(Tensor grad, Tensor out, Tensor(a!) grad_in) -> ()
bn_stats(Tensor x, Tensor(a!) mean, Tensor(b!) var) -> ()
bn_finalize(Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, \
Tensor(b!)? running_var, float momentum, float eps, int count, Tensor(c!) invstd, Tensor(d!) scale, \
Tensor(e!) shift) -> ()
bn_act(Tensor x, Tensor? residual, Tensor scale, Tensor shift, int act, float act_param, Tensor(a!) out) -> ()
bn_act_backward_reduce(Tensor grad, Tensor x, Tensor? residual, Tensor? out, Tensor mean, Tensor invstd, \
Tensor? weight, Tensor? bias, int act, float act_param, Tensor(a!) sum_dy, Tensor(b!) sum_dy_xhat, \
Tensor(c!)? grad_residual) -> ()
bn_act_backward(Tensor grad, Tensor x, Tensor? residual, Tensor? out, Tensor mean, Tensor invstd, \
Tensor? weight, Tensor? bias, int act, float act_param, Tensor? mean_dy, Tensor? mean_dy_xhat, \
Tensor(a!) grad_x, Tensor(b!)? grad_residual) -> ()
bn_act_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, \
Tensor(b!)? running_var, Tensor? mean, Tensor? var, bool training, float momentum, float eps, int act, \
float act_param, Tensor(c!)? out) -> Tensor[]
bn_act_gradients(Tensor grad, Tensor? x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, \
Tensor invstd, Tensor? out, bool batch_stats, int act, float act_param, int wanted) -> Tensor[]
max_pool2d(Tensor x, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, Tensor(a!) out) -> ()
global_avg_pool(Tensor x, Tensor(a!) out) -> ()
to_nhwc(Tensor x, Tensor(a!) out) -> ()
winograd_pack(Tensor weight, Tensor(a!) packed) -> ()
winograd_conv_bn_act(Tensor x, Tensor packed, Tensor shift, Tensor? residual, int act, float act_param, \
int[2] padding, Tensor(a!) out) -> ()
"""

_library = torch.library.Library("fastres_cpu", "DEF")
for _schema in _SCHEMAS.strip().splitlines():
    _library.define(_schema)
_ops = torch.ops.fastres_cpu

_KINDS = {"TypeError: ": TypeError, "ValueError: ": ValueError}


def _call(op, *args) -> None:
    try:
        op(*args)
    except RuntimeError as error:
        # C++ can only throw a runtime error across the stable ABI; its kind stands in front of the message.
        for prefix, kind in _KINDS.items():
            if (message := str(error)).startswith(prefix):
                raise kind(message.removeprefix(prefix).splitlines()[0]) from None
        raise


def add_relu(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = max(a + b, 0). `out` may be `a` or `b`."""
    _call(_ops.add_relu.default, a, b, out)


def add_relu_backward(grad: Tensor, out: Tensor, grad_in: Tensor) -> None:
    """grad_in = grad where out > 0, else 0. `grad_in` may be `grad`."""
    _call(_ops.add_relu_backward.default, grad, out, grad_in)


def bn_stats(x: Tensor, mean: Tensor, var: Tensor) -> None:
    """Mean and biased variance of each channel. Raises ValueError if a channel has no values."""
    _call(_ops.bn_stats.default, x, mean, var)


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
    """invstd = 1 / sqrt(var + eps), scale = weight * invstd, shift = bias - mean * scale, and the running
    statistics of any float dtype, moved by `momentum` towards the mean and the unbiased variance of `count`."""
    running = running_mean, running_var
    args = (mean, var, weight, bias, *running, momentum, eps, count, invstd, scale, shift)
    _call(_ops.bn_finalize.default, *args)


def bn_act(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    act: int,
    act_param: float,
    out: Tensor,
) -> None:
    """out = act(x * scale[c] + shift[c] + residual). `out` may be `x` or `residual`."""
    _call(_ops.bn_act.default, x, residual, scale, shift, act, act_param, out)


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
    """Per channel sum_dy = sum(dz) and sum_dy_xhat = sum(dz * xhat); grad_residual = dz if it is given.

    dz = grad * act'(z), z = xhat * weight + bias + residual, xhat = (x - mean) * invstd. For ReLU with `out`
    given, its mask is out > 0; otherwise z is computed again.
    """
    args = (grad, x, residual, out, mean, invstd, weight, bias, act, act_param, sum_dy, sum_dy_xhat)
    _call(_ops.bn_act_backward_reduce.default, *args, grad_residual)


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
    """grad_x = weight * invstd * (dz - mean_dy - xhat * mean_dy_xhat); grad_residual = dz.

    Without the means (constant statistics, as in eval mode) grad_x = weight * invstd * dz. `grad_x` may be
    `grad` or `x`.
    """
    args = (grad, x, residual, out, mean, invstd, weight, bias, act, act_param, mean_dy, mean_dy_xhat)
    _call(_ops.bn_act_backward.default, *args, grad_x, grad_residual)


# One call each way for all of bn_act, as they are: on small tensors every frame counts. The arguments are those of
# the schemas above; [] is returned, and nothing written, where an argument is not as the passes take it or there are no
# values.
#
# bn_act_forward, `bn_stats`, `bn_finalize` and `bn_act`: with `training` [out, mean, 1 / sqrt(var + eps)] of the batch
# (more than one value a channel), else [out, 1 / sqrt(var + eps)] of the running statistics. What is given is not
# returned: mean (with var: the batch's, known already) and `out`, which is written into and may be `x`.
bn_act_forward = _ops.bn_act_forward.default
# bn_act_gradients, `bn_act_backward_reduce` and `bn_act_backward`, as much of them as is needed: the gradients of x,
# residual, weight and bias whose bits (1, 2, 4, 8) are in `wanted`.
bn_act_gradients = _ops.bn_act_gradients.default


def max_pool2d(
    x: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    out: Tensor,
) -> None:
    """Max pooling of [N, C, H, W]; padding is -inf, NaN propagates. `out`'s size decides on ceil_mode."""
    _call(_ops.max_pool2d.default, x, kernel, stride, padding, dilation, out)


def global_avg_pool(x: Tensor, out: Tensor) -> None:
    """Mean over the spatial dimensions into `out` [N, C], contiguous, of `x`'s dtype."""
    _call(_ops.global_avg_pool.default, x, out)


def to_nhwc(x: Tensor, out: Tensor) -> None:
    """Copy contiguous float32 `x` into channels_last `out`, float32, bfloat16 or float16."""
    _call(_ops.to_nhwc.default, x, out)


def winograd_pack(weight: Tensor, packed: Tensor) -> None:
    """Transform 3x3 weights for `winograd_conv_bn_act`: float64 `weight` [K, C, 3, 3], contiguous, becomes float32
    `packed` [16 * C * (K rounded up to a multiple of 16)], in an order of this machine's own."""
    _call(_ops.winograd_pack.default, weight, packed)


def winograd_conv_bn_act(
    x: Tensor,
    packed: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    act: int,
    act_param: float,
    padding: tuple[int, int],
    out: Tensor,
) -> None:
    """out = act(conv2d(x, weight, padding=padding) + shift[k] + residual): 3x3, stride 1, float32, channels_last.

    Winograd's F(2x2, 3x3): 2.25 times fewer multiplications. x [N, C, H, W], `packed` from `winograd_pack`, shift
    [K], residual and out [N, K, P, Q]; `out` may be `residual`. Whole numbers stay exact as long as 16 times their
    sums fit in 24 bits. A NaN in x reaches the outputs that it reaches in direct convolution; where that has an
    infinity, here may be a NaN.
    """
    _call(_ops.winograd_conv_bn_act.default, x, packed, shift, residual, act, act_param, padding, out)
