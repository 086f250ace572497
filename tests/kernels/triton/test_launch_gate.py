"""What Triton's launchers, 3.6's and this one's, hand to the driver for each kernel: grid, shared memory and the
bytes of every parameter, tensor maps among them. The driver records (recording_driver.c), nothing runs.

The kernels themselves are compiled for sm_90; their PTX says how large each parameter is.
"""

import contextlib
import ctypes
import importlib
import re
import struct
import subprocess
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from checking import make_inputs, make_nodes
from hopper_machine import tma_fault
from problems import H100, conv_problem, network_problems
from test_hopper_gate import TARGET
from triton.backends.compiler import GPUTarget

from fastres.activation import RELU, Activation
from fastres.backends import triton_hopper, triton_ops, triton_portable  # noqa: F401
from fastres.backends.triton_portable.launch import resolve
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
DTYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
PROPERTIES = SimpleNamespace(
    warp_size=32,
    multi_processor_count=132,
    shared_memory_per_multiprocessor=228 * 1024,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
)
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


def bound(candidate, problem, calls=False):
    nodes, inputs = make_nodes(problem, "cpu"), make_inputs(problem, "cpu")
    config = candidate.configs(problem, TARGET)[0]
    for role in problem.outputs:
        made = torch.empty(problem.output_shape(role), dtype=problem.dtype)
        inputs[role] = made.contiguous(memory_format=torch.channels_last) if made.dim() == 4 else made
    counters = torch.zeros(candidate.counters(problem, config), dtype=torch.int32)
    constants = candidate.prepare(problem, config, {role: LayerParameters(n) for role, n in nodes.items()})
    workspace = torch.empty(candidate.workspace(problem, config), dtype=torch.uint8)
    made = candidate.calls if calls else candidate.call
    return made(problem, config, Buffers(inputs, counters, workspace), constants)


def launch(library, call, compiled):
    """(recorded configuration, the parameters' bytes) of a launch of `compiled`."""
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
    return Config.in_dll(library, "recorded_config"), pieces


