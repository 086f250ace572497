"""The Hopper candidate for 3x3 convolutions of 64 channels: hopper.halo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastres.backends.triton_hopper_common import (
    Call,
    HopperCandidate,
    Layer,
    descriptor,
    memory,
    multiprocessors,
    prepare_layer,
    unfit_layer,
)
from fastres.graph.fold import LayerParameters
from fastres.plan.candidate import Buffers, register
from fastres.plan.pattern import CONV_BN_ACT
from fastres.plan.problem import Problem, Target
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
        spec = problem["conv"]
        if (reason := unfit_layer(spec)) is not None:
            return reason
        if target.triton >= (3, 8):
            return "Triton 3.8 refuses the view of shared memory that the halo takes; serves 3.6 and 3.7"
        if (spec.c, spec.k) != (64, 64):
            return f"{spec.c} -> {spec.k} channels: takes 64 -> 64"
        if spec.kernel != (3, 3) or not spec.stride == spec.padding == spec.dilation == (1, 1):
            return "takes 3x3 at stride 1, padding 1, dilation 1"
        return None

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
            "DYNAMIC": 1,
            "CONSUMER_REGS": 200,
            "PRODUCER_REGS": 40,
        }
        return Call(halo_kernel, min(multiprocessors(x.device), tiles), arguments, {"num_warps": 4})


register(HopperHalo())
