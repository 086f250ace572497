"""Hopper candidates that chain layers within a block: hopper.expand_reduce."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastres.backends.triton_hopper_common import (
    SHARED_MEMORY,
    Call,
    HopperCandidate,
    Layer,
    descriptor,
    memory,
    multiprocessors,
    prepare_folded,
    prepare_layers,
    unfit_layer,
)
from fastres.graph.fold import LayerParameters
from fastres.plan.candidate import Buffers, register
from fastres.plan.pattern import EXPAND_REDUCE
from fastres.plan.problem import ConvSpec, Problem, Target
from fastres.tuning.config import Config

_BARRIERS = 1024  # bytes of barriers and tickets, and what alignment costs: an upper bound


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

    def shared_bytes(self, c: int) -> int:
        inputs, residuals = 2 * self.input_slots * 64 * c, 2 * self.residual_slots * 64 * 64
        return 2 * (inputs + residuals + self.weight_stages * 2 * 64 * c) + _BARRIERS


# One H100, batch 256, bf16, prototypes of this kernel, us (cuDNN's two calls):
#   128 -> 512 -> 128 at 28x28: 197 dynamic, 200 static, 208 with two weight stages and six residual slots (262)
#   256 -> 1024 -> 256 at 14x14: 124 static, 129 dynamic: 392 tiles are three rounds of 132 blocks anyhow (149)
_CHAINS = {
    64: (ChainConfig(3, 8, 2), ChainConfig(2, 8, 2), ChainConfig(3, 8, 2, dynamic=False)),
    128: (ChainConfig(3, 4, 2), ChainConfig(3, 4, 2, dynamic=False), ChainConfig(2, 6, 2)),
    256: (ChainConfig(2, 2, 1, dynamic=False), ChainConfig(2, 2, 1)),
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
        if expand.c not in _CHAINS:
            return f"{expand.c} channels into the expand: takes 64, 128 and 256"
        if reduce.k != expand.c:
            return f"{reduce.k} channels out of the reduce: takes as many as go into the expand ({expand.c})"
        if expand.k % 64:
            return f"{expand.k} channels between: takes multiples of 64"
        return None

    def configs(self, problem: Problem, target: Target) -> Sequence[ChainConfig]:
        c = problem["expand"].c
        return tuple(config for config in _CHAINS[c] if config.shared_bytes(c) <= SHARED_MEMORY)

    def counters(self, problem: Problem, config: ChainConfig) -> int:
        return 1

    def prepare(
        self, problem: Problem, config: ChainConfig, parameters: Mapping[str, LayerParameters]
    ) -> dict[str, Layer]:
        if problem["expand"].c == 256:
            return {role: prepare_folded(parameters[role], problem.dtype, 64) for role in ("expand", "reduce")}
        return prepare_layers(problem, parameters)

    def call(
        self, problem: Problem, config: ChainConfig, buffers: Buffers, constants: dict[str, Layer]
    ) -> Call:
        from fastres.kernels.triton.hopper_expand_reduce import expand_reduce_kernel

        expand, reduce = problem["expand"], problem["reduce"]
        rows, c, k = expand.n * expand.p * expand.q, expand.c, expand.k
        tiles = -(-rows // 128)
        h, y = (memory(buffers[name]) for name in ("expand.x", "reduce"))
        z, out = (memory(buffers[name]) for name in ("expand.residual", "expand"))
        arguments = {
            "counter": buffers.counters,
            "h_desc": descriptor(h, [rows, c], [64, c]),
            "z_desc": descriptor(z, [rows, k], [64, 64]),
            "out_desc": descriptor(out, [rows, k], [64, 64]),
            "y_desc": descriptor(y, [rows, c], [64, c]),
            "we_desc": descriptor(constants["expand"].weight, [k, c], [64, c]),
            "wr_desc": descriptor(constants["reduce"].weight, [c, k], [c, 64]),
            **layer_arguments(expand, constants["expand"], "e"),
            **layer_arguments(reduce, constants["reduce"], "r"),
            "tiles": tiles,
            "C": c,
            "K": k,
            "SW": config.weight_stages,
            "SZ": config.residual_slots,
            "SH": config.input_slots,
            "DYNAMIC": int(config.dynamic),
            "CONSUMER_REGS": 232,
            "PRODUCER_REGS": 32,
        }
        return Call(expand_reduce_kernel, min(multiprocessors(h.device), tiles), arguments, {"num_warps": 4})


def layer_arguments(spec: ConvSpec, layer: Layer, suffix: str) -> dict:
    """A layer's epilogue, as the kernels' parameters of that suffix."""
    return {
        f"scale_{suffix}": layer.scale,
        f"shift_{suffix}": layer.shift,
        f"slope_{suffix}": float(spec.act.param),
        f"ACT_{suffix.upper()}": spec.act.code,
    }


register(HopperExpandReduce())
