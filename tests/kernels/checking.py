"""How a candidate is checked: bound to poisoned, guarded memory, run twice, compared with fp64 PyTorch."""

import math

import torch
import torch.nn.functional as F
from oracle import assert_close_to_oracle, assert_same_bits, guarded, relative_norm
from torch import Tensor, nn

from fastres.graph.fold import LayerParameters
from fastres.graph.ir import Conv, GlobalAvgPool, Linear, MaxPool, Node, Normalize
from fastres.plan.candidate import Buffers, Candidate
from fastres.plan.pattern import PATTERNS
from fastres.plan.problem import ConvSpec, LinearSpec, NormalizeSpec, PoolSpec, Problem

MEAN, STD = (0.485, 0.456, 0.406, 0.5), (0.229, 0.224, 0.225, 0.25)
_BY_NAME = {pattern.name: pattern for pattern in PATTERNS}
_ONE_ROUNDING = ("conv_bn_act", "linear", "stem_pool", "global_avg_pool", "max_pool")
# Of whole-number problems: variance + eps is 1, exactly (torch before 2.14 refuses an eps of 0).
_EPS = 2.0**-10
_EXACT = ("identity", "relu", "relu6")


def make_nodes(problem: Problem, device, seed: int = 0, integers: bool = False) -> dict[str, Node]:
    """A node for every layer, with random parameters in `problem.dtype` (BN in fp32); on the meta device without any.

    `integers`: whole weights and shifts, scales that are powers of two, so that products and sums are exact.
    """
    generator = torch.Generator().manual_seed(seed)

    meta = torch.device(device).type == "meta"

    def fill(tensor: Tensor, low: float, high: float) -> None:
        if meta:
            return
        if integers:
            values = torch.randint(-2, 3, tensor.shape, generator=generator).float()
        else:
            values = torch.rand(tensor.shape, generator=generator) * (high - low) + low
        tensor.data.copy_(values)

    nodes: dict[str, Node] = {}
    for index, (role, spec) in enumerate(problem.layers):
        common = dict(name=role, x=-1, output=index)
        if isinstance(spec, ConvSpec):
            bias = spec.bias and not spec.affine
            conv = nn.Conv2d(
                spec.c, spec.k, spec.kernel, spec.stride, spec.padding, spec.dilation, spec.groups, bias=bias
            )
            bound = math.sqrt(3 / math.prod(spec.weight_shape[1:]))  # unit variance out
            fill(conv.weight, -bound, bound)
            if bias:
                fill(conv.bias, -1, 1)
            bn = None
            if spec.affine:
                bn = nn.BatchNorm2d(spec.k, eps=_EPS if integers else 1e-5).eval()
                fill(bn.running_mean, -0.5, 0.5)
                fill(bn.bias, -0.5, 0.5)
                if integers:
                    bn.running_var.fill_(1 - _EPS)
                    bn.weight.data.copy_(2.0 ** torch.randint(-1, 2, (spec.k,), generator=generator))
                else:
                    fill(bn.running_var, 0.5, 2.0)
                    fill(bn.weight, -1.5, 1.5)
                bn = bn.to(device)
            conv = conv.to(device, problem.dtype)
            residual = -1 if spec.residual else None
            nodes[role] = Conv(conv=conv, bn=bn, act=spec.act, residual=residual, **common)
        elif isinstance(spec, LinearSpec):
            linear = nn.Linear(spec.c, spec.k, bias=spec.bias)
            fill(linear.weight, -math.sqrt(3 / spec.c), math.sqrt(3 / spec.c))
            if spec.bias:
                fill(linear.bias, -1, 1)
            nodes[role] = Linear(linear=linear.to(device, problem.dtype), **common)
        elif isinstance(spec, NormalizeSpec):
            nodes[role] = Normalize(mean=MEAN[: spec.c], std=STD[: spec.c], **common)
        elif spec.kernel is None:
            nodes[role] = GlobalAvgPool(flat=spec.flat, **common)
        else:
            nodes[role] = MaxPool(
                kernel=spec.kernel,
                stride=spec.stride,
                padding=spec.padding,
                dilation=spec.dilation,
                ceil_mode=spec.ceil_mode,
                **common,
            )
    return nodes


