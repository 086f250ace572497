"""Builds kernels/cuda for the CPU: the same sources, compiled against the emulator instead of the GPU.

The library registers the same torch ops, which then take CPU tensors, so that a test of a kernel, of its C++
checks and of its candidate runs here whole.
"""

import ctypes
import functools
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from fastres import native

ROOT = Path(__file__).resolve().parents[3]
KERNELS = ROOT / "kernels" / "cuda"
EMULATOR = Path(__file__).parent / "emulator"
PROBES = Path(__file__).with_name("probes.cu")
_FLAGS = (
    "-O2 -mavx2 -mfma -mf16c -std=c++20 -fPIC -w -fno-strict-aliasing "
    "-DFASTRES_EMULATOR -DTORCH_TARGET_VERSION=0x020a000000000000"
).split()


def cuda_include() -> Path | None:
    """The folder of cuda_runtime.h: of a toolkit, or of pip's package."""
    places = [Path(os.environ[v]) / "include" for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    places += sorted(Path(torch.__file__).parent.parent.glob("nvidia/cu*/include"), reverse=True)
    places += sorted(Path("/usr/local").glob("cuda*/include"), reverse=True)
    return next((p for p in places if (p / "cuda_runtime.h").exists() and (p / "crt").is_dir()), None)


def _sources() -> list[Path]:
    found = [
        p for p in (*sorted(KERNELS.iterdir()), *sorted(EMULATOR.iterdir())) if p.suffix in (".cu", ".cpp")
    ]
    return [*found, PROBES]


def _everything() -> list[Path]:
    return [*KERNELS.iterdir(), *EMULATOR.iterdir()]


@functools.cache
def library() -> ctypes.CDLL:
    """The emulated library, loaded; skips the test where it cannot be built."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        pytest.skip("the emulator is written for Linux on x86-64")
    include = cuda_include()
    if include is None:
        pytest.skip("no cuda_runtime.h: neither a CUDA toolkit nor pip's package is here")
    try:
        compiler = native.find_compiler()
    except native.BuildError as error:
        pytest.skip(str(error))
    return _load(_build(compiler, include))


def _build(compiler: str, include: Path) -> Path:
    folder = Path(tempfile.gettempdir()) / f"fastres-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    torch_include = Path(torch.__file__).parent / "include"
    flags = [*_FLAGS, f"-I{EMULATOR}", f"-I{KERNELS}", f"-I{include}", f"-I{torch_include}"]
    headers = hashlib.sha256(repr((flags, torch.__version__)).encode())
    for path in sorted(p for p in _everything() if p.suffix in (".h", ".cuh")):
        headers.update(path.read_bytes())
    objects, jobs = [], []
    for source in _sources():
        digest = headers.copy()
        digest.update(source.read_bytes())
        made = folder / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        objects.append(made)
        if not made.exists():
            fresh = made.with_suffix(f".{os.getpid()}")
            command = [compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(fresh)]
            jobs.append((subprocess.Popen(command, stderr=subprocess.PIPE, text=True), fresh, made))
            if len(jobs) >= (os.cpu_count() or 1):
                _finish(*jobs.pop(0))
    for job in jobs:
        _finish(*job)
    name = hashlib.sha256("".join(o.name for o in objects).encode()).hexdigest()[:16]
    made = folder / f"emulated-{name}.so"
    if not made.exists():
        fresh = made.with_suffix(f".{os.getpid()}")
        lib = Path(torch.__file__).parent / "lib"
        link = [compiler, "-shared", *map(str, objects), "-o", str(fresh), f"-L{lib}", "-ltorch_cpu"]
        _finish(subprocess.Popen(link, stderr=subprocess.PIPE, text=True), fresh, made)
    return made


def _finish(process: subprocess.Popen, fresh: Path, made: Path) -> None:
    _, errors = process.communicate()
    if process.returncode != 0:
        raise AssertionError(f"the emulated build of {made.name} fails:\n{errors[-4000:]}")
    os.replace(fresh, made)


def _load(path: Path) -> ctypes.CDLL:
    import fastres.backends.cuda_ops  # noqa: F401  (defines the schemas)

    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))


# (threads by number or, if not 0, shuffled by this seed; what comes late: 1 copies, 2 products, 3 both).
# A late product may hide a copy that nobody waited for, and the reverse: all four.
SCHEDULES = {"early": (0, 0), "late copies": (0, 1), "late products": (5, 2), "late, shuffled": (7, 3)}


def schedule(order: int, late: int) -> None:
    """How the emulator runs the threads from now on."""
    library().emulator_configure(order, late)
