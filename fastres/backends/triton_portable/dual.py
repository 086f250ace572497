"""`triton.dual`: a block's projection shortcut and its expand as one product."""

from __future__ import annotations

from fastres.backends.triton_portable.base import TritonCandidate, cdiv, krsc, precision, shared_limit, wide
from fastres.backends.triton_portable.launch import Call
from fastres.kernels.triton import dual as kernels
from fastres.plan.candidate import Buffers, Work, register
from fastres.plan.pattern import DUAL
from fastres.plan.problem import Problem, Target
from fastres.tuning.portable_config import TileConfig, dual_configs


class Dual(TritonCandidate):
    name = "triton.dual"
    pattern = DUAL
    source = "kernels/triton/dual.py"

    def refuses(self, problem: Problem, target: Target) -> str | None:
        spec = problem["shortcut"]
        return "more than 2^31 pixels" if spec.n * spec.h * spec.w >= 2**31 else None

    def configs(self, problem: Problem, target: Target) -> list[TileConfig]:
        return dual_configs(problem, target, shared_limit(target))

    def busiest_ms(self, problem: Problem, target: Target) -> float:
        shortcut, expand, config = problem["shortcut"], problem["expand"], self.configs(problem, target)[0]
        m, depth, size = expand.n * expand.p * expand.q, shortcut.c + expand.c, problem.dtype.itemsize
        return Work.product(m, expand.k, depth, config.block_m, config.block_n, size).ms(problem, target)

    def prepare(self, problem, config, parameters):
        shortcut, expand = parameters["shortcut"], parameters["expand"]
        (scale_x, shift_x), (scale_h, shift_h) = shortcut.scale_shift(), expand.scale_shift()
        # Where the expand's scale is (next to) nothing, a zero-initialised BN say, there is no ratio to it:
        # that row's weights are folded, and their rounding is next to nothing too.
        vanishes = scale_h.abs() <= scale_x.abs() * 2**-20
        scale = scale_h.masked_fill(vanishes | (scale_h == 0), 1.0)
        weight_h = expand.weight.flatten(1).to(scale_h.dtype) * (scale_h / scale).unsqueeze(1)
        return (
            krsc(shortcut.weight, problem.dtype),
            weight_h.to(problem.dtype).contiguous(),
            (scale_x / scale).float().contiguous(),
            scale.float().contiguous(),
            (shift_x + shift_h).float().contiguous(),
        )

    def calls(self, problem: Problem, config: TileConfig, buffers: Buffers, constants) -> list[Call]:
        shortcut, expand = problem["shortcut"], problem["expand"]
        w_x, w_h, ratio, scale, shift = constants
        m = expand.n * expand.p * expand.q
        args = dict(
            x=buffers["shortcut.x"],
            w_x=w_x,
            h=buffers["expand.x"],
            w_h=w_h,
            ratio=ratio,
            scale=scale,
            shift=shift,
            y=buffers["expand"],
            M=m,
            H=shortcut.h,
            W=shortcut.w,
            P=expand.p,
            Q=expand.q,
            act_param=expand.act.param,
            C0=shortcut.c,
            C1=expand.c,
            K=expand.k,
            STRIDE_H=shortcut.stride[0],
            STRIDE_W=shortcut.stride[1],
            ACT=expand.act.code,
            WIDE=wide(problem),
            PRECISION=precision(problem),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
        )
        programs = cdiv(m, config.block_m) * cdiv(expand.k, config.block_n)
        return [Call(kernels.dual_kernel, args, programs, config.num_warps, config.num_stages)]


register(Dual())