def make_inputs(
    problem: Problem,
    device,
    seed: int = 0,
    integers: bool = False,
    planar: frozenset[str] = frozenset(),
    distinct: int | None = None,
) -> dict[str, Tensor]:
    """Random inputs by name, in channels_last where they have four dimensions and are not named in `planar`;
    the first `distinct` images (None: all) are different, the others repeat them."""
    generator = torch.Generator().manual_seed(seed + 1)
    inputs = {}
    for name in problem.inputs:
        whole, dtype = problem.input_shape(name), problem.input_dtype(name)
        shape = whole if distinct is None else (min(distinct, whole[0]), *whole[1:])
        if dtype == torch.uint8:
            value = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        elif integers:
            value = torch.randint(-3, 4, shape, generator=generator).to(dtype)
        else:
            value = torch.randn(shape, generator=generator).to(dtype)
        value = value.to(device)
        if shape != whole:
            value = value[torch.arange(whole[0], device=device) % distinct]
        rows = value.dim() == 4 and name not in planar
        inputs[name] = value.contiguous(memory_format=torch.channels_last) if rows else value
    return inputs


@torch.no_grad()
def evaluate(
    problem: Problem,
    nodes: dict[str, Node],
    inputs: dict[str, Tensor],
    dtype: torch.dtype,
    *,
    round_to: torch.dtype | None = None,
    tf32: bool = False,
) -> dict[str, Tensor]:
    """PyTorch's unfused arithmetic in `dtype`: role → output.

    `round_to`: layers' outputs are rounded to that type. `tf32`: factors are cut to TF32 as tensor cores do.
    """
    cut = _cut_to_tf32 if tf32 else lambda t: t
    slots = {slot.role: slot for slot in _BY_NAME[problem.pattern].slots}
    done: dict[str, Tensor] = {}
    for role, spec in problem.layers:
        slot, node = slots[role], nodes[role]
        x = done[slot.x] if slot.x in done else inputs[f"{role}.x"]
        match node:
            case Conv(conv=conv, bn=bn):
                bias = None if conv.bias is None else conv.bias.to(dtype)
                y = F.conv2d(
                    cut(x.to(dtype)),
                    cut(conv.weight.to(dtype)),
                    bias,
                    conv.stride,
                    conv.padding,
                    conv.dilation,
                    conv.groups,
                )
                if bn is not None:
                    wide = torch.float64 if dtype == torch.float64 else torch.float32
                    stats = [t.to(wide) for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias)]
                    y = F.batch_norm(y, *stats, eps=bn.eps)
                if spec.residual:
                    inner = next((done[r] for r in slot.residual if r in done), None)
                    y = y + (inputs[f"{role}.residual"].to(dtype) if inner is None else inner)
                y = spec.act(y)
            case Linear(linear=linear):
                bias = None if linear.bias is None else linear.bias.to(dtype)
                y = F.linear(cut(x.to(dtype)), cut(linear.weight.to(dtype)), bias)
            case Normalize():
                wide = torch.float64 if dtype == torch.float64 else torch.float32
                # The constants are fp32 before anything is computed, in the oracle too.
                mean, std = (torch.tensor(v).to(x.device, wide).view(-1, 1, 1) for v in (node.mean, node.std))
                y = ((x.to(wide) / 255 - mean) / std).to(dtype)
            case MaxPool():
                y = F.max_pool2d(
                    x.to(dtype), node.kernel, node.stride, node.padding, node.dilation, node.ceil_mode
                )
            case GlobalAvgPool():
                y = x.to(dtype).mean((2, 3), keepdim=not node.flat)
        done[role] = y.to(round_to).to(dtype) if round_to is not None else y
    return done


