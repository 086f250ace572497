"""The problems that kernels are tested on; checking.py holds the one way in which a candidate is checked.

`network_problems` lists the distinct kernel calls of the named networks, `random_problems` makes odd ones.
"""

import random
from functools import cache

import torch
from checking import MEAN, STD, check_candidate, compare, evaluate, make_inputs, make_nodes
from torch import nn

from fastres.activation import IDENTITY, RELU, Activation
from fastres.graph.ir import Conv, GlobalAvgPool, Graph, Linear, MaxPool, Node, Normalize
from fastres.plan.pattern import PATTERNS, Match, Pattern
from fastres.plan.problem import ConvSpec, LinearSpec, NormalizeSpec, PoolSpec, Problem, Spec, Target

__all__ = [
    "DISTINCT",
    "H100",
    "NETWORKS",
    "check_candidate",
    "compare",
    "conv_problem",
    "evaluate",
    "make_inputs",
    "make_nodes",
    "network",
    "network_problems",
    "problem_of",
    "random_problems",
    "random_shares",
]
# Different images in a large batch: as many as show a mix-up, few enough for an fp64 oracle of whole layers.
DISTINCT = 3
# name: (bottleneck, blocks a stage, groups, base width)
NETWORKS = {
    "resnet18": (False, (2, 2, 2, 2), 1, 64),
    "resnet34": (False, (3, 4, 6, 3), 1, 64),
    "resnet50": (True, (3, 4, 6, 3), 1, 64),
    "resnet101": (True, (3, 4, 23, 3), 1, 64),
    "resnet152": (True, (3, 8, 36, 3), 1, 64),
    "resnext50_32x4d": (True, (3, 4, 6, 3), 32, 4),
    "wide_resnet50_2": (True, (3, 4, 6, 3), 1, 128),
}
H100 = Target(
    "cuda",
    "sm90",
    "NVIDIA H100 80GB HBM3",
    sms=132,
    bandwidth=3.0e12,
    flops=(("bf16", 7.5e14), ("fp16", 7.5e14), ("fp32", 5.0e13)),
    triton=(3, 6),
    on_paper=True,
)
_BY_NAME = {pattern.name: pattern for pattern in PATTERNS}


class _Builder:
    """A ResNet's graph on the meta device, in the order in which capture gives it."""

    def __init__(self):
        self.nodes: list[Node] = []

    def add(self, kind: type[Node], **fields) -> int:
        value = len(self.nodes) + 1
        self.nodes.append(kind(name=f"{kind.__name__.lower()}{value}", output=value, **fields))
        return value

    def conv(self, x, c, k, size, stride=1, groups=1, act=RELU, residual=None) -> int:
        conv = nn.Conv2d(c, k, size, stride, size // 2, groups=groups, bias=False, device="meta")
        bn = nn.BatchNorm2d(k, device="meta")
        return self.add(Conv, x=x, conv=conv, bn=bn, act=act, residual=residual)


@cache
def network(name: str, normalize: bool = False) -> Graph:
    """The graph of a network of `NETWORKS`, as capture would give it, with parameters on the meta device. Made once:
    it is not to be changed."""
    bottleneck, depths, groups, base = NETWORKS[name]
    b, x = _Builder(), 0
    if normalize:
        x = b.add(Normalize, x=x, mean=MEAN[:3], std=STD[:3])
    x, inside = b.conv(x, 3, 64, 7, 2), 64
    x = b.add(MaxPool, x=x, kernel=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1))
    for stage, depth in enumerate(depths):
        planes = 64 << stage
        width, outside = planes * base // 64 * groups, planes * (4 if bottleneck else 1)
        for block in range(depth):
            stride, shortcut = (2 if stage and not block else 1), x
            if bottleneck:
                y = b.conv(x, inside, width, 1)
                y = b.conv(y, width, width, 3, stride, groups)
            else:
                y = b.conv(x, inside, planes, 3, stride)
            if stride != 1 or inside != outside:
                shortcut = b.conv(x, inside, outside, 1, stride, act=IDENTITY)
            last = (width, outside, 1) if bottleneck else (planes, outside, 3)
            x, inside = b.conv(y, *last, residual=shortcut), outside
    x = b.add(GlobalAvgPool, x=x, flat=True)
    x = b.add(Linear, x=x, linear=nn.Linear(inside, 1000, device="meta"))
    return Graph(b.nodes, (0,), ())


