"""nvcc takes every source for sm_80 and sm_90a; no kernel spills; the symbols are the stable ABI's alone."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import probing
import pytest
import torch

from fastres import native, toolchain
from fastres.backends.cuda.sm90_conv_bn_act import HALO_TILES, TILES

pytestmark = pytest.mark.gate
_SECONDS = 180  # on 2 cores
_ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(library, ptxas's rows, seconds, the compilers' words), built afresh in a folder of its own."""
    try:
        toolchain.find_nvcc()
    except native.BuildError as error:
        pytest.skip(str(error))
    before = os.environ.get("FASTRES_CACHE")
    os.environ["FASTRES_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    try:
        start = time.perf_counter()
        library = native.build("cuda", ("8.0", "9.0a"))
        seconds = time.perf_counter() - start
    finally:
        if before is None:
            del os.environ["FASTRES_CACHE"]
        else:
            os.environ["FASTRES_CACHE"] = before
    log = (library.parent / "build.log").read_text()
    return library, native.ptxas_report(log), seconds, log


def test_everything_compiles_in_time(built):
    library, rows, seconds, _ = built
    about = json.loads(library.with_suffix(".json").read_text())
    print(f"{len(rows)} kernels in {seconds:.0f} s for {', '.join(about['arch'])}")
    assert {arch for _, arch, *_ in rows} == {"sm_80", "sm_90a"}
    # Other work on the machine stretches the wall clock: only a wide margin tells a slow build apart.
    assert seconds < _SECONDS * max(1.0, os.getloadavg()[0] / 2)


def test_no_kernel_spills(built):
    spilled = [(name, arch, spill) for name, arch, _, spill, _ in built[1] if spill]
    assert built[1] and not spilled


def test_no_product_waits_for_the_one_before(built):
    """ptxas says so where it has to serialise wgmma."""
    assert "serialized" not in built[3]


@pytest.fixture(scope="module")
def products(built):
    """The kernels with products: (mangled name, SASS)."""
    beside = Path(pytest.importorskip("triton").__file__).parent / "backends" / "nvidia" / "bin"
    tool = shutil.which("cuobjdump", path=f"{Path(toolchain.find_nvcc()).parent}{os.pathsep}{beside}")
    if tool is None:
        pytest.skip("no cuobjdump")
    command = [tool, "-sass", "-arch", "sm_90a", str(built[0])]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = [text for text in re.split(r"Function : ", sass)[1:] if "HGMMA" in text]
    assert len(kernels) >= 34
    return [(text.split(maxsplit=1)[0], text) for text in kernels]


def test_no_step_of_a_product_waits_for_memory(products):
    """A release at cluster scope is a MEMBAR.ALL.GPU, a round trip to the L2. Kernels with products have three at most:
    a cluster's first and last barrier and, for both blocks, a new ticket."""
    assert not [name for name, text in products if text.count("MEMBAR.ALL.GPU") > 3]


def test_kernels_of_small_batches_are_short(products):
    """A layer of one image takes about as long as fetching 100 KB of instructions: the kernels that chains of layers
    alternate between fit an SM's cache of 128 KB together, and find where their outputs lie without a subroutine."""
    found = [text for name, text in products if "sm90_conv_latency_kernel" in name and "Lb0E" in name]
    assert len(found) == 12
    for text in found:
        code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", text, re.M)
        wait = next(i for i, line in enumerate(code) if "ACQBULK" in line)
        product = next(i for i, line in enumerate(code) if "HGMMA" in line)
        assert len(code) < 4096
        assert product - wait < 250 and not any("CALL" in line for line in code[:product])


def test_the_probes_compile(built):
    assert probing.build().exists()


def test_hopper_convolution_has_every_tile_and_its_registers_fit_the_roles(built):
    """Every config is compiled for both types, simple (0), with the switch of activations (1, but for the halo form)
    and with statistics (2), at 168 registers: what 384 threads share before warps give and take."""
    seen = set()
    for name, arch, registers, *_ in built[1]:
        found = re.search(r"sm90_conv_bn_act_kernel<(\w+), (\d+), (\d+), .*?(\d)>", name)
        if found and arch == "sm_90a":
            seen.add(found.groups())
            assert registers == 168, (name, registers)
    wanted = itertools.product(("__half", "__nv_bfloat16"), TILES, "012")
    wanted = {*wanted, *itertools.product(("__half", "__nv_bfloat16"), HALO_TILES, "02")}
    assert seen == {(dtype, str(m), str(n), finish) for dtype, (m, n), finish in wanted}


def test_the_stem_has_every_source_of_rows_at_the_registers_that_its_roles_share_out(built):
    found = [
        (re.search(r"sm90_stem_pool_kernel<(\w+), .*?(\d)>", name).groups(), registers)
        for name, *_, registers, _, _ in built[1]
        if "sm90_stem_pool_kernel<" in name
    ]
    wanted = itertools.product(("__half", "__nv_bfloat16"), "012")
    assert sorted(found) == [(kernel, 168) for kernel in sorted(wanted)]


def test_tensor_core_kernels_fit_the_blocks_that_their_configs_count_on(built):
    from fastres.backends.cuda.conv_bn_act import resident_blocks

    seen = 0
    for name, arch, registers, *_ in built[1]:
        found = re.search(r"sm80_conv_bn_act_kernel<.*, (\d+), (\d+), (\d+), (\d+), (?:true|false)>", name)
        if found is None:
            continue
        block_m, block_n, warp_m, warp_n = map(int, found.groups())
        threads = block_m // warp_m * (block_n // warp_n) * 32
        resident = 65536 // (threads * -(-registers // 8) * 8)
        dtype = torch.float32 if "kernel<float" in name else torch.bfloat16
        counted = resident_blocks(block_m, block_n, dtype, int(re.sub(r"\D", "", arch)))
        assert resident >= counted, (name, arch, registers)
        seen += 1
    assert seen == 24  # 4 tiles, 3 types, 2 architectures


def test_symbols_are_stable_abi_only(built):
    names = subprocess.run(
        ["nm", "-D", "--undefined-only", str(built[0])], capture_output=True, text=True, check=True
    ).stdout
    wanted = [line.split()[-1] for line in names.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in wanted)
    unstable = [name for name in wanted if re.match(r"_ZN?K?(2at|3c10|5torch)", name)]
    assert not unstable
    # The driver is reached through the runtime, so that the library loads where there is no GPU.
    assert not [name for name in wanted if re.match(r"cu[A-Z]", name)]


def test_a_driver_that_the_runtime_does_not_take_is_the_reason_given(built):
    """Here there is no GPU, as a rule, and no driver: that is one too old."""
    if torch.version.cuda is None:
        pytest.skip("this torch has no CUDA runtime: the library cannot be loaded")
    script = (
        f"import torch; from fastres import native; print(native._cuda_why_not({str(built[0])!r}), end='')"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    if torch.cuda.is_available():
        assert done.stdout == ""
    else:
        assert re.match(r"the library was built with CUDA \d+\.\d, the driver is .*: .*", done.stdout)


def test_every_schema_has_a_kernel_and_bn_act_refuses_what_is_not_on_a_gpu(built):
    """In a process of its own: the emulated library may be loaded here, and registers the same ops."""
    if torch.version.cuda is None:
        pytest.skip("this torch has no CUDA runtime: the library cannot be loaded")
    script = f"""
import torch, fastres.backends.cuda_ops as ops
torch.ops.load_library({str(built[0])!r})
missing = [s for s in ops._SCHEMAS if not torch._C._dispatch_has_kernel_for_dispatch_key(
    "fastres_cuda::" + s[:s.index("(")], "CompositeExplicitAutograd")]
assert not missing, missing
for device in ("cpu", "meta"):
    x, v = torch.ones(2, 3, 4, 4, device=device), torch.ones(3, device=device)
    assert ops.bn_act_forward(x, x, v, v, v, v, None, None, True, 0.1, 1e-5, 1, 0.0, None) == []
    assert ops.bn_act_gradients(x, x, x, v, v, v, v, x, True, 1, 0.0, 15) == []
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
