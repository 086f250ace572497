"""Random problems that the Hopper kernels take: of those that `random_problems` makes they refuse almost all."""

import random

import torch
from problems import conv_problem, problem_of

from fastres.activation import RELU, Activation
from fastres.plan.pattern import DUAL, EXPAND_REDUCE, SHIFTED_BLOCK, STEM_POOL
from fastres.plan.problem import ConvSpec, NormalizeSpec, PoolSpec, Problem

ACTS = ("identity", "relu", "relu6", "silu", "gelu_tanh", "hardswish")


def hopper_problems(name: str, count: int, dtype: torch.dtype, seed: int) -> list[Problem]:
    """`count` for the candidate of that name: odd sizes, channels, strides, paddings, activations."""
    rng = random.Random(f"{name} {seed}")
    make = _MAKERS[name.removeprefix("hopper.")]
    return [make(rng, dtype) for _ in range(count)]


def _act(rng) -> Activation:
    return Activation(rng.choice(ACTS))


def _extent(rng, stride=1):
    """(n, h, w)"""
    return rng.randint(1, 5), stride * rng.randint(1, 40 // stride), stride * rng.randint(1, 40 // stride)


def _conv(rng, dtype):
    while True:
        stride = rng.choice((1, 1, 2))
        n, h, w = _extent(rng, stride)
        kernel = rng.choice(((1, 1), (3, 3), (3, 3), (5, 5), (7, 7), (1, 3), (2, 2)))
        problem = conv_problem(
            n,
            64 * rng.randint(1, 4) if stride == 2 else 8 * rng.randint(1, 40),
            h,
            w,
            8 * rng.randint(1, 40),
            kernel,
            dtype,
            stride=stride,
            padding=tuple(rng.randint(0, extent // 2 + 1) if extent > 1 else 0 for extent in kernel),
            dilation=rng.choice((1, 1, 2)),
            act=_act(rng),
            residual=rng.random() < 0.4,
        )
        if min(problem["conv"].y_shape) > 0:
            return problem


def _dual(rng, dtype):
    stride, k = rng.choice((1, 2)), 8 * rng.randint(1, 64)
    n, h, w = _extent(rng, stride)
    shortcut = ConvSpec(n, 64 * rng.randint(1, 4), h, w, k, (1, 1), (stride, stride))
    expand = ConvSpec(
        n, 64 * rng.randint(1, 4), shortcut.p, shortcut.q, k, (1, 1), act=_act(rng), residual=True
    )
    return problem_of(DUAL, dtype, shortcut=shortcut, expand=expand)


def _expand_reduce(rng, dtype):
    from fastres.backends.triton_hopper.expand_reduce import _CHAINS

    c, reduced, projected = rng.choice(list(_CHAINS))
    (n, h, w), k = _extent(rng), 64 * rng.randint(1, 8)
    layers = dict(
        expand=ConvSpec(n, c, h, w, k, (1, 1), act=_act(rng), residual=True),
        reduce=ConvSpec(n, k, h, w, reduced, (1, 1), act=_act(rng)),
    )
    if projected:
        layers["shortcut"] = ConvSpec(n, projected, h, w, k, (1, 1))
    return problem_of(EXPAND_REDUCE, dtype, **layers)


def _halo(rng, dtype, rows=1):
    n, h, w = _extent(rng)
    h = rows * -(-h // rows)
    return conv_problem(n, 64, h, w, 64, 3, dtype, act=_act(rng), residual=rng.random() < 0.4)


def _halo_rows(rng, dtype):
    return _halo(rng, dtype, 8)


def _shifted_block(rng, dtype):
    (n, h, w), k = _extent(rng), 64 * rng.randint(1, 4)
    reduced, project = rng.choice(((0, False), (64, False), (128, False), (0, True), (64, True)))
    layers = dict(
        conv=ConvSpec(n, 64, h, w, 64, (3, 3), padding=(1, 1), act=_act(rng)),
        expand=ConvSpec(n, 64, h, w, k, (1, 1), act=_act(rng), residual=True),
    )
    if project:
        layers["shortcut"] = ConvSpec(n, 64, h, w, k, (1, 1))
    if reduced:
        layers["reduce"] = ConvSpec(n, k, h, w, reduced, (1, 1), act=_act(rng))
    return problem_of(SHIFTED_BLOCK, dtype, **layers)


def _stem_pool(rng, dtype):
    n, h, w = rng.randint(1, 5), rng.randint(1, 150), rng.randint(1, 300)
    conv = ConvSpec(n, 3, h, w, 64, (7, 7), (2, 2), (3, 3), act=RELU)
    layers = dict(normalize=NormalizeSpec(n, 3, h, w)) if rng.random() < 0.5 else {}
    return problem_of(
        STEM_POOL, dtype, **layers, conv=conv, pool=PoolSpec(*conv.y_shape, (3, 3), (2, 2), (1, 1))
    )


_MAKERS = {
    "conv_bn_act": _conv,
    "dual": _dual,
    "expand_reduce": _expand_reduce,
    "halo": _halo,
    "halo_rows": _halo_rows,
    "shifted_block": _shifted_block,
    "stem_pool": _stem_pool,
}