@cache
def network_problems(
    pattern: Pattern,
    networks: tuple[str, ...] = tuple(NETWORKS),
    n: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    size: int = 224,
    normalize: bool = False,
) -> tuple[Problem, ...]:
    """The distinct problems that `pattern` finds in the networks at batch `n`, images of `size` x `size`."""
    found: dict[Problem, None] = {}
    for name in networks:
        graph = network(name, normalize)
        shapes = {0: (n, 3, size, size)}
        specs = {}
        for node in graph.nodes:
            specs[node.output] = spec = spec_of(node, shapes[node.inputs[0]])
            shapes[node.output] = spec.y_shape
        users = graph.users()
        for start in range(len(graph.nodes)):
            for match in pattern.matches(graph.nodes, start, users):
                found[_problem(match, specs, dtype)] = None
    return tuple(found)


def spec_of(node: Node, x_shape: tuple[int, ...]) -> Spec:
    match node:
        case Conv(conv=conv):
            n, c, h, w = x_shape
            return ConvSpec(
                n,
                c,
                h,
                w,
                conv.out_channels,
                conv.kernel_size,
                conv.stride,
                conv.padding,
                conv.dilation,
                conv.groups,
                node.act,
                node.residual is not None,
                node.bn is not None,
                node.bn is not None or conv.bias is not None,
            )
        case MaxPool():
            return PoolSpec(*x_shape, node.kernel, node.stride, node.padding, node.dilation, node.ceil_mode)
        case GlobalAvgPool():
            return PoolSpec(*x_shape, flat=node.flat)
        case Linear():
            linear = node.linear
            return LinearSpec(*x_shape, linear.out_features, linear.bias is not None)
        case Normalize():
            return NormalizeSpec(*x_shape)
    raise TypeError(f"node: {type(node).__name__} has no spec")


def _problem(match: Match, specs: dict[int, Spec], dtype: torch.dtype) -> Problem:
    return Problem(
        match.pattern.name,
        tuple((role, specs[node.output]) for role, node in match.nodes),
        dtype,
        tuple(name for name, _ in match.inputs),
        tuple(role for role, _ in match.outputs),
    )


def problem_of(pattern: Pattern, dtype: torch.dtype, flags: tuple[str, ...] = (), **layers: Spec) -> Problem:
    """The problem with these layers by role; inputs and outputs follow from the pattern's wiring."""
    inputs, outputs = [], []
    for slot in pattern.slots:
        if slot.role not in layers:
            continue
        if slot.x not in layers:
            inputs.append(f"{slot.role}.x")
        spec = layers[slot.role]
        if getattr(spec, "residual", False) and not any(role in layers for role in slot.residual):
            inputs.append(f"{slot.role}.residual")
        if not slot.hidden:
            outputs.append(slot.role)
    ordered = tuple((slot.role, layers[slot.role]) for slot in pattern.slots if slot.role in layers)
    return Problem(pattern.name, ordered, dtype, tuple(inputs), tuple(outputs), flags)


