"""Calls of probes.cu: in the emulator, or on a GPU, each list of calls in a process of its own, which may die or hang.

Run as a script (what the tests do) it needs neither torch nor the package: calls come pickled on stdin.
"""

import ctypes
import hashlib
import os
import pickle
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).with_name("probes.cu")
IMAGE = 64 << 10  # bytes of shared memory that a probe shows
_SECONDS = 60


@dataclass
class Call:
    """A probe's name, its numbers, what lies in the memory that it reads, and in the memory that it writes."""

    name: str
    arguments: list[int]
    data: np.ndarray
    out: np.ndarray


@dataclass
class Shown:
    status: list[int]
    out: np.ndarray


def perform(library: ctypes.CDLL, call: Call) -> Shown:
    arguments = (ctypes.c_int64 * 64)(*call.arguments)
    data, out = np.ascontiguousarray(call.data), np.ascontiguousarray(call.out).copy()
    status, error = (ctypes.c_int * 16)(), ctypes.create_string_buffer(256)
    failed = library.fastres_probe(
        call.name.encode(),
        arguments,
        data.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(data.nbytes),
        out.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(out.nbytes),
        status,
        error,
    )
    if failed:
        raise RuntimeError(error.value.decode())
    return Shown(list(status), out)


def run(device: str, calls: list[Call]) -> list[Shown]:
    if device == "cpu":
        import emulated

        return [perform(emulated.library(), call) for call in calls]
    command = [sys.executable, __file__, str(build())]
    done = subprocess.run(command, input=pickle.dumps(calls), capture_output=True, timeout=_SECONDS)
    assert done.returncode == 0, done.stderr.decode()[-500:]
    return pickle.loads(done.stdout)


def build() -> Path:
    """The probes for a Hopper, compiled by nvcc once for these sources. Raises fastres.native.BuildError."""
    from fastres import native, toolchain

    folder = Path(tempfile.gettempdir()) / f"fastres-probes-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    files = [SOURCE, *toolchain.sources("cuda")]
    made = folder / f"{hashlib.sha256(b''.join(f.read_bytes() for f in files)).hexdigest()[:16]}.so"
    if made.exists():
        return made
    kernels = next(f.parent for f in files if f.name == "tma.cpp")
    fresh = made.with_suffix(f".{os.getpid()}")
    command = [toolchain.find_nvcc(), "-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC"]
    command += ["-ccbin", toolchain.find_compiler(), "-gencode=arch=compute_90a,code=sm_90a", "-shared"]
    command += [f"-I{kernels}", str(SOURCE), str(kernels / "tma.cpp"), "-o", str(fresh)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise native.BuildError(done.stderr[-2000:])
    os.replace(fresh, made)
    return made


if __name__ == "__main__":
    loaded = ctypes.CDLL(sys.argv[1])
    # Loading unpickles Call, which is of this script there.
    sys.modules["probing"] = sys.modules["__main__"]
    shown = [perform(loaded, call) for call in pickle.load(sys.stdin.buffer)]
    sys.stdout.buffer.write(pickle.dumps(shown))
