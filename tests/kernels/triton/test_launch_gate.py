"""What Triton's launchers, 3.6's and this one's, hand to the driver for each Gluon kernel: grid, shared memory and the
bytes of every parameter, tensor maps among them. The driver records (recording_driver.c), nothing runs.

The kernels themselves are compiled for sm_90; their PTX says how large each parameter is.
"""

import ctypes
import importlib
import math
import re
import struct
import subprocess

import pytest
import torch
from checking import make_inputs, make_nodes
from compile_only import on_triton36
from hopper_machine import tma_fault
from problems import H100, conv_problem, network_problems
from test_hopper_gate import TARGET
from triton.backends.compiler import GPUTarget

from fastres.activation import RELU, Activation
from fastres.backends import triton_hopper  # noqa: F401
from fastres.graph.fold import LayerParameters
from fastres.plan.candidate import REGISTRY, Buffers

pytestmark = pytest.mark.gate
BF16 = torch.bfloat16
LEAKY = Activation("leaky_relu", 0.125)
# Small images of the networks' layers; ragged channels, a stride, a padded slab of 32 and two types beside them.
PROBLEMS = {
    "conv_bn_act": conv_problem(3, 72, 9, 7, 136, 1, BF16, act=LEAKY, residual=True),
    "conv_bn_act 3x3/2": conv_problem(2, 64, 16, 12, 64, 3, torch.float16, stride=2, act=RELU),
    "conv_bn_act 24 channels": conv_problem(1, 24, 12, 12, 40, 3, BF16),
    "halo": conv_problem(2, 64, 21, 19, 64, 3, BF16, act=RELU),
    "halo_rows": conv_problem(2, 64, 16, 24, 64, 3, BF16, act=RELU, residual=True),
}
NETWORK = ("dual", "expand_reduce", "shifted_block", "stem_pool")
# CUtensorMapDataType and CUtensorMapSwizzle of cuda.h.
DTYPES = {torch.float16: 6, torch.bfloat16: 9}
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}


class Map(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_uint64),
        *((name, ctypes.c_int32) for name in ("dtype", "rank", "swizzle", "interleave")),
        ("box", ctypes.c_uint32 * 5),
        ("unused", ctypes.c_uint32),
        ("dims", ctypes.c_uint64 * 5),
        ("strides", ctypes.c_uint64 * 4),
    )


class Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The recording driver, loaded under the name that Triton asks the system for."""
    folder = tmp_path_factory.mktemp("driver")
    source, made = __file__.replace("test_launch_gate.py", "recording_driver.c"), folder / "libcuda.so.1"
    command = ["gcc", "-O1", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", str(made), source]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(made), mode=ctypes.RTLD_GLOBAL)


@pytest.fixture
def driver(library, monkeypatch):
    """Triton's own CUDA driver over that library: one H100, stream 77. Other tests find theirs again."""
    if torch.cuda.is_available():
        pytest.skip("a real driver is loaded here: it would be asked")
    module = importlib.import_module("triton.backends.nvidia.driver")
    monkeypatch.setattr(module, "libcuda_dirs", lambda: [library._name.rsplit("/", 1)[0]])
    module.library_dirs.cache_clear()
    active = module.CudaDriver()
    active.get_current_device = lambda: 0
    active.get_current_stream = lambda device: 77
    active.get_current_target = lambda: GPUTarget("cuda", 90, 32)
    monkeypatch.setattr(importlib.import_module("triton.runtime.driver").driver, "_active", active)
    yield library
    module.library_dirs.cache_clear()


def problem_named(name):
    if name in PROBLEMS:
        return REGISTRY[f"hopper.{name.split(' ')[0]}"], PROBLEMS[name]
    candidate = REGISTRY[f"hopper.{name}"]
    problems = network_problems(candidate.pattern, ("resnet50",), n=2, size=64)
    return candidate, next(p for p in problems if candidate.accepts(p, H100) is None)


def bound(candidate, problem):
    nodes, inputs = make_nodes(problem, "cpu"), make_inputs(problem, "cpu")
    config = candidate.configs(problem, TARGET)[0]
    for role in problem.outputs:
        made = torch.empty(problem.output_shape(role), dtype=problem.dtype)
        inputs[role] = made.contiguous(memory_format=torch.channels_last)
    counters = torch.zeros(candidate.counters(problem, config), dtype=torch.int32)
    constants = candidate.prepare(problem, config, {role: LayerParameters(n) for role, n in nodes.items()})
    return candidate.call(problem, config, Buffers(inputs, counters), constants)


