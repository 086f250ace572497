"""oneDNN on the CPU: convolution with sum and activation as post-ops, weights prepacked in the layout it wants.

The calls are PyTorch's own (`torch.ops.mkldnn`), those that torch.compile emits with freezing. A residual that dies
with the layer is summed into in place; weights are packed for the problem's own shape.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastres.activation import Activation
from fastres.graph.fold import LayerParameters
from fastres.plan.candidate import Candidate, register
from fastres.plan.pattern import CONV_BN_ACT, LINEAR
from fastres.plan.problem import Problem, Target, dtype_name

# kind → (oneDNN's post-op, its scalars, its algorithm)
_POST_OPS = {
    "identity": ("none", [], ""),
    "relu": ("relu", [], ""),
    "relu6": ("hardtanh", [0.0, 6.0], ""),
    "silu": ("swish", [], ""),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
    "hardswish": ("hardswish", [], ""),
}
# beside the sum, PyTorch's binary call takes only these
_POST_OPS_AFTER_SUM = ("identity", "relu")


class OneDnn(Candidate):
    backend = "onednn"
    allocates = True
    efficiency = 1.0

    def accepts(self, problem: Problem, target: Target) -> str | None:
        if target.kind != "cpu":
            return "it runs on the CPU only"
        if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
            return "this PyTorch has no oneDNN, or it is switched off (torch.backends.mkldnn)"
        if problem.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "this processor has no bf16 instructions that oneDNN uses"
        if problem.dtype not in (torch.float32, torch.bfloat16):
            return f"it takes fp32 and bf16, not {dtype_name(problem.dtype)}"
        return None


class ConvBnAct(OneDnn):
    name = "onednn.conv_bn_act"
    pattern = CONV_BN_ACT
    source = "torch.ops.mkldnn._convolution_pointwise"

    def accepts(self, problem: Problem, target: Target) -> str | None:
        spec = problem["conv"]
        if spec.residual and spec.act.kind not in _POST_OPS_AFTER_SUM:
            return f"oneDNN's sum takes no {spec.act} after it"
        return super().accepts(problem, target)

    def prepare_key(self, problem: Problem, config):
        # the packed layout is chosen for the input's shape
        return problem.dtype, problem["conv"].x_shape, problem["conv"].stride

    def prepare(self, problem: Problem, config, parameters: Mapping[str, LayerParameters]):
        spec = problem["conv"]
        weight, shift = parameters["conv"].folded()
        weight = weight.to(problem.dtype).contiguous(memory_format=torch.channels_last)
        packed = torch._C._nn.mkldnn_reorder_conv2d_weight(
            weight.to_mkldnn(), spec.padding, spec.stride, spec.dilation, spec.groups, spec.x_shape
        )
        return packed, shift.to(problem.dtype)

    def bind(self, problem: Problem, config, buffers, constants):
        spec = problem["conv"]
        weight, bias = constants
        post = _post_op(spec.act)
        # resolved once: an overload is half the price of its packet
        if not spec.residual:
            conv = torch.ops.mkldnn._convolution_pointwise.default
            window = (list(spec.padding), list(spec.stride), list(spec.dilation), spec.groups, *post)

            def launch(x: Tensor) -> Tensor:
                return conv(x, weight, bias, *window)

            return launch
        unary = "relu" if spec.act.kind == "relu" else None
        window = (
            list(spec.padding),
            list(spec.stride),
            list(spec.dilation),
            spec.groups,
            "add",
            1.0,
            unary,
            [],
            "",
        )
        if "conv.residual" in buffers.donated:
            conv_sum_ = torch.ops.mkldnn._convolution_pointwise_.binary

            def launch(x: Tensor, residual: Tensor) -> Tensor:
                return conv_sum_(residual, x, weight, bias, *window)

            return launch
        conv_sum = torch.ops.mkldnn._convolution_pointwise.binary

        def launch(x: Tensor, residual: Tensor) -> Tensor:
            return conv_sum(x, residual, weight, bias, *window)

        return launch


class Linear(OneDnn):
    name = "onednn.linear"
    pattern = LINEAR
    source = "torch.ops.mkldnn._linear_pointwise"

    def prepare_key(self, problem: Problem, config):
        return problem.dtype, problem.n

    def prepare(self, problem: Problem, config, parameters: Mapping[str, LayerParameters]):
        weight = parameters["linear"].weight.to(problem.dtype).contiguous()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, problem.n)
        bias = parameters["linear"].bias
        return packed, None if bias is None else bias.to(problem.dtype)

    def bind(self, problem: Problem, config, buffers, constants):
        weight, bias = constants
        linear = torch.ops.mkldnn._linear_pointwise.default

        def launch(x: Tensor) -> Tensor:
            return linear(x, weight, bias, "none", [], "")

        return launch


def _post_op(act: Activation) -> tuple[str, list, str]:
    if act.kind == "leaky_relu":
        return "leaky_relu", [act.param], ""
    return _POST_OPS[act.kind]


register(ConvBnAct())
register(Linear())
