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
    claims,
    descriptor,
    fold_shortcut,
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
        dynamic: tiles are claimed from a counter instead of shared out evenly, where a block has more than a few.
        early: a residual's slot is given back as soon as its store has read it, not one chunk later.
    """

    weight_stages: int
    residual_slots: int
    input_slots: int
    dynamic: bool = True
    early: bool = False

    def shared_bytes(self, c: int, cy: int, cv: int) -> int:
        inputs, residuals = 2 * self.input_slots * 64 * (c + cv), 2 * self.residual_slots * 64 * 64
        outputs = 0 if cy == c else 2 * 64 * cy
        return 2 * (inputs + outputs + residuals + self.weight_stages * 64 * (c + cv + cy)) + BARRIERS


# One H100, batch 256, bf16, prototypes of this kernel, us (cuDNN's two calls):
#   128 -> 512 -> 128 at 28x28: 197 dynamic, 200 static, 208 with two weight stages and six residual slots
# (262)   256 -> 1024 -> 256 at 14x14: 124 static, 129 dynamic: 392 tiles are three rounds of 132 blocks
# anyhow (149)
#   128 -> 512 -> 256 at 28x28 (into the next stage) is unmeasured: its slots are what fits.
#   with the projection of a first block, 64 + 64 -> 256 -> 64 and, of Wide ResNet and ResNeXt, 64 + 128 -> 256 -> 128
# at 56x56: unmeasured, what fits.
_CHAINS = {
    # channels (into the expand, out of the reduce, into the projection)
    (64, 64, 0): (ChainConfig(3, 8, 2), ChainConfig(2, 8, 2), ChainConfig(3, 8, 2, dynamic=False)),
    (128, 128, 0): (ChainConfig(3, 4, 2), ChainConfig(3, 4, 2, dynamic=False), ChainConfig(2, 6, 2)),
    (256, 256, 0): (
        ChainConfig(2, 2, 1, dynamic=False),
        ChainConfig(2, 2, 1, early=True),
        ChainConfig(2, 2, 1),
    ),
    (64, 128, 0): (ChainConfig(2, 8, 1), ChainConfig(3, 6, 1), ChainConfig(2, 8, 1, dynamic=False)),
    (128, 256, 0): (
        ChainConfig(2, 2, 1, early=True),
        ChainConfig(2, 2, 1),
        ChainConfig(2, 2, 1, dynamic=False),
    ),
    (64, 64, 64): (ChainConfig(3, 4, 2), ChainConfig(3, 6, 1), ChainConfig(3, 4, 2, dynamic=False)),
    (128, 128, 64): (
        ChainConfig(2, 2, 2, early=True),
        ChainConfig(3, 3, 1),
        ChainConfig(2, 2, 2, dynamic=False),
    ),
}


def widths(problem: Problem) -> tuple[int, int, int]:
    """Channels into the expand, out of the reduce, into the projection or 0."""
    shortcut = problem.get("shortcut")
    return problem["expand"].c, problem["reduce"].k, 0 if shortcut is None else shortcut.c


class HopperExpandReduce(HopperCandidate):
    name = "hopper.expand_reduce"
    pattern = EXPAND_REDUCE
    source = "kernels/triton/hopper_expand_reduce.py"
    efficiency = 0.8

    def refuses(self, problem: Problem, target: Target) -> str | None:
        expand, reduce, shortcut = problem["expand"], problem["reduce"], problem.get("shortcut")
        for spec in (expand, reduce, shortcut):
            if spec is not None and (reason := unfit_layer(spec)) is not None:
                return reason
        if not expand.residual:
            return "no residual: takes an expand that adds one"
        if reduce.residual:
            return "the reduce adds a residual of its own"
        if expand.k % 64:
            return f"{expand.k} channels between: takes multiples of 64"
        if reduce.k > 256:
            return (
                f"{reduce.k} channels out of the reduce: their sums of 128 pixels are the whole register file"
            )
        if shortcut is not None and shortcut.stride != (1, 1):
            # 128 + 256 channels: 96 KB of inputs, and 64 KB each of two stages of weights.
            return "a projection of stride 2: its input leaves no room for two stages of weights"
        if widths(problem) not in _CHAINS:
            taken = ", ".join(str(taken) for taken in _CHAINS)
            return f"channels {widths(problem)} into the expand, out of the reduce, into a projection: takes {taken}"
        return None

    def configs(self, problem: Problem, target: Target) -> Sequence[ChainConfig]:
        channels = widths(problem)
        return tuple(c for c in _CHAINS[channels] if c.shared_bytes(*channels) <= SHARED_MEMORY)

    def busiest_ms(self, problem: Problem, target: Target) -> float:
        """A tile's products, or all weights through the L2 for every tile."""
        expand = problem["expand"]
        tiles = -(-expand.n * expand.p * expand.q // 128)
        weights = sum(spec.weight_elements for _, spec in problem.layers) * problem.dtype.itemsize
        steps = steps_ms(tiles, expand.k // 64, 128 * 64 * sum(widths(problem)), problem, target)
        return max(steps, target.l2_ms(tiles * weights))

    def counters(self, problem: Problem, config: ChainConfig) -> int:
        return 1

    def prepare(
        self, problem: Problem, config: ChainConfig, parameters: Mapping[str, LayerParameters]
    ) -> dict[str, Layer]:
        layers = prepare_layers(problem, parameters)
        if problem["reduce"].k == 256:
            layers |= {
                role: prepare_folded(parameters[role], problem.dtype, 64) for role in ("expand", "reduce")
            }
        return fold_shortcut(layers, parameters, problem.dtype)

    def call(
        self, problem: Problem, config: ChainConfig, buffers: Buffers, constants: dict[str, Layer]
    ) -> Call:
        from fastres.kernels.triton.hopper_expand_reduce import expand_reduce_kernel

        expand, reduce = problem["expand"], problem["reduce"]
        rows, k, (c, cy, cv) = expand.n * expand.p * expand.q, expand.k, widths(problem)
        tiles = -(-rows // 128)
        grid = min(multiprocessors(buffers["expand.x"].device), tiles)
        h, y, out = (memory(buffers[name]) for name in ("expand.x", "reduce", "expand"))
        # Descriptors that are not read stand for themselves: any.
        z_desc = out_desc = descriptor(out, [rows, k], [64, 64])
        v_desc = h_desc = descriptor(h, [rows, c], [64, c])
        wp_desc = we_desc = descriptor(constants["expand"].weight, [k, c], [64, c])
        if cv:
            v_desc = descriptor(memory(buffers["shortcut.x"]), [rows, cv], [64, cv])
            wp_desc = descriptor(constants["shortcut"].weight, [k, cv], [64, cv])
        else:
            z_desc = descriptor(memory(buffers["expand.residual"]), [rows, k], [64, 64])
        arguments = {
            "counter": buffers.counters,
            "h_desc": h_desc,
            "v_desc": v_desc,
            "z_desc": z_desc,
            "out_desc": out_desc,
            "y_desc": descriptor(y, [rows, cy], [64, cy]),
            "we_desc": we_desc,
            "wp_desc": wp_desc,
            "wr_desc": descriptor(constants["reduce"].weight, [cy, k], [cy, 64]),
            **layer_arguments(expand, constants["expand"], "e"),
            **layer_arguments(reduce, constants["reduce"], "r"),
            "tiles": tiles,
            "C": c,
            "CV": cv,
            "CY": cy,
            "K": k,
            "SW": config.weight_stages,
            "SZ": config.residual_slots,
            "SH": config.input_slots,
            "EARLY": int(config.early),
            "DYNAMIC": int(config.dynamic) and claims(tiles, grid),
            "CONSUMER_REGS": 232,
            "PRODUCER_REGS": 32,
        }
        return Call(expand_reduce_kernel, grid, arguments, {"num_warps": 4})


register(HopperExpandReduce())
