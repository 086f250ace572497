"""hopper.dual: a block's expand and its projection shortcut as one product over two inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastres.backends.triton_hopper.base import (
    Call,
    HopperCandidate,
    claims,
    descriptor,
    multiprocessors,
    prepare_folded,
    unfit_layer,
)
from fastres.backends.triton_hopper.tiling import (
    PING_PONG,
    TALL,
    WIDE,
    GemmConfig,
    fits,
    gemm_ms,
    input_descriptor,
    output_descriptor,
    tile_arguments,
    tiling_of,
    unfit_geometry,
)
from fastres.graph.fold import LayerParameters
from fastres.plan.candidate import Buffers, register
from fastres.plan.pattern import DUAL
from fastres.plan.problem import Problem, Target


class HopperDual(HopperCandidate):
    name = "hopper.dual"
    pattern = DUAL
    source = "kernels/triton/hopper_dual.py"

    def refuses(self, problem: Problem, target: Target) -> str | None:
        shortcut, expand = problem["shortcut"], problem["expand"]
        for role, spec in (("shortcut", shortcut), ("expand", expand)):
            reason = unfit_layer(spec) or unfit_geometry(spec)
            if reason is None and spec.c % 64:
                reason = f"{spec.c} channels: takes multiples of 64"
            if reason is not None:
                return f"{role}: {reason}"
        return None

    def configs(self, problem: Problem, target: Target) -> Sequence[GemmConfig]:
        shortcut = problem["shortcut"]
        # One H100, batch 256, bf16: 64+64->256@56 230 us, 512+1024->2048@14/2 121 with ping-pong;
        # 128+256->512@56/2 165, 256+512->1024@28/2 127 with one wide group.
        wide = shortcut.stride == (2, 2) and shortcut.c <= 512
        first = (WIDE, PING_PONG) if wide else (PING_PONG, WIDE)
        small = GemmConfig(64, 64, stages=6, staged=2)
        choices = (*first, GemmConfig(64, 256, stages=3), TALL, small)
        return tuple(config for config in choices if fits(problem["expand"], config, target.sms))

    def busiest_ms(self, problem: Problem, target: Target) -> float:
        shortcut, expand = problem["shortcut"], problem["expand"]
        steps = (shortcut.c + expand.c) // 64
        return gemm_ms(problem, target, shortcut, expand.k, self.configs(problem, target)[0], steps)

    def counters(self, problem: Problem, config: GemmConfig) -> int:
        return 1

    def prepare(self, problem: Problem, config: GemmConfig, parameters: Mapping[str, LayerParameters]):
        shortcut, expand = (
            prepare_folded(parameters[role], problem.dtype, 64) for role in ("shortcut", "expand")
        )
        return shortcut.weight, expand.weight, shortcut.shift + expand.shift

    def call(self, problem: Problem, config: GemmConfig, buffers: Buffers, constants) -> Call:
        from fastres.kernels.triton.hopper_dual import dual_kernel

        shortcut, expand = problem["shortcut"], problem["expand"]
        x, h, y = buffers["shortcut.x"], buffers["expand.x"], buffers["expand"]
        w, v, shift = constants
        tiling = tiling_of(shortcut, config)
        columns = -(-expand.k // config.block_n)
        tiles = tiling.tiles * columns
        grid = min(multiprocessors(x.device) * config.per_sm, tiles)
        block = [config.block_n, 64]
        arguments = {
            "counter": buffers.counters,
            "x_desc": input_descriptor(x, shortcut, tiling, 64),
            "w_desc": descriptor(w, list(w.shape), block),
            "h_desc": output_descriptor(h, expand, tiling, expand.c, 64),
            "v_desc": descriptor(v, list(v.shape), block),
            "y_desc": output_descriptor(y, expand, tiling, expand.k, config.block_n),
            "shift": shift,
            "slope": float(expand.act.param),
            "tiles": tiles,
            "columns": columns,
            "C": shortcut.c,
            "CH": expand.c,
            "STRIDE": shortcut.stride[0],
            **tile_arguments(shortcut, tiling),
            "BN": config.block_n,
            "BK": 64,
            "ACT": expand.act.code,
            "DYNAMIC": claims(tiles, grid),
            **config.kernel_arguments(),
        }
        return Call(dual_kernel, grid, arguments, config.options())


register(HopperDual())