def launch(library, call):
    """(compiled kernel, recorded configuration, the parameters' bytes) of a launch."""
    arguments = {**call.arguments, **call.options}
    compiled = call.kernel.warmup(**arguments, grid=(call.grid,))
    found = re.findall(
        r"\.param (?:\.align \d+ )?\.(\w+)(?: \.ptr[^,\n]*)? \w+?(?:\[(\d+)\])?,?\n", compiled.asm["ptx"]
    )
    sizes = [int(count) if count else int(kind[1:]) // 8 for kind, count in found]
    (ctypes.c_int * 256).in_dll(library, "parameter_sizes")[: len(sizes)] = sizes
    ctypes.c_int.in_dll(library, "parameter_count").value = len(sizes)
    count = ctypes.c_int.in_dll(library, "recorded_launches")
    before = count.value
    call()
    assert count.value == before + 1
    raw = bytes((ctypes.c_ubyte * sum(sizes)).in_dll(library, "recorded_parameters"))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    pieces = [raw[at : at + size] for at, size in zip(starts, sizes, strict=True)]
    return compiled, Config.in_dll(library, "recorded_config"), pieces


def check_map(piece, host):
    """The map says what the descriptor says, in boxes no wider than a swizzled row, as its layout asks."""
    made, size = Map.from_buffer_copy(piece), host.base.element_size()
    rank = len(host.shape)
    assert (made.address, made.rank, made.interleave) == (host.base.data_ptr(), rank, 0)
    assert made.dtype == DTYPES[host.base.dtype] and made.swizzle == SWIZZLES[host.layout.swizzle_byte_width]
    dims, box, strides = (list(v) for v in (made.dims[:rank], made.box[:rank], made.strides[: rank - 1]))
    assert dims == list(host.shape)[::-1] and strides == [s * size for s in host.strides[-2::-1]]
    inner = min(host.block_shape[-1], host.layout.swizzle_byte_width // size)
    assert box == [inner, *host.block_shape[-2::-1]]
    assert tma_fault(made.address, dims, strides, box, size, host.layout.swizzle_byte_width) is None


def check_launch(library, call):
    compiled, config, pieces = launch(library, call)
    warps = int(re.search(r"\.reqntid (\d+)", compiled.asm["ptx"])[1]) // 32
    assert list(config.grid) == [call.grid, 1, 1] and list(config.block) == [32 * warps, 1, 1]
    assert (config.shared, config.stream, config.attribute_count) == (compiled.metadata.shared, 77, 0)
    assert warps >= call.options["num_warps"]
    at = iter(pieces)
    for parameter in call.kernel.params:
        value = call.arguments[parameter.name]
        if parameter.is_constexpr:
            continue
        if hasattr(value, "block_shape"):
            check_map(next(at), value)
            assert [struct.unpack("<i", next(at))[0] for _ in value.shape] == list(value.shape)
            assert [struct.unpack("<q", next(at))[0] for _ in value.shape] == list(value.strides)
        elif isinstance(value, torch.Tensor):
            assert struct.unpack("<Q", next(at)) == (value.data_ptr(),), parameter.name
        elif isinstance(value, float):
            assert struct.unpack("<f", next(at)) == (value,), parameter.name
        else:
            assert struct.unpack("<i", next(at)) == (value,), parameter.name
    # Scratch memory of the compiler and its profiler: none.
    assert list(at) == [bytes(8)] * 2 and compiled.metadata.global_scratch_size == 0
    assert math.prod(config.grid) > 0


@pytest.mark.parametrize("name", [*PROBLEMS, *NETWORK])
def test_the_driver_gets_what_the_candidate_bound(name, driver):
    candidate, problem = problem_named(name)
    if (reason := candidate.accepts(problem, TARGET)) is not None:
        pytest.skip(reason)
    check_launch(driver, bound(candidate, problem))


def test_a_map_that_the_driver_refuses_is_an_error(driver):
    """And so a reason to run the next best kernel, not an output that nobody wrote."""
    call = bound(*problem_named("conv_bn_act"))
    refuse = ctypes.c_int.in_dll(driver, "refuse_maps")
    refuse.value = 1
    try:
        with pytest.raises(RuntimeError, match="tensor map"):
            call()
    finally:
        refuse.value = 0


def test_the_same_on_triton_3_6():
    names = [*PROBLEMS, *NETWORK]
    on_triton36(
        [f"{__file__}::test_the_driver_gets_what_the_candidate_bound[{name}]" for name in names]
        + [f"{__file__}::test_a_map_that_the_driver_refuses_is_an_error"]
    )
