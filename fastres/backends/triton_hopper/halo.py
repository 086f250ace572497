"""The Hopper candidates for 3x3 convolutions of 64 channels: hopper.halo and hopper.halo_rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastres.backends.triton_hopper.base import (
    Call,
    HopperCandidate,
    Layer,
    claims,
    descriptor,
    memory,
    multiprocessors,
    prepare_layer,
    steps_ms,
    unfit_layer,
)
from fastres.graph.fold import LayerParameters
from fastres.plan.candidate import Buffers, register
from fastres.plan.pattern import CONV_BN_ACT
from fastres.plan.problem import ConvSpec, Problem, Target
from fastres.tuning.config import Config


@dataclass(frozen=True)
class HaloConfig(Config):
    """Attributes: rows of an 8-pixel-wide tile; stages of the ring, three a tile; consumer groups of 4
    warps; whether the product is taken transposed (64 channels by pixels)."""

    rows: int = 16
    stages: int = 6
    consumers: int = 2
    swap: bool = True


class HopperHalo(HopperCandidate):
    name = "hopper.halo"
    pattern = CONV_BN_ACT
    source = "kernels/triton/hopper_halo.py"
    efficiency = 0.88

    def refuses(self, problem: Problem, target: Target) -> str | None:
        if target.triton >= (3, 8):
            return "Triton 3.8 refuses the view of shared memory that the halo takes; serves 3.6 and 3.7"
        return _unfit(problem["conv"])

    def configs(self, problem: Problem, target: Target) -> Sequence[HaloConfig]:
        # One H100, batch 256, bf16, 56x56, prototypes with static tiles, us: 89.7, 92.0, 95.0, 96.0;
        # dynamic 88 instead of 91.
        return (HaloConfig(), HaloConfig(8, 10, swap=False), HaloConfig(8, 10), HaloConfig(swap=False))

    def counters(self, problem: Problem, config: HaloConfig) -> int:
        return 1

    def prepare(
        self, problem: Problem, config: HaloConfig, parameters: Mapping[str, LayerParameters]
    ) -> Layer:
        return prepare_layer(parameters["conv"], problem.dtype, 64)

    def call(self, problem: Problem, config: HaloConfig, buffers: Buffers, constants: Layer) -> Call:
        from fastres.kernels.triton.hopper_halo import halo_kernel

        spec = problem["conv"]
        shape, box = [spec.n, spec.h, spec.w, 64], [1, config.rows, 8, 64]
        x, y = memory(buffers["conv.x"]), memory(buffers["conv"])
        y_desc = descriptor(y, shape, box)
        z = buffers.get("conv.residual")
        down, across = -(-spec.h // config.rows), -(-spec.w // 8)
        tiles = spec.n * down * across
        grid = min(multiprocessors(x.device), tiles)
        arguments = {
            "counter": buffers.counters,
            "x_desc": descriptor(x, shape, box),
            "x2_desc": descriptor(x, shape, [1, 2, 8, 64]),
            "w_desc": descriptor(constants.weight, [64, 576], [64, 64]),
            "z_desc": y_desc if z is None else descriptor(memory(z), shape, box),
            "y_desc": y_desc,
            "scale": constants.scale,
            "shift": constants.shift,
            "slope": float(spec.act.param),
            "tiles": tiles,
            "TH": config.rows,
            "NTH": down,
            "NTW": across,
            "STAGES": config.stages,
            "RESIDUAL": int(spec.residual),
            "CONSUMERS": config.consumers,
            "ACT": spec.act.code,
            "SWAP": int(config.swap),
            "DYNAMIC": claims(tiles, grid),
            "CONSUMER_REGS": 200,
            "PRODUCER_REGS": 40,
        }
        return Call(halo_kernel, grid, arguments, {"num_warps": 4})


@dataclass(frozen=True)
class RowsConfig(Config):
    """groups: of three boxes of 8 KB in flight; a tile reads three of them."""

    groups: int = 5


class HopperHaloRows(HopperCandidate):
    name = "hopper.halo_rows"
    pattern = CONV_BN_ACT
    source = "kernels/triton/hopper_halo_rows.py"
    # Not measured. A tile takes 27 boxes of 8 KB for 7 tiles, hopper.halo of 8 rows 30 KB for one: as much, and that
    # took 92 us of a floor of 79.
    efficiency = 0.8

    def refuses(self, problem: Problem, target: Target) -> str | None:
        spec = problem["conv"]
        if (reason := _unfit(spec)) is not None:
            return reason
        if spec.h % 8:
            return f"images {spec.h} rows high: takes multiples of 8"
        return None

    def configs(self, problem: Problem, target: Target) -> Sequence[RowsConfig]:
        return RowsConfig(), RowsConfig(4)

    def busiest_ms(self, problem: Problem, target: Target) -> float:
        spec = problem["conv"]
        strips = spec.n * -(-spec.w // 8)
        return steps_ms(strips, spec.h // 8, 64 * 64 * 576, problem, target)

    def counters(self, problem: Problem, config: RowsConfig) -> int:
        return 1

    def prepare(
        self, problem: Problem, config: RowsConfig, parameters: Mapping[str, LayerParameters]
    ) -> Layer:
        return prepare_layer(parameters["conv"], problem.dtype, 64)

    def call(self, problem: Problem, config: RowsConfig, buffers: Buffers, constants: Layer) -> Call:
        from fastres.kernels.triton.hopper_halo_rows import halo_rows_kernel

        spec = problem["conv"]
        classes, across = spec.h // 8, -(-spec.w // 8)
        x, y, z = buffers["conv.x"], buffers["conv"], buffers.get("conv.residual")

        def rows(activation):
            shape = [spec.n, 8, classes, spec.w, 64]
            return descriptor(memory(activation), shape, [1, 8, 1, 8, 64])

        y_desc = rows(y)
        strips = spec.n * across
        grid = min(multiprocessors(x.device), strips)
        arguments = {
            "counter": buffers.counters,
            "x_desc": rows(x),
            "w_desc": descriptor(constants.weight, [64, 576], [64, 64]),
            "z_desc": y_desc if z is None else rows(z),
            "y_desc": y_desc,
            "scale": constants.scale,
            "shift": constants.shift,
            "slope": float(spec.act.param),
            "strips": strips,
            "CLASSES": classes,
            "ACROSS": across,
            "GROUPS": config.groups,
            "RESIDUAL": int(spec.residual),
            "ACT": spec.act.code,
            "DYNAMIC": claims(strips, grid),
            "CONSUMER_REGS": 200,
            "PRODUCER_REGS": 40,
        }
        return Call(halo_rows_kernel, grid, arguments, {"num_warps": 4})


def _unfit(spec: ConvSpec) -> str | None:
    if (reason := unfit_layer(spec)) is not None:
        return reason
    if (spec.c, spec.k) != (64, 64):
        return f"{spec.c} -> {spec.k} channels: takes 64 -> 64"
    if spec.kernel != (3, 3) or not spec.stride == spec.padding == spec.dilation == (1, 1):
        return "takes 3x3 at stride 1, padding 1, dilation 1"
    return None


register(HopperHalo())
register(HopperHaloRows())
