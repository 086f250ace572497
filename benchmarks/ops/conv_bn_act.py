"""conv_bn_act: convolution, BN with given statistics, residual add and ReLU, as one public op."""

from __future__ import annotations

import torch

from benchmarks.case import Case, Subject, activations, to_device
from benchmarks.modules import calibrated, conv_bn_act
from benchmarks.shapes import Layer
from fastres.plan.problem import ConvSpec


def case(
    layer: Layer,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    level: str = "layer",
    model: str = "",
    clock: str = "kernel",
) -> Case:
    """One convolution layer; at the levels "op" and "host" fastres runs its public op instead of a plan."""
    problem = layer.problem(batch, dtype)
    spec = problem["conv"]
    assert isinstance(spec, ConvSpec)

    def make() -> Subject:
        torch.manual_seed(0)
        inputs = [activations(spec.x_shape, dtype, device)]
        if spec.residual:
            inputs.append(activations(spec.y_shape, dtype, device, seed=1))
        module = calibrated(to_device(conv_bn_act(spec), device), *inputs)

        def op():
            import fastres

            bn = module.bn
            weight = module.conv.weight.to(dtype).contiguous(memory_format=torch.channels_last)

            def call(x, residual=None):
                return fastres.conv_bn_act(
                    x,
                    weight,
                    None,
                    bn.weight,
                    bn.bias,
                    bn.running_mean,
                    bn.running_var,
                    bn.eps,
                    spec.stride,
                    spec.padding,
                    spec.dilation,
                    spec.groups,
                    residual=residual,
                    act=spec.act,
                )

            return call

        return Subject(module, tuple(inputs), op if level in ("op", "host") else None)

    name = f"{model} {layer.name}".strip() if level == "layer" else "conv_bn_act"
    return Case(
        level,
        name,
        problem.key,
        batch,
        dtype,
        device,
        [(problem.bytes, problem.flops)],
        make,
        model=model,
        count=layer.count,
        clock=clock,
        kernels=problem if level == "layer" else None,
    )
