"""`triton.conv_bn_act`: any convolution with its BN, residual and activation."""

from __future__ import annotations

import torch

from fastres.backends.triton_portable.base import (
    TritonCandidate,
    cdiv,
    krsc,
    pointwise,
    precision,
    scale_shift,
    shared_limit,
    wide,
)
from fastres.backends.triton_portable.launch import Call, descriptor, rows
from fastres.graph.fold import LayerParameters
from fastres.kernels.triton import conv_bn_act as kernels
from fastres.plan.candidate import Buffers, Work, register
from fastres.plan.pattern import CONV_BN_ACT
from fastres.plan.problem import ConvSpec, Problem, Target
from fastres.tuning.portable_config import (
    ConvConfig,
    conv_configs,
    slice_groups,
    slice_inputs,
    slice_outputs,
)

GROUP_M = 8  # tile rows that share a column of weights; 8 was the prototypes' choice


class ConvBnAct(TritonCandidate):
    name = "triton.conv_bn_act"
    pattern = CONV_BN_ACT
    source = "kernels/triton/conv_bn_act.py"

    def refuses(self, problem: Problem, target: Target) -> str | None:
        spec = problem["conv"]
        if max(spec.n * spec.h * spec.w, spec.n * spec.p * spec.q) >= 2**31:
            return "more than 2^31 pixels"
        return None

    def configs(self, problem: Problem, target: Target) -> list[ConvConfig]:
        return conv_configs(problem, target, shared_limit(target))

    def busiest_ms(self, problem: Problem, target: Target) -> float:
        work = conv_work(problem["conv"], self.configs(problem, target)[0], problem.dtype.itemsize)
        return 0.0 if work is None else work.ms(problem, target)

    def counters(self, problem: Problem, config: ConvConfig) -> int:
        if not config.dynamic:
            return 0
        return cdiv(problem["conv"].k, config.block_n) if config.form == "stationary" else 1

    def prepare_key(self, problem, config):
        return (problem.dtype, config.form == "depthwise")

    def prepare(self, problem, config, parameters):
        layer = parameters["conv"]
        scale, shift = scale_shift(layer)
        if config.form == "depthwise":
            weight = krsc(layer.weight, problem.dtype).t().contiguous()
        else:
            weight = slice_weight(layer, problem["conv"], problem.dtype)
        return weight, scale, shift

    def calls(self, problem: Problem, config: ConvConfig, buffers: Buffers, constants) -> list[Call]:
        return [
            conv_call(
                problem["conv"],
                config,
                buffers["conv.x"],
                buffers.get("conv.residual"),
                buffers["conv"],
                constants,
                precision(problem),
                wide(problem),
                buffers.counters,
            )
        ]


def slice_weight(layer: LayerParameters, spec: ConvSpec, dtype: torch.dtype) -> torch.Tensor:
    """[K, R * S * CS]: each output channel's weights over its slice's input channels; zero between groups."""
    together = slice_groups(spec)
    if together == 1:
        return krsc(layer.weight, dtype)
    k, c = spec.k // spec.groups, spec.c // spec.groups
    # [slice, group, k, c, r, s] → [slice, group, k, group, c, r, s], the diagonal of the two group axes.
    groups = layer.weight.to(dtype).reshape(-1, together, k, c, *spec.kernel)
    eye = torch.eye(together, dtype=dtype, device=groups.device).view(1, together, 1, together, 1, 1, 1)
    blocks = groups.unsqueeze(3) * eye
    return krsc(blocks.reshape(spec.k, together * c, *spec.kernel), dtype)


def conv_work(spec: ConvSpec, config: ConvConfig, itemsize: int) -> Work | None:
    if config.form == "depthwise":
        return None
    m, outputs, inputs = spec.n * spec.p * spec.q, slice_outputs(spec), slice_inputs(spec)
    depth = spec.kernel[0] * spec.kernel[1] * inputs
    one = Work.product(m, outputs, depth, config.block_m, config.block_n, itemsize)
    return Work(one.blocks * (spec.k // outputs), one.l2_bytes)


def conv_call(spec, config, x, residual, y, constants, input_precision, is_wide, counters=None) -> Call:
    """The launch of one convolution in the form that `config` names; `counters` of its dynamic tiles."""
    weight, scale, shift = constants
    m = spec.n * spec.p * spec.q
    act = dict(act_param=spec.act.param, ACT=spec.act.code, HAS_RESIDUAL=residual is not None)
    if config.form in ("stationary", "persistent"):
        if not pointwise(spec):
            raise ValueError(f"config: form {config.form!r} takes 1x1 convolutions of stride 1, got {spec}")
        tiles_m, tiles_n = cdiv(m, config.block_m), cdiv(spec.k, config.block_n)
        block_y = (config.block_m, config.block_n)
        d_y = descriptor(rows(y), block_y)
        args = dict(
            d_x=descriptor(rows(x), (config.block_m, config.block_k)),
            d_w=descriptor(weight, (config.block_n, config.block_k)),
            d_residual=d_y if residual is None else descriptor(rows(residual), block_y),
            d_y=d_y,
            scale=scale,
            shift=shift,
            counter=counters if config.dynamic else scale,
            M=m,
            K=spec.k,
            DYNAMIC=config.dynamic,
            PRECISION=input_precision,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            **act,
        )
        if config.form == "stationary":
            kernel, multiple = kernels.pointwise_stationary_kernel, tiles_n
            args["STAGES"] = config.num_stages
        else:
            kernel, multiple = kernels.pointwise_persistent_kernel, 1
            args.update(C=spec.c, BLOCK_K=config.block_k, GROUP_M=GROUP_M)
        return Call(kernel, args, tiles_m * tiles_n, config.num_warps, config.num_stages, multiple)
    args = dict(
        x=x,
        w=weight,
        scale=scale,
        shift=shift,
        residual=y if residual is None else residual,
        y=y,
        M=m,
        H=spec.h,
        W=spec.w,
        P=spec.p,
        Q=spec.q,
        C=spec.c,
        R=spec.kernel[0],
        S=spec.kernel[1],
        STRIDE_H=spec.stride[0],
        STRIDE_W=spec.stride[1],
        PAD_H=spec.padding[0],
        PAD_W=spec.padding[1],
        DIL_H=spec.dilation[0],
        DIL_W=spec.dilation[1],
        WIDE=is_wide,
        BLOCK_M=config.block_m,
        **act,
    )
    if config.form == "depthwise":
        args["BLOCK_C"] = config.block_n
        programs = cdiv(m, config.block_m) * cdiv(spec.c, config.block_n)
        return Call(kernels.depthwise_kernel, args, programs, config.num_warps, config.num_stages)
    outputs = slice_outputs(spec)
    args.update(
        K=spec.k,
        CS=slice_inputs(spec),
        KS=outputs,
        PRECISION=input_precision,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )
    programs = cdiv(m, config.block_m) * (spec.k // outputs) * cdiv(outputs, config.block_n)
    return Call(kernels.conv_bn_act_kernel, args, programs, config.num_warps, config.num_stages)


register(ConvBnAct())
