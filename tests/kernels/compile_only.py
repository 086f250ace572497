"""Compile a kernel launch for a GPU that need not be here, and read what came out.

The arguments are specialised as a launch would do it (alignment, divisibility by 16, equality with 1), so
what is compiled is what will run. Tensors may be on the meta device. For Triton and Gluon, Triton 3.6 to 3.8.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import triton

from fastres import env
from fastres.ahead import Source

# Bytes of shared memory that one block may take, by compute capability (CUDA programming guide).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORES = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)")


@dataclass(frozen=True)
class Compiled:
    """What the compiler said.

    Attributes:
        name: the kernel's function name.
        shared: bytes of shared memory of a block.
        registers: of a thread; stack: its bytes of local memory, where spilled registers go.
        tensor_cores: how many tensor-core instructions stand in the PTX.
        ptx: the PTX; cubin: the machine code.
    """

    name: str
    shared: int
    registers: int
    stack: int
    tensor_cores: int
    ptx: str
    cubin: bytes


def specialization(kernel: Any, args: Mapping[str, Any], options: Mapping[str, Any], capability: int) -> str:
    """A text that is equal for launches that compile to the same binary."""
    return Source(kernel, args, options, capability).key()


def compile_for(capability: int, kernel: Any, args: Mapping[str, Any], **options: Any) -> Compiled:
    """Compile for sm_`capability`. Raises what Triton raises. Results are in Triton's own cache."""
    compiled = Source(kernel, args, options, capability).compile()
    ptx = compiled.asm["ptx"]
    registers, stack = _resources(compiled.asm["cubin"])
    return Compiled(
        kernel.fn.__name__,
        compiled.metadata.shared,
        registers,
        stack,
        len(TENSOR_CORES.findall(ptx)),
        ptx,
        compiled.asm["cubin"],
    )


_BARRIER = re.compile(r"^\s*bar(?:rier)?\.(?:warp\.)?sync\b")
_TOUCH = re.compile(
    r"\b([ls][dt]\.shared|[ls][dt]matrix|wgmma\.wait_group|cp\.async\.bulk\.wait_group|fence\.proxy)"
)
_STORE = re.compile(r"\bcp\.async\.bulk\.tensor\.\dd\.global\.shared")


def unordered(ptx: str) -> list[str]:
    """Where one thread speaks for a partition before the others' work is known to be done.

    The source says `store; fence; arrive` of all threads, but one thread arrives, or issues the TMA store: between
    that and every thread's accesses to shared memory, waits and fences the compiler must put a barrier. So it must
    between the wait for a TMA store and a write into its buffer.
    """
    touched, stored, found = "", False, []
    for line in ptx.splitlines():
        # Where a partition begins or ends: other warps.
        if "setmaxnreg" in line:
            touched, stored = "", False
        if _BARRIER.match(line):
            touched = ""
            continue
        arrives = "mbarrier.arrive" in line and "expect_tx" not in line
        if (arrives or _STORE.search(line)) and (touched or (stored and not arrives)):
            found.append(f"{line.strip()} after {touched or 'an unfenced store'}")
        touch = _TOUCH.search(line)
        if touch is None:
            continue
        writes = touch[1] in ("st.shared", "stmatrix")
        if writes and touched.startswith("cp.async.bulk.wait_group"):
            found.append(f"{line.strip()} after {touched}")
        stored = writes or (stored and touch[1] != "fence.proxy")
        touched = line.strip()
    return found


def added_waits(compiled: Compiled) -> int:
    """How many waits for wgmma ptxas put in beside the program's own: where its products' registers may be touched
    while they run it makes every product wait for the one before (its warnings C7510 and C7512)."""
    ours = len(re.findall(r"\bwgmma\.wait_group\b", compiled.ptx))
    return len(re.findall(r"\bWARPGROUP\.DEPBAR\b", _cuobjdump("-sass", compiled.cubin))) - ours


def _cuobjdump(what: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [os.fspath(tool), what, file.name], capture_output=True, text=True, check=True
        ).stdout


def _resources(cubin: bytes) -> tuple[int, int]:
    text = _cuobjdump("-res-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {text!r}")
    return int(found[1]), int(found[2])


def candidate_calls(candidate: Any, problem: Any, config: Any, planar: bool = False) -> list[Any]:
    """The launches of a candidate that has `calls`, on meta tensors; `planar`: inputs are contiguous where the
    candidate takes them so."""
    import torch
    from checking import make_nodes

    from fastres.graph.fold import LayerParameters
    from fastres.plan.candidate import Buffers

    parameters = {role: LayerParameters(node) for role, node in make_nodes(problem, "meta").items()}
    constants = candidate.prepare(problem, config, parameters)
    shapes = [(name, problem.input_shape(name), problem.input_dtype(name)) for name in problem.inputs]
    shapes += [(role, problem.output_shape(role), problem.dtype) for role in problem.outputs]
    tensors, contiguous = {}, candidate.planar(problem) if planar else ()
    for name, shape, dtype in shapes:
        value = torch.empty(shape, dtype=dtype, device="meta")
        rows = len(shape) == 4 and name not in contiguous
        tensors[name] = value.contiguous(memory_format=torch.channels_last) if rows else value
    counters = torch.empty(candidate.counters(problem, config), dtype=torch.int32, device="meta")
    workspace = torch.empty(candidate.workspace(problem, config), dtype=torch.uint8, device="meta")
    return candidate.calls(problem, config, Buffers(tensors, counters, workspace), constants)


def on_triton36(tests: list[str]) -> None:
    """Run gates, by their pytest ids, on Triton 3.6 in a process of its own; skips where that is not to be had."""
    if triton.__version__.startswith("3.6."):
        pytest.skip("this is Triton 3.6")
    folder = env.triton36()
    if folder is None:
        pytest.skip("FASTRES_TRITON36 names no folder with Triton 3.6")
    paths = os.pathsep.join((str(folder), *filter(None, [os.environ.get("PYTHONPATH")])))
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-m", "gate", "-n", "0", *tests],
        env={**os.environ, "PYTHONPATH": paths},
        cwd=env.__file__.rsplit("fastres", 1)[0],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0 and f"{len(tests)} passed" in ran.stdout, ran.stdout + ran.stderr
