"""hopper.shifted_block: stage 1's 3x3, then an expand_reduce, in one kernel."""

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
    prepare_layers,
    steps_ms,
    unfit_layer,
)
from fastres.graph.fold import LayerParameters
from fastres.plan.candidate import Buffers, register
from fastres.plan.pattern import SHIFTED_BLOCK
from fastres.plan.problem import Problem, Target
from fastres.tuning.config import Config


@dataclass(frozen=True)
class ShiftedConfig(Config):
    """Pipeline of shifted_block.

    Attributes:
        halo: x comes as three column-shifted boxes of 10 rows, else as nine boxes, one a tap.
        input_slots: such boxes in flight.
        residual_slots: 64-channel chunks of the residual, the output and the reduced output in flight.
        consumers: groups of 4 warps, 1 or 2.
        dynamic: tiles are claimed from a counter instead of shared out evenly, where a block has more than a few.
        in_flight: how many stores later a slot is given back.
    """

    halo: bool
    input_slots: int
    residual_slots: int
    consumers: int = 2
    dynamic: bool = True
    in_flight: int = 1

    def shared_bytes(self, chunks: int, reduced: int, project: bool) -> int:
        weights = 9 + chunks * (1 + reduced // 64 + project)
        return (
            8192 * (weights + self.residual_slots)
            + self.input_slots * (10240 if self.halo else 8192)
            + BARRIERS
        )


# (halo, projection, the reduce's channels): slots of the input and of the residual. With the halo, one
# H100, batch 256, bf16, prototypes of this kernel at 56x56, us (cuDNN's calls): reduce to 64 channels 353
# (662), no reduce 317 (483); static tiles 388. Fewer or more slots (3 to 6 of either) changed nothing. The
# others are unmeasured: what fits.
_SLOTS = {
    (True, False, 0): (4, 10),
    (True, False, 64): (4, 6),
    (True, False, 128): (3, 3),
    (True, True, 0): (5, 4),
    (True, True, 64): (4, 2),
    (False, False, 0): (6, 9),
    (False, False, 64): (5, 6),
    (False, False, 128): (4, 3),
    (False, True, 0): (7, 4),
    (False, True, 64): (5, 2),
}


class HopperShiftedBlock(HopperCandidate):
    name = "hopper.shifted_block"
    pattern = SHIFTED_BLOCK
    source = "kernels/triton/hopper_shifted_block.py"
    efficiency = 0.9

    def refuses(self, problem: Problem, target: Target) -> str | None:
        conv, expand, reduce = problem["conv"], problem["expand"], problem.get("reduce")
        shortcut = problem.get("shortcut")
        for spec in (conv, expand, reduce, shortcut):
            if spec is not None and (reason := unfit_layer(spec)) is not None:
                return reason
        if (conv.c, conv.k) != (64, 64):
            return (
                f"{conv.c} -> {conv.k} channels in the 3x3: only 64 -> 64 has weights that stay on the chip"
            )
        if conv.residual or not expand.residual or (reduce is not None and reduce.residual):
            return "takes exactly one residual, at the expand"
        if expand.k % 64:
            return f"{expand.k} channels out of the expand: takes multiples of 64"
        if reduce is not None and reduce.k not in (64, 128):
            return f"{reduce.k} channels out of the reduce: takes 64 and 128"
        if shortcut is not None and (shortcut.c != 64 or shortcut.stride != (1, 1)):
            return f"a projection of {shortcut.c} channels, stride {shortcut.stride[0]}: takes 64, stride 1"
        return None if self.configs(problem, target) else "the weights do not fit into shared memory"

    def configs(self, problem: Problem, target: Target) -> Sequence[ShiftedConfig]:
        chunks, reduce = problem["expand"].k // 64, problem.get("reduce")
        reduced, project = 0 if reduce is None else reduce.k, problem.get("shortcut") is not None
        # Triton 3.8 refuses the view that the halo takes.
        halos = (True, False) if target.triton < (3, 8) else (False,)
        found = []
        for halo in halos:
            if (halo, project, reduced) not in _SLOTS:
                continue
            inputs, residuals = _SLOTS[halo, project, reduced]
            # Of so few slots none can be kept back until the next one is written.
            kept = int(residuals > 3)
            found += [
                ShiftedConfig(halo, inputs, residuals, in_flight=kept),
                ShiftedConfig(halo, inputs, residuals, dynamic=False, in_flight=kept),
                ShiftedConfig(halo, inputs, residuals, consumers=1, in_flight=kept),
                ShiftedConfig(halo, inputs - 1, residuals, in_flight=kept),
            ]
        return tuple(
            config for config in found if config.shared_bytes(chunks, reduced, project) <= SHARED_MEMORY
        )

    def busiest_ms(self, problem: Problem, target: Target) -> float:
        """Every block first fetches all weights; then two groups have tiles of 8x8 pixels."""
        expand = problem["expand"]
        weights = sum(spec.weight_elements for _, spec in problem.layers)
        fetched = target.l2_ms(target.sms * weights * problem.dtype.itemsize)
        tiles, steps = expand.n * -(-expand.h // 8) * -(-expand.w // 8), 3 + expand.k // 64
        return fetched + steps_ms(tiles, steps, 64 * weights // steps, problem, target, 2)

    def counters(self, problem: Problem, config: ShiftedConfig) -> int:
        return 1

    def prepare(
        self, problem: Problem, config: ShiftedConfig, parameters: Mapping[str, LayerParameters]
    ) -> dict[str, Layer]:
        return fold_shortcut(prepare_layers(problem, parameters), parameters, problem.dtype)

    def call(
        self, problem: Problem, config: ShiftedConfig, buffers: Buffers, constants: dict[str, Layer]
    ) -> Call:
        from fastres.kernels.triton.hopper_shifted_block import shifted_block_kernel

        conv, expand, reduce = problem["conv"], problem["expand"], problem.get("reduce")
        n, h, w, k = conv.n, conv.h, conv.w, expand.k
        rows, columns = -(-h // 8), -(-w // 8)
        tiles = n * rows * columns
        project = "shortcut" in constants
        source = "shortcut.x" if project else "expand.residual"
        x, z, out = (memory(buffers[name]) for name in ("conv.x", source, "expand"))
        grid = min(multiprocessors(x.device), tiles)
        out_desc = descriptor(out, [n, h, w, k], [1, 8, 8, 64])
        wide = layer_arguments(expand, constants["expand"], "e")
        we_desc = descriptor(constants["expand"].weight, [k, 64], [64, 64])
        if reduce is None:
            y_desc, wr_desc = out_desc, we_desc
            last = {name.replace("_e", "_r").replace("_E", "_R"): value for name, value in wide.items()}
        else:
            y_desc = descriptor(memory(buffers["reduce"]), [n, h, w, reduce.k], [1, 8, 8, 64])
            wr_desc = descriptor(constants["reduce"].weight, [reduce.k, k], [64, 64])
            last = layer_arguments(reduce, constants["reduce"], "r")
        arguments = {
            "counter": buffers.counters,
            "x_desc": descriptor(x, [n, h, w, 64], [1, 8, 8, 64]),
            "x2_desc": descriptor(x, [n, h, w, 64], [1, 2, 8, 64]),
            "z_desc": descriptor(z, [n, h, w, 64 if project else k], [1, 8, 8, 64]),
            "out_desc": out_desc,
            "y_desc": y_desc,
            "wc_desc": descriptor(constants["conv"].weight, [64, 576], [64, 64]),
            "we_desc": we_desc,
            "wr_desc": wr_desc,
            "wp_desc": descriptor(constants["shortcut"].weight, [k, 64], [64, 64]) if project else we_desc,
            **layer_arguments(conv, constants["conv"], "c"),
            **wide,
            **last,
            "tiles": tiles,
            "NTH": rows,
            "NTW": columns,
            "CHUNKS": k // 64,
            "REDUCED": 0 if reduce is None else reduce.k,
            "HALO": int(config.halo),
            "PROJECT": int(project),
            "SX": config.input_slots,
            "SZ": config.residual_slots,
            "SW": config.in_flight,
            "CONSUMERS": config.consumers,
            "DYNAMIC": int(config.dynamic) and claims(tiles, grid),
            "CONSUMER_REGS": 232,
            "PRODUCER_REGS": 32,
        }
        return Call(shifted_block_kernel, grid, arguments, {"num_warps": 4})


register(HopperShiftedBlock())