def check_map(piece, host):
    """The map says what the descriptor says, in boxes no wider than a swizzled row, as a Gluon layout asks."""
    made, size = Map.from_buffer_copy(piece), host.base.element_size()
    rank = len(host.shape)
    dims, box, strides = (list(v) for v in (made.dims[:rank], made.box[:rank], made.strides[: rank - 1]))
    swizzle = {code: width for width, code in SWIZZLES.items()}[made.swizzle]
    assert (made.address, made.rank, made.interleave) == (host.base.data_ptr(), rank, 0)
    assert made.dtype == DTYPES[host.base.dtype]
    assert dims == list(host.shape)[::-1] and strides == [s * size for s in host.strides[-2::-1]]
    if hasattr(host, "layout"):
        assert swizzle == host.layout.swizzle_byte_width
    inner = min(host.block_shape[-1], (swizzle or 128) // size)
    assert box == [inner, *host.block_shape[-2::-1]]
    assert tma_fault(made.address, dims, strides, box, size, swizzle) is None


def check_parameters(kernel, arguments, pieces):
    at = iter(pieces)
    for parameter in kernel.params:
        value, name = arguments[parameter.name], parameter.name
        # An integer that is 1 is a constant of the binary, unless the kernel says otherwise.
        if parameter.is_constexpr or (
            value is not None and not parameter.do_not_specialize and _is_one(value)
        ):
            continue
        if hasattr(value, "block_shape"):
            check_map(next(at), value)
            assert [struct.unpack("<i", next(at))[0] for _ in value.shape] == list(value.shape), name
            assert [struct.unpack("<q", next(at))[0] for _ in value.shape] == list(value.strides), name
        elif isinstance(value, torch.Tensor):
            assert struct.unpack("<Q", next(at)) == (value.data_ptr(),), name
        elif isinstance(value, float):
            assert struct.unpack("<f", next(at)) == (struct.unpack("<f", struct.pack("<f", value))), name
        else:
            piece = next(at)
            assert len(piece) == (4 if -(2**31) <= value < 2**31 else 8), name
            assert int.from_bytes(piece, "little", signed=True) == value, name
    # Scratch memory of the compiler and its profiler: none.
    assert list(at) == [bytes(8)] * 2


def _is_one(value):
    return isinstance(value, int) and value == 1


def check_config(config, compiled, programs):
    warps = int(re.search(r"\.reqntid (\d+)", compiled.asm["ptx"])[1]) // 32
    assert list(config.grid) == [programs, 1, 1] and list(config.block) == [32 * warps, 1, 1] and programs
    assert (config.shared, config.stream, config.attribute_count) == (compiled.metadata.shared, 77, 0)
    assert compiled.metadata.global_scratch_size == 0


def check_launch(library, call):
    compiled = call.kernel.warmup(**call.arguments, **call.options, grid=(call.grid,))
    config, pieces = launch(library, call, compiled)
    check_config(config, compiled, call.grid)
    check_parameters(call.kernel, call.arguments, pieces)


@pytest.mark.parametrize("name", [*PROBLEMS, *NETWORK])
def test_the_driver_gets_what_the_candidate_bound(name, driver):
    candidate, problem = problem_named(name)
    if (reason := candidate.accepts(problem, TARGET)) is not None:
        pytest.skip(reason)
    check_launch(driver, bound(candidate, problem))


PORTABLE = {
    "conv_bn_act implicit": conv_problem(3, 17, 9, 7, 20, 3, BF16, act=LEAKY, residual=True),
    "conv_bn_act stationary": conv_problem(40, 64, 56, 56, 64, 1, BF16, act=RELU),
    "conv_bn_act persistent": conv_problem(5, 512, 14, 14, 256, 1, torch.float16, residual=True),
    "conv_bn_act depthwise": conv_problem(2, 24, 9, 7, 24, 3, torch.float32, groups=24),
}


@pytest.mark.parametrize("name", [*PORTABLE, "dual", "shifted_block", "stem_pool", "pool_linear"])
def test_the_driver_gets_what_a_portable_candidate_bound(name, driver, monkeypatch):
    """Launched as plans do it: looked up once, then the bare launcher (triton_portable/launch.py)."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: PROPERTIES)
    candidate = REGISTRY[f"triton.{name.split(' ')[0]}"]
    problem = PORTABLE.get(name) or network_problems(candidate.pattern, ("resnet50",), n=2, size=64)[0]
    for call in bound(candidate, problem, calls=True):
        assert name.split(" ")[-1] in call.kernel.fn.__name__ or " " not in name or "implicit" in name
        compiled = call.kernel.warmup(*call.positional, grid=(1,), **call.options)
        config, pieces = launch(driver, resolve(call, torch.device("cpu")), compiled)
        check_config(config, compiled, config.grid[0])
        assert config.grid[0] <= call.programs if call.multiple else config.grid[0] == call.programs
        check_parameters(call.kernel, call.args, pieces)


def test_the_driver_gets_the_training_primitives_arguments(driver, monkeypatch):
    """Bits of doubles among them: integers of 64 bits, where others have 32."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(triton_ops, "_compiled", {})
    channels = [torch.rand(40) for _ in range(6)]
    momentum, eps = 0.1, 1e-5
    for rows in (64, 50):
        made = [torch.empty(40) for _ in range(3)]
        call = partial(triton_ops.bn_finalize, *channels, momentum, eps, rows, *made)
        triton_ops._compiled.clear()
        call()
        (compiled,) = triton_ops._compiled.values()
        config, pieces = launch(driver, call, compiled)
        check_config(config, compiled, 1)
        kernel = triton_ops._bn_act.bn_finalize_kernel
        numbers = (40, rows, triton_ops._bits(momentum), triton_ops._bits(eps), True, True, True, 128)
        values = (*channels, *made, *numbers)
        check_parameters(kernel, dict(zip(kernel.arg_names, values, strict=True)), pieces)


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