def conv_problem(n, c, h, w, k, kernel, dtype=torch.float32, flags=(), **fields) -> Problem:
    """A `conv_bn_act` problem; `kernel`, `stride`, `padding`, `dilation` are ints or pairs."""
    kernel = _pair(kernel)
    dilation = _pair(fields.pop("dilation", 1))
    default = tuple((extent - 1) // 2 * d for extent, d in zip(kernel, dilation, strict=True))
    padding, stride = _pair(fields.pop("padding", default)), _pair(fields.pop("stride", 1))
    spec = ConvSpec(n, c, h, w, k, kernel, stride, padding, dilation, **fields)
    return problem_of(_BY_NAME["conv_bn_act"], dtype, flags, conv=spec)


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def random_problems(pattern: Pattern, count: int, dtype: torch.dtype, seed: int = 0) -> list[Problem]:
    """`count` problems with odd sizes, strides, dilations, groups, paddings and activations."""
    rng, made = random.Random(seed), []
    while len(made) < count:
        problem = _random_problem(pattern, dtype, rng)
        if all(min(spec.y_shape) > 0 for _, spec in problem.layers):
            made.append(problem)
    return made


def random_shares(metafunc, default: int) -> None:
    """Parametrises `random_share`: which of a kernel's random problems a test takes, 24 at most; as many together as
    `--random` says, else `default`."""
    if "random_share" in metafunc.fixturenames:
        count = metafunc.config.getoption("random") or default
        parts = [range(start, min(start + 24, count)) for start in range(0, count, 24)]
        metafunc.parametrize("random_share", parts, ids=lambda part: f"{part.start}-{part.stop}")


def _random_conv(rng: random.Random, n, c, h, w, **fixed) -> ConvSpec:
    groups = 1
    if rng.random() < 0.4:
        groups = rng.choice([g for g in (2, 3, 4, 8, 16, 32, c) if c % g == 0] or [1])
    k = (
        groups * rng.randint(1, max(1, 160 // groups))
        if rng.random() < 0.5
        else groups * rng.choice((1, 2, 4, 8))
    )
    kernel = rng.choice(((1, 1), (1, 1), (3, 3), (3, 3), (5, 5), (7, 7), (1, 3), (3, 1), (2, 2)))
    fields = dict(
        k=k,
        kernel=kernel,
        stride=rng.choice(((1, 1), (1, 1), (2, 2), (3, 3), (1, 2))),
        padding=tuple(rng.randint(0, extent // 2 + 1) if extent > 1 else 0 for extent in kernel),
        dilation=rng.choice(((1, 1), (1, 1), (2, 2), (1, 3))),
        groups=groups,
        act=Activation(rng.choice(("identity", "relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish"))),
        residual=rng.random() < 0.3,
        affine=rng.random() < 0.8,
    )
    fields.update(fixed)
    return ConvSpec(n, c, h, w, **fields)


def _random_problem(pattern: Pattern, dtype: torch.dtype, rng: random.Random) -> Problem:
    n, h, w = rng.randint(1, 5), rng.randint(1, 40), rng.randint(1, 40)
    c = rng.choice((rng.randint(1, 130), 8 * rng.randint(1, 40), 32 * rng.randint(1, 8)))
    unit = dict(kernel=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1)
    layers: dict[str, Spec] = {}
    for slot in pattern.slots:
        if slot.optional and rng.random() < 0.5:
            continue
        before = layers.get(slot.x) if slot.x else None
        shape = before.y_shape if before is not None else (n, c, h, w)
        if slot.kind is Conv and slot.role == "shortcut":
            # It comes before its expand: the output's width is chosen here, its extent taken from the middle.
            s = rng.choice((1, 1, 2))
            middle = layers.get("conv")
            n_, _, p, q = middle.y_shape if middle else (n, c, h, w)
            outer = (n_, 8 * rng.randint(1, 24), s * p - rng.randint(0, s - 1), s * q - rng.randint(0, s - 1))
            fields = {
                **unit,
                "stride": (s, s),
                "k": 8 * rng.randint(1, 40),
                "act": IDENTITY,
                "residual": False,
            }
            layers["shortcut"] = _random_conv(rng, *outer, **fields)
        elif slot.kind is Conv and slot.role in ("expand", "reduce"):
            fields = {**unit, "act": RELU, "residual": slot.role == "expand"}
            if slot.role == "expand" and "shortcut" in layers:
                fields["k"] = layers["shortcut"].k
                shape = (layers["shortcut"].n, shape[1], layers["shortcut"].p, layers["shortcut"].q)
            layers[slot.role] = _random_conv(rng, *shape, **fields)
        elif slot.kind is Conv and pattern.name == "shifted_block":
            fields = dict(kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
            layers[slot.role] = _random_conv(rng, *shape, **fields, act=RELU, residual=False)
        elif slot.kind is Conv and pattern.name == "stem_pool":
            size = rng.choice((3, 5, 7))
            fields = dict(kernel=(size, size), stride=(2, 2), padding=(size // 2, size // 2), dilation=(1, 1))
            shape = (n, 3, h, w)
            layers[slot.role] = _random_conv(rng, *shape, **fields, groups=1, act=RELU, residual=False)
        elif slot.kind is Conv:
            layers[slot.role] = _random_conv(rng, *shape)
        elif slot.kind is MaxPool:
            layers[slot.role] = PoolSpec(*shape, (3, 3), (2, 2), (1, 1))
        elif slot.kind is GlobalAvgPool:
            layers[slot.role] = PoolSpec(*shape, flat=True)
        elif slot.kind is Linear:
            layers[slot.role] = LinearSpec(*(shape[:2]), rng.choice((1, 7, 10, 100, 1000)))
        elif slot.kind is Normalize:
            layers[slot.role] = NormalizeSpec(n, 3, h, w)
    return problem_of(pattern, dtype, **layers)
