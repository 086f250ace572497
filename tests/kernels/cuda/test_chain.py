"""A whole network at batch 1 as CUDA records alone, launched by one call."""

import itertools

import emulated
import pytest
import torch
from checking import evaluate, make_nodes
from problems import H100, network, problem_of, spec_of

from fastres.backends import cuda  # noqa: F401  (registers the candidates)
from fastres.backends.cuda_ops import RECORD_BYTES
from fastres.graph.fold import LayerParameters
from fastres.plan.candidate import REGISTRY, Buffers
from fastres.plan.planner import Segment
from fastres.plan.problem import PoolSpec
from fastres.plan.steps import Bound, CandidateFailed

# The shortest cover, and the kernels that a plan for batch 1 would have.
ORDER = (
    "cuda.any_pool_linear",
    "cuda.sm90_dual_latency",
    "cuda.sm90_conv_latency",
    "cuda.any_max_pool",
    "cuda.sm80_conv_bn_act",
)


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_a_network_is_one_call(name, device):
    """Every step equals what its kernel gives alone, and the joined call gives the same bits as the steps."""
    if device == "cpu":
        emulated.library()
    graph = network(name)
    nodes, users = graph.nodes, graph.users()
    shapes, specs = {0: (1, 3, 32, 32)}, {}
    for node in nodes:
        specs[node.output] = spec_of(node, shapes[node.inputs[0]])
        shapes[node.output] = specs[node.output].y_shape
    dtype = torch.bfloat16
    values = {0: torch.randn(shapes[0]).to(device, dtype, memory_format=torch.channels_last)}
    launches, at = [], 0
    while at < len(nodes):
        found = ((REGISTRY[c], m) for c in ORDER for m in REGISTRY[c].pattern.matches(nodes, at, users))
        for candidate, match in found:
            layers = {role: specs[node.output] for role, node in match.nodes}
            problem = problem_of(candidate.pattern, dtype, **layers)
            if candidate.accepts(problem, H100) is None:
                break
        else:
            pytest.fail(f"no CUDA kernel takes {nodes[at]}")
        config = candidate.configs(problem, H100)[0]
        inner = make_nodes(problem, device, seed=at)
        tensors = {slot: values[v] for slot, v in match.inputs}
        for role, v in match.outputs:
            out = torch.full(shapes[v], float("nan"), device=device, dtype=dtype)
            values[v] = tensors[role] = (
                out.contiguous(memory_format=torch.channels_last) if out.dim() == 4 else out
            )
        counters = torch.zeros(candidate.counters(problem, config), dtype=torch.int32, device=device)
        workspace = torch.empty(candidate.workspace(problem, config), dtype=torch.uint8, device=device)
        parameters = {role: LayerParameters(node) for role, node in inner.items()}
        constants = candidate.prepare(problem, config, parameters)
        launches.append(candidate.bind(problem, config, Buffers(tensors, counters, workspace), constants))
        launches[-1]()
        role, v = match.outputs[-1]
        want = evaluate(problem, inner, {s: values[i] for s, i in match.inputs}, torch.float64)[role]
        error = (values[v].double() - want).norm() / want.norm()
        assert error < 1e-2, (candidate, problem, error)
        at = match.stop
    assert {launch.join for launch in launches} == {launches[0].join}
    last = values[nodes[-1].output]
    step_by_step = last.clone()
    for value in itertools.islice(values.values(), 1, None):
        value.fill_(float("nan"))
    joined = launches[0].join(launches)
    assert joined.records.numel() == RECORD_BYTES * len(launches)
    joined()
    assert torch.equal(last, step_by_step) and last.isfinite().all()


def test_a_refused_launch_of_a_row_names_its_kernel_and_its_segment(device):
    if device == "cpu":
        emulated.library()
    candidate, window = REGISTRY["cuda.any_max_pool"], PoolSpec(1, 8, 4, 4, (2, 2), (2, 2))
    problem = problem_of(candidate.pattern, torch.float32, pool=window)
    tensors = {
        name: torch.zeros(shape, device=device).to(memory_format=torch.channels_last)
        for name, shape in (("pool.x", window.x_shape), ("pool", window.y_shape))
    }
    launches = [candidate.bind(problem, None, Buffers(tensors), None) for _ in range(3)]
    # 300 KB of shared memory: the last number of the record's header (launch.h)
    launches[1].records.view(torch.int32)[(1420 + 28) // 4] = 300 << 10
    segments = [Segment((), candidate=candidate, problem=problem, reason=str(i)) for i in range(3)]
    with pytest.raises(CandidateFailed, match="any_max_pool: ") as caught:
        Bound(segments, launches[0].join(launches))([])
    assert caught.value.segment.reason == "1"
    if device == "cuda":
        torch.cuda.synchronize()  # the error was the launch's own: the device is well


@pytest.mark.parametrize(
    ("early", "overlap", "found"),
    [
        (-1, True, 114),
        (0, True, 114),  # the first of a row has nobody to wait for
        (1, True, 124),  # reads what its predecessor has yet to write
        (2, True, 444),  # writes what the one before its predecessor has yet to read
        (1, False, 114),
        (2, False, 114),
    ],
)
def test_the_emulator_shows_what_is_done_before_the_wait(early, overlap, found):
    """Otherwise the test above could not fail where a kernel waits too late."""
    emulated.schedule(0, 0)
    assert emulated.library().emulator_overlap(early, overlap) == found