def _cut_to_tf32(t: Tensor) -> Tensor:
    return (t.view(torch.int32) & ~0x1FFF).view(torch.float32)


@torch.no_grad()
def _magnitudes(
    problem: Problem, nodes: dict[str, Node], inputs: dict[str, Tensor]
) -> tuple[dict[str, Tensor], int]:
    """(role → sum of |products| behind each output, length of the sum): the layers on absolute values."""
    slots = {slot.role: slot for slot in _BY_NAME[problem.pattern].slots}
    done: dict[str, Tensor] = {}
    k = 1
    for role, spec in problem.layers:
        slot, node = slots[role], nodes[role]
        x = done[slot.x] if slot.x in done else inputs[f"{role}.x"].double().abs()
        match node:
            case Conv(conv=conv, bn=bn):
                p = LayerParameters(node)
                scale, shift = (t.double().abs().view(-1, 1, 1) for t in p.scale_shift())
                weight = p.weight.double().abs()
                y = F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
                # scale * (bias - mean) + beta is computed in one rounding more than shift alone.
                y = y * scale + shift
                if bn is not None:
                    y = y + bn.running_mean.double().abs().view(-1, 1, 1) * scale
                if spec.residual:
                    inner = next((done[r] for r in slot.residual if r in done), None)
                    y = y + (inputs[f"{role}.residual"].double().abs() if inner is None else inner)
                # An activation is at most 1.13 times as steep as the identity (GELU).
                y, k = 1.13 * y, k + math.prod(spec.weight_shape[1:])
            case Linear(linear=linear):
                bias = None if linear.bias is None else linear.bias.double().abs()
                y, k = F.linear(x, linear.weight.double().abs(), bias), k + spec.c
            case Normalize():
                mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device) for v in (node.mean, node.std))
                y = (x / 255 + mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
            case MaxPool():
                y = F.max_pool2d(x, node.kernel, node.stride, node.padding, node.dilation, node.ceil_mode)
            case GlobalAvgPool():
                y, k = x.mean((2, 3), keepdim=not node.flat), k + spec.h * spec.w
        done[role] = y
    return done, k


def check_candidate(
    candidate: Candidate,
    problem: Problem,
    config=None,
    device: torch.device | str = "cpu",
    *,
    seed: int = 0,
    integers: bool = False,
    runs: int = 2,
    planar: bool = False,
    distinct: int | None = None,
) -> float:
    """Run `candidate` on random data and hold every output to the oracle; the worst image's relative error.

    Outputs are NaN-poisoned and guarded, the workspace holds garbage, `runs` runs must agree bit by bit and
    leave the inputs alone, and Triton's and Gluon's their counters at zero. `integers`: whole inputs, and every element
    must be exact where layers allow it (identity, ReLU, ReLU6, no mean); intermediate values are rounded to
    `problem.dtype`, as between kernels.
    `planar`: the inputs that the candidate takes contiguous come so. `distinct`: the batch repeats so many images,
    whose results must be equal wherever in the batch they stand, and the oracle computes each once: how large batches
    are checked.
    """
    nodes = make_nodes(problem, device, seed, integers)
    names = candidate.planar(problem) if planar else frozenset()
    assert names or not planar, f"{candidate} takes channels_last only"
    inputs = make_inputs(problem, device, seed, integers, names, distinct)
    parameters = {role: LayerParameters(node) for role, node in nodes.items()}
    constants = candidate.prepare(problem, config, parameters)
    tensors, guards, outputs = {}, [], {}
    for name, value in inputs.items():
        if value.dtype == torch.uint8:
            tensors[name] = value.clone(memory_format=torch.preserve_format)
            continue
        layout = "nchw" if name in names else "nhwc"
        tensors[name], guard = guarded(value.shape, value.dtype, layout=layout, device=device)
        tensors[name].copy_(value)
        guards.append(guard)
    if not candidate.allocates:
        for role in problem.outputs:
            tensors[role], guard = guarded(problem.output_shape(role), problem.dtype, device=device)
            guards.append(guard)
    counters = torch.zeros(candidate.counters(problem, config), dtype=torch.int32, device=device)
    workspace = torch.empty(candidate.workspace(problem, config), dtype=torch.uint8, device=device)
    launch = candidate.bind(problem, config, Buffers(tensors, counters, workspace), constants)
    for _ in range(runs):
        counters.zero_()
        workspace.fill_(0xFF)  # NaN in every float type
        if candidate.allocates:
            result = launch(*(tensors[name] for name in problem.inputs))
            result = result if isinstance(result, tuple) else (result,)
            current = dict(zip(problem.outputs, result, strict=True))
        else:
            for role in problem.outputs:
                tensors[role].fill_(float("nan"))
            launch()
            current = {
                role: tensors[role].clone(memory_format=torch.preserve_format) for role in problem.outputs
            }
        for role, value in current.items():
            if role in outputs:
                assert_same_bits(outputs[role], value, f"{candidate} {problem} {role}: two runs")
        # (CUDA's kernels rely on the runner alone, which zeroes counters before every run.)
        assert candidate.backend == "cuda" or not counters.any(), (
            f"{candidate} {problem}: counters are not zero"
        )
        outputs = current
    for guard in guards:
        guard()
    for name, value in inputs.items():
        assert torch.equal(tensors[name], value), f"{candidate} {problem}: wrote into its input {name}"
    if distinct is not None:
        for role, value in outputs.items():
            for start in range(distinct, value.shape[0], distinct):
                again = value[start : start + distinct]
                assert torch.equal(again, value[: again.shape[0]]), (
                    f"{candidate} {problem} {role}: images from {start} on differ from equal ones at the start"
                )
        inputs, outputs = ({name: t[:distinct] for name, t in d.items()} for d in (inputs, outputs))
    return compare(problem, nodes, inputs, outputs, integers=integers, what=str(candidate))


def compare(problem, nodes, inputs, outputs, *, integers=False, what="out") -> float:
    """Hold `outputs` (role → tensor) to the oracle; the worst image's relative error."""
    acts = {spec.act.kind for _, spec in problem.layers if isinstance(spec, ConvSpec)}
    means = any(isinstance(spec, PoolSpec) and spec.kernel is None for _, spec in problem.layers)
    if integers and acts <= set(_EXACT) and not means and "normalize" not in nodes:
        exact = evaluate(problem, nodes, inputs, torch.float64, round_to=problem.dtype)
        for role, out in outputs.items():
            # + 0.0: -0 and 0 are the same answer
            assert torch.equal(out + 0.0, exact[role].to(out.dtype) + 0.0), (
                f"{what} {problem} {role}: whole numbers are not exact; "
                f"{(out.double() - exact[role]).abs().nan_to_num(torch.inf).max().item()} off"
            )
        return 0.0
    ref = evaluate(problem, nodes, inputs, torch.float64)
    tf32 = "tf32" in problem.flags
    own = evaluate(problem, nodes, inputs, problem.dtype, tf32=tf32)
    magnitudes, k = _magnitudes(problem, nodes, inputs)
    # Where 16-bit values stand between two layers, their rounding is what counts, and PyTorch has it too.
    one_rounding = problem.dtype == torch.float32 or problem.pattern in _ONE_ROUNDING
    if "normalize" in nodes and problem.dtype != torch.float32:
        one_rounding = False
    for role, out in outputs.items():
        assert_close_to_oracle(
            out,
            ref[role],
            own[role],
            magnitude=magnitudes[role] if one_rounding else None,
            k=k,
            c=2.0,
            eps_acc=2.0**-10 if tf32 else None,
            # fp32's own error is a few bits of summation order: the element-wise bound says it all.
            check_norm=problem.dtype != torch.float32,
            what=f"{what} {problem} {role}",
        )
    return max((relative_norm(out, ref[role]) for role, out in outputs.items()), default=0.0)
