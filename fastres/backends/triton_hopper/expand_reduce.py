"""hopper.expand_reduce: expand, residual and activation, chained into the next block's reduce."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastres.backends.triton_hopper.base import (
    BARRIERS,
    SHARED_MEMORY,
    Call,
    HopperCandidate,
    Layer,
    descriptor,
    layer_arguments,
    memory,
    multiprocessors,
    prepare_folded,
    prepare_layers,
    steps_ms,
    unfit_layer,
)
from fastres.graph.fold import LayerParameters
from fastres.plan.candidate import Buffers, register
from fastres.plan.pattern import EXPAND_REDUCE
from fastres.plan.problem import Problem, Target
from fastres.tuning.config import Config


@dataclass(frozen=True)
class ChainConfig(Config):
    """Pipeline of expand_reduce.

    Attributes:
        weight_stages: stages that the weights stream through.
        residual_slots: 64 x 64 residual chunks in flight, a consumer group.
        input_slots: input tiles in flight, a consumer group.
        dynamic: tiles are claimed from a counter instead of shared out evenly.
    """

    weight_stages: int
    residual_slots: int
    input_slots: int
    dynamic: bool = True

    def shared_bytes(self, c: int, cy: int) -> int:
        inputs, residuals = 2 * self.input_slots * 64 * c, 2 * self.residual_slots * 64 * 64
        outputs = 0 if cy == c else 2 * 64 * cy
        return 2 * (inputs + outputs + residuals + self.weight_stages * 64 * (c + cy)) + BARRIERS


# One H100, batch 256, bf16, prototypes of this kernel, us (cuDNN's two calls):
#   128 -> 512 -> 128 at 28x28: 197 dynamic, 200 static, 208 with two weight stages and six residual slots
# (262)   256 -> 1024 -> 256 at 14x14: 124 static, 129 dynamic: 392 tiles are three rounds of 132 blocks
# anyhow (149)
#   128 -> 512 -> 256 at 28x28 (into the next stage) is unmeasured: its slots are what fits.
_CHAINS = {
    # (channels into the expand, out of the reduce)
    (64, 64): (ChainConfig(3, 8, 2), ChainConfig(2, 8, 2), ChainConfig(3, 8, 2, dynamic=False)),
    (128, 128): (ChainConfig(3, 4, 2), ChainConfig(3, 4, 2, dynamic=False), ChainConfig(2, 6, 2)),
    (256, 256): (ChainConfig(2, 2, 1, dynamic=False), ChainConfig(2, 2, 1)),
    (64, 128): (ChainConfig(2, 8, 1), ChainConfig(3, 6, 1), ChainConfig(2, 8, 1, dynamic=False)),
    (128, 256): (ChainConfig(2, 2, 1), ChainConfig(2, 2, 1, dynamic=False)),
}


class HopperExpandReduce(HopperCandidate):
    name = "hopper.expand_reduce"
    pattern = EXPAND_REDUCE
    source = "kernels/triton/hopper_expand_reduce.py"
    efficiency = 0.8

    def refuses(self, problem: Problem, target: Target) -> str | None:
        if problem.get("shortcut") is not None:
            return "a projection shortcut: takes the residual as a tensor (hopper.dual takes projections)"
        expand, reduce = problem["expand"], problem["reduce"]
        for spec in (expand, reduce):
            if (reason := unfit_layer(spec)) is not None:
                return reason
        if not expand.residual:
            return "no residual: takes an expand that adds one"
        if reduce.residual:
            return "the reduce adds a residual of its own"
        if (expand.c, reduce.k) not in _CHAINS:
            taken = ", ".join(f"{c} and {cy}" for c, cy in _CHAINS)
            return f"{expand.c} channels into the expand and {reduce.k} out of the reduce: takes {taken}"
        if expand.k % 64:
            return f"{expand.k} channels between: takes multiples of 64"
        return None

    def configs(self, problem: Problem, target: Target) -> Sequence[ChainConfig]:
        widths = problem["expand"].c, problem["reduce"].k
        return tuple(c for c in _CHAINS[widths] if c.shared_bytes(*widths) <= SHARED_MEMORY)

    def busiest_ms(self, problem: Problem, target: Target) -> float:
        expand, reduce = problem["expand"], problem["reduce"]
        products = 128 * 64 * (expand.c + reduce.k)
        tiles = -(-expand.n * expand.p * expand.q // 128)
        return steps_ms(tiles, expand.k // 64, products, problem, target)

    def counters(self, problem: Problem, config: ChainConfig) -> int:
        return 1

    def prepare(
        self, problem: Problem, config: ChainConfig, parameters: Mapping[str, LayerParameters]
    ) -> dict[str, Layer]:
        if problem["reduce"].k == 256:
            return {
                role: prepare_folded(parameters[role], problem.dtype, 64) for role in ("expand", "reduce")
            }
        return prepare_layers(problem, parameters)

    def call(
        self, problem: Problem, config: ChainConfig, buffers: Buffers, constants: dict[str, Layer]
    ) -> Call:
        from fastres.kernels.triton.hopper_expand_reduce import expand_reduce_kernel

        expand, reduce = problem["expand"], problem["reduce"]
        rows, c, k, cy = expand.n * expand.p * expand.q, expand.c, expand.k, reduce.k
        tiles = -(-rows // 128)
        h, y = (memory(buffers[name]) for name in ("expand.x", "reduce"))
        z, out = (memory(buffers[name]) for name in ("expand.residual", "expand"))
        arguments = {
            "counter": buffers.counters,
            "h_desc": descriptor(h, [rows, c], [64, c]),
            "z_desc": descriptor(z, [rows, k], [64, 64]),
            "out_desc": descriptor(out, [rows, k], [64, 64]),
            "y_desc": descriptor(y, [rows, cy], [64, cy]),
            "we_desc": descriptor(constants["expand"].weight, [k, c], [64, c]),
            "wr_desc": descriptor(constants["reduce"].weight, [cy, k], [cy, 64]),
            **layer_arguments(expand, constants["expand"], "e"),
            **layer_arguments(reduce, constants["reduce"], "r"),
            "tiles": tiles,
            "C": c,
            "CY": cy,
            "K": k,
            "SW": config.weight_stages,
            "SZ": config.residual_slots,
            "SH": config.input_slots,
            "DYNAMIC": int(config.dynamic),
            "CONSUMER_REGS": 232,
            "PRODUCER_REGS": 32,
        }
        return Call(expand_reduce_kernel, min(multiprocessors(h.device), tiles), arguments, {"num_warps": 4})


register(HopperExpandReduce())
