"""`triton.expand_reduce` and `triton.shifted_block`: pointwise layers chained in registers."""

from __future__ import annotations

from fastres.backends.triton_portable.base import (
    TritonCandidate,
    cdiv,
    krsc,
    pow2,
    precision,
    scale_shift,
    shared_limit,
    wide,
)
from fastres.backends.triton_portable.launch import Call
from fastres.kernels.triton import expand_reduce, shifted_block
from fastres.plan.candidate import Buffers, Work, register
from fastres.plan.pattern import EXPAND_REDUCE, SHIFTED_BLOCK
from fastres.plan.problem import Problem, Target
from fastres.tuning.portable_config import ChainConfig, expand_reduce_configs, shifted_block_configs


class ExpandReduce(TritonCandidate):
    name = "triton.expand_reduce"
    pattern = EXPAND_REDUCE
    source = "kernels/triton/expand_reduce.py"

    def refuses(self, problem: Problem, target: Target) -> str | None:
        if precision(problem) == "ieee" and problem.dtype.itemsize == 4:
            return "IEEE fp32 has no tensor-core product, and chaining gains nothing without"
        if any(spec.n * spec.h * spec.w >= 2**31 for _, spec in problem.layers):
            return "more than 2^31 pixels"
        if not self.configs(problem, target):
            return "no tile of the chained products fits into registers and shared memory"
        return None

    def configs(self, problem: Problem, target: Target) -> list[ChainConfig]:
        return expand_reduce_configs(problem, target, shared_limit(target))

    def busiest_ms(self, problem: Problem, target: Target) -> float:
        """Every block reads all weights, and each layer's input that the layer before it did not make."""
        expand, block_m = problem["expand"], self.configs(problem, target)[0].block_m
        weights = sum(spec.weight_elements for _, spec in problem.layers)
        inputs = expand.k if expand.residual else 0
        for role in ("conv", "shortcut") if problem.get("conv") else ("expand", "shortcut"):
            spec = problem.get(role)
            inputs += spec.c * spec.kernel[0] * spec.kernel[1] if spec else 0
        blocks = cdiv(expand.n * expand.p * expand.q, block_m)
        return Work(blocks, (weights + block_m * inputs) * problem.dtype.itemsize).ms(problem, target)

    def prepare(self, problem, config, parameters):
        """role → (weight, scale, shift); the shortcut's shift is part of the expand's."""
        constants = {
            role: (krsc(layer.weight, problem.dtype), *scale_shift(layer))
            for role, layer in parameters.items()
        }
        if "shortcut" in constants:
            weight, scale, shift = constants["expand"]
            constants["expand"] = weight, scale, shift + constants["shortcut"][2]
        return constants

    def calls(self, problem: Problem, config: ChainConfig, buffers: Buffers, constants) -> list[Call]:
        args = chain_args(problem, config, buffers, constants)
        args["h"] = buffers["expand.x"]
        programs = cdiv(args["M"], config.block_m)
        kernel = expand_reduce.expand_reduce_kernel
        return [Call(kernel, args, programs, config.num_warps, config.num_stages)]


class ShiftedBlock(ExpandReduce):
    name = "triton.shifted_block"
    pattern = SHIFTED_BLOCK
    source = "kernels/triton/shifted_block.py"

    def configs(self, problem: Problem, target: Target) -> list[ChainConfig]:
        return shifted_block_configs(problem, target, shared_limit(target))

    def calls(self, problem: Problem, config: ChainConfig, buffers: Buffers, constants) -> list[Call]:
        spec = problem["conv"]
        args = chain_args(problem, config, buffers, constants)
        weight, scale, shift = constants["conv"]
        args.update(
            u=buffers["conv.x"],
            w_c=weight,
            scale_c=scale,
            shift_c=shift,
            act_c_param=spec.act.param,
            ACT_C=spec.act.code,
            C=spec.c,
            BLOCK_C=config.block_c,
        )
        programs = cdiv(args["M"], config.block_m)
        kernel = shifted_block.shifted_block_kernel
        return [Call(kernel, args, programs, config.num_warps, config.num_stages)]


def chain_args(problem: Problem, config: ChainConfig, buffers: Buffers, constants) -> dict:
    """What both kernels take from the expand on."""
    expand, shortcut, reduce = problem["expand"], problem.get("shortcut"), problem.get("reduce")
    y = buffers["expand"]
    w_e, scale_e, shift_e = constants["expand"]
    residual = buffers.get("expand.residual")
    # Pointers that are not read stand for themselves: any tensor of the right type.
    w_s, scale_s, _ = constants.get("shortcut", constants["expand"])
    w_r, scale_r, shift_r = constants.get("reduce", constants["expand"])
    return dict(
        w_e=w_e,
        scale_e=scale_e,
        shift_e=shift_e,
        residual=y if residual is None else residual,
        x=y if shortcut is None else buffers["shortcut.x"],
        w_s=w_s,
        scale_s=scale_s,
        y=y,
        w_r=w_r,
        scale_r=scale_r,
        shift_r=shift_r,
        z=y if reduce is None else buffers["reduce"],
        M=expand.n * expand.p * expand.q,
        H=shortcut.h if shortcut else expand.h,
        W=shortcut.w if shortcut else expand.w,
        P=expand.p,
        Q=expand.q,
        act_e_param=expand.act.param,
        act_r_param=reduce.act.param if reduce else 0.0,
        C0=shortcut.c if shortcut else 0,
        C1=expand.c,
        K=expand.k,
        Z=reduce.k if reduce else 0,
        STRIDE_H=shortcut.stride[0] if shortcut else 1,
        STRIDE_W=shortcut.stride[1] if shortcut else 1,
        HAS_RESIDUAL=residual is not None,
        ACT_E=expand.act.code,
        ACT_R=reduce.act.code if reduce else 0,
        WIDE=wide(problem),
        PRECISION=precision(problem),
        BLOCK_M=config.block_m,
        BLOCK_C1=max(16, pow2(expand.c)),
        BLOCK_E=config.block_e,
        BLOCK_Z=max(16, pow2(reduce.k)) if reduce else 16,
        BLOCK_S=config.block_s,
    )


register(ExpandReduce())
register(ShiftedBlock())
