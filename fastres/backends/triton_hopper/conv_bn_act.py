"""hopper.conv_bn_act: dense convolutions, one output tile after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastres.backends.triton_hopper.base import (
    Call,
    HopperCandidate,
    Layer,
    claims,
    descriptor,
    multiprocessors,
    prepare_folded,
    prepare_layer,
    unfit_layer,
)
from fastres.backends.triton_hopper.tiling import (
    PING_PONG,
    TALL,
    WIDE,
    GemmConfig,
    fits,
    folds,
    gemm_ms,
    input_descriptor,
    output_descriptor,
    slab_of,
    tile_arguments,
    tiling_of,
    unfit_geometry,
)
from fastres.graph.fold import LayerParameters
from fastres.plan.candidate import Buffers, register
from fastres.plan.pattern import CONV_BN_ACT
from fastres.plan.problem import ConvSpec, Problem, Target

# One H100, batch 256, bf16, prototypes of this kernel with static tiles, the fastest of 13 (1x1) or 10 (3x3).
_NARROW = GemmConfig(128, 64, stages=3, consumers=1, per_sm=2)
_RESIDENT = GemmConfig(128, 64, stages=4, staged=2, stationary=True)
_PICKS: dict[tuple[int, int, int, int, bool], GemmConfig] = {
    # (c, k, r, stride, residual): config                              us against cuDNN's
    (64, 64, 1, 1, False): _NARROW,  # 78.0 / 77.1
    (256, 64, 1, 1, False): _RESIDENT,  # 172.7 / 177.8
    (64, 256, 1, 1, True): GemmConfig(64, 256, stages=4, staged=2, stationary=True),  # 316 (dynamic) / 332.9
    (64, 256, 1, 1, False): GemmConfig(64, 256, stages=3),  # 198.8 / 782.4
    (256, 128, 1, 1, False): _NARROW,  # 220.0 / 211.1
    (128, 512, 1, 1, True): _RESIDENT,  # 169.3 / 167.4
    (512, 128, 1, 1, False): GemmConfig(128, 64, stages=6, staged=2),  # 89.8 / 92.2
    (512, 256, 1, 1, False): WIDE,  # 119.1 / 116.1
    (256, 1024, 1, 1, True): GemmConfig(128, 128, stages=4, stationary=True),  # 86 / 92
    (1024, 512, 1, 1, False): WIDE,  # 85 / 83
    (512, 1024, 1, 2, False): WIDE,
    (64, 64, 3, 1, False): _RESIDENT,  # 137.3 / 148.7; hopper.halo 88
    (256, 256, 3, 1, False): WIDE,  # 80 / 80
    (512, 512, 3, 1, False): GemmConfig(128, 128, stages=4, skip=True),  # 74 / 81
}
# The same at batch 32, where it is another one: us against cuDNN's, and the pick's above where that was timed.
_PICKS_32: dict[tuple[int, int, int, int, bool], GemmConfig] = {
    (64, 256, 1, 1, True): _RESIDENT,  # 45.1 / 53.0, 46.9
    (128, 128, 3, 1, False): TALL,  # 17.2 / 18.6, 17.7
    (256, 1024, 1, 1, True): GemmConfig(64, 256, stages=3),  # 12.1 / 13.9, 12.4
    (256, 256, 3, 1, False): PING_PONG,  # 15.5 / 21.1, 25.9
    (1024, 2048, 1, 2, False): TALL,  # 15.4 / 24.9, 17.8
    (512, 2048, 1, 1, True): WIDE,  # 11.2 / 12.7, 12.3
    (2048, 512, 1, 1, False): GemmConfig(128, 64, stages=6, staged=2),  # 12.0 / 12.2, 14.1
    (512, 512, 3, 1, False): GemmConfig(128, 64, stages=6, staged=2),  # 22.6 / 19.1, 25.6
}
# Between them on a logarithmic scale, as tables are looked up.
_NEARER_32 = 90
# What `fastres tune` tries beside the pick: the prototypes' sweep.
_SWEEP = (
    PING_PONG,
    GemmConfig(128, 128, stages=2, consumers=1, per_sm=2),
    WIDE,
    TALL,
    GemmConfig(128, 64, stages=6, staged=2),
    _NARROW,
    GemmConfig(64, 256, stages=3),
    GemmConfig(64, 64, stages=6, staged=2),
    GemmConfig(128, 128, stages=4, staged=2, stationary=True),
    GemmConfig(128, 128, stages=4, stationary=True),
    GemmConfig(64, 256, stages=4, staged=2, stationary=True),
    _RESIDENT,
    GemmConfig(128, 256, stages=4, consumers=1, warps=8, stationary=True),
    GemmConfig(128, 128, stages=4, skip=True),
)


class HopperConv(HopperCandidate):
    name = "hopper.conv_bn_act"
    pattern = CONV_BN_ACT
    source = "kernels/triton/hopper_conv_bn_act.py"

    def refuses(self, problem: Problem, target: Target) -> str | None:
        spec = problem["conv"]
        reason = unfit_layer(spec) or unfit_geometry(spec)
        return reason or (None if self.configs(problem, target) else "no tile fits into shared memory")

    def configs(self, problem: Problem, target: Target) -> Sequence[GemmConfig]:
        spec = problem["conv"]
        layer = spec.c, spec.k, spec.kernel[0], spec.stride[0], spec.residual
        picked = _PICKS.get(layer, _default(spec))
        if spec.n <= _NEARER_32:
            picked = _PICKS_32.get(layer, picked)
        choices = dict.fromkeys((picked, _default(spec), *_SWEEP))
        return tuple(config for config in choices if fits(spec, config, target.sms))

    def busiest_ms(self, problem: Problem, target: Target) -> float:
        spec, config = problem["conv"], self.configs(problem, target)[0]
        taps = spec.kernel[0] * spec.kernel[1]
        return gemm_ms(problem, target, spec, spec.k, config, taps * -(-spec.c // slab_of(spec.c)))

    def counters(self, problem: Problem, config: GemmConfig) -> int:
        return -(-problem["conv"].k // config.block_n) if config.stationary else 1

    def prepare(
        self, problem: Problem, config: GemmConfig, parameters: Mapping[str, LayerParameters]
    ) -> Layer:
        make = prepare_folded if folds(problem["conv"], config) else prepare_layer
        return make(parameters["conv"], problem.dtype, slab_of(problem["conv"].c))

    def prepare_key(self, problem: Problem, config: GemmConfig):
        return problem.dtype, folds(problem["conv"], config)

    def call(self, problem: Problem, config: GemmConfig, buffers: Buffers, constants: Layer) -> Call:
        from fastres.kernels.triton.hopper_conv_bn_act import conv_bn_act_kernel

        spec = problem["conv"]
        x, y, z = buffers["conv.x"], buffers["conv"], buffers.get("conv.residual")
        slab, tiling = slab_of(spec.c), tiling_of(spec, config)
        columns = -(-spec.k // config.block_n)
        tiles = tiling.tiles * columns
        blocks = multiprocessors(x.device) * config.per_sm
        step = columns if config.stationary else 1
        grid = min(blocks // step * step, tiles)
        y_desc = output_descriptor(y, spec, tiling, spec.k, config.block_n)
        arguments = {
            "counter": buffers.counters,
            "x_desc": input_descriptor(x, spec, tiling, slab),
            "w_desc": descriptor(constants.weight, list(constants.weight.shape), [config.block_n, slab]),
            "z_desc": y_desc if z is None else output_descriptor(z, spec, tiling, spec.k, config.block_n),
            "y_desc": y_desc,
            "scale": constants.scale,
            "shift": constants.shift,
            "slope": float(spec.act.param),
            "tiles": tiles,
            "columns": columns,
            "C": spec.c,
            "R": spec.kernel[0],
            "S": spec.kernel[1],
            "STRIDE": spec.stride[0],
            "DILATION": spec.dilation[0],
            "PAD_H": spec.padding[0],
            "PAD_W": spec.padding[1],
            **tile_arguments(spec, tiling),
            "BN": config.block_n,
            "BK": slab,
            "RESIDUAL": int(spec.residual),
            "ACT": spec.act.code,
            "STATIONARY": int(config.stationary),
            "SKIP": int(config.skip),
            "SCALED": int(not folds(spec, config)),
            # A consumer must know how many taps the other one's tile has.
            "DYNAMIC": 0 if config.skip else claims(tiles, grid),
            **config.kernel_arguments(),
        }
        return Call(conv_bn_act_kernel, grid, arguments, config.options())


def _default(spec: ConvSpec) -> GemmConfig:
    """For layers that were not measured: the ping-pong tile that most picks are, narrower where K or the
    number of tiles is small, with resident weights where a residual takes the bandwidth."""
    if spec.k <= 64:
        return (
            _RESIDENT if spec.c * spec.kernel[0] * spec.kernel[1] <= 576 else GemmConfig(128, 64, 6, staged=2)
        )
    tiles = -(-spec.n * spec.p * spec.q // 128) * -(-spec.k // 128)
    if tiles < 132:
        return GemmConfig(64, 64, stages=6, staged=2)
    return PING_PONG


register(HopperConv())
