"""What a native library is built with: sources, compilers, flags, architectures; and the key made of them."""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fastres import env

TARGETS = ("cpu", "cuda")
PACKAGE = Path(__file__).resolve().parent
_SOURCE_SUFFIXES = {".cpp", ".cu"}
# LibTorch's stable ABI as of 2.10.
_COMMON = ("-O3", "-std=c++20", "-DNDEBUG", "-DTORCH_TARGET_VERSION=0x020a000000000000")
# x86-64-v3 (AVX2, FMA, F16C) is what a library built for other machines may count on.
_PORTABLE = "x86-64-v3"
_PORTABLE_FLAGS = ("avx2", "fma", "f16c", "bmi2")


class BuildError(RuntimeError):
    """A library cannot be built here; the message is the reason."""


def sources(name: str) -> list[Path]:
    """All files that the library is made of, headers included, sorted."""
    folder = PACKAGE / "kernels" / name
    return sorted(p for p in folder.glob("*") if p.suffix in {*_SOURCE_SUFFIXES, ".h", ".cuh"})


def source_hash(name: str) -> str:
    digest = hashlib.sha256()
    for path in sources(name):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.cache
def cpu_flags() -> frozenset[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def _version(command: Sequence[str]) -> str:
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} does not run: {error}") from None
    if done.returncode != 0:
        raise BuildError(f"{command[0]} --version fails: {(done.stderr or done.stdout).strip()[:300]}")
    return done.stdout


def find_compiler() -> str:
    """The C++ compiler: $CXX, else c++, g++ or clang++ on PATH. Raises BuildError."""
    wanted = os.environ.get("CXX", "").strip()
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        if path := shutil.which(name):
            return path
    raise BuildError(f"no C++ compiler ({f'CXX={wanted} is not there' if wanted else 'c++, g++, clang++'})")


def find_nvcc() -> str:
    """nvcc of $CUDA_HOME or $CUDA_PATH, on PATH, of pip's CUDA packages, or the newest in /usr/local."""
    places = [Path(os.environ[v]) / "bin" for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    for place in places:
        if path := shutil.which("nvcc", path=str(place)):
            return path
    if places:
        raise BuildError(f"no nvcc in {places[0]}")
    if path := shutil.which("nvcc"):
        return path
    beside = sorted(Path(torch.__file__).parent.parent.glob("nvidia/cu*/bin"), reverse=True)
    installed = sorted(
        Path("/usr/local").glob("cuda*/bin"),
        key=lambda p: [int(n) for n in re.findall(r"\d+", str(p))],
        reverse=True,
    )
    for place in (*beside, *installed):
        if path := shutil.which("nvcc", path=str(place)):
            return path
    raise BuildError("no nvcc: set CUDA_HOME to a CUDA toolkit")


def find_ninja() -> str:
    with contextlib.suppress(ImportError):
        import ninja

        if path := shutil.which("ninja", path=ninja.BIN_DIR):
            return path
    if path := shutil.which("ninja"):
        return path
    raise BuildError("no ninja: pip install ninja")


def _gencode(arch: Sequence[str]) -> list[str]:
    flags, plain = [], []
    for name in arch:
        if not re.fullmatch(r"\d+\.\d[af]?", name):
            raise ValueError(f"arch is {name!r}, it takes the form '8.0' or '9.0a'")
        digits = name.replace(".", "")
        flags.append(f"-gencode=arch=compute_{digits},code=sm_{digits}")
        if digits.isdigit():
            plain.append(digits)
    if plain:
        # PTX of the lowest one: later GPUs translate it, and it is the only code that they can.
        lowest = min(plain, key=int)
        flags.append(f"-gencode=arch=compute_{lowest},code=compute_{lowest}")
    return flags


def _arch_for(source: Path, arch: Sequence[str]) -> Sequence[str]:
    """The architectures that a source is compiled for: `sm90_x.cu` only for 9.x, if that is among them.

    `sm80_x.cu` is for all: compiled for Hopper, the same source takes part in dependent launch.
    """
    if source.name.startswith("sm90_"):
        return [a for a in arch if re.sub(r"\D", "", a) == "90"] or arch
    return arch


def local_arch() -> tuple[str, ...]:
    """Architectures of the GPUs here, Hopper's and Blackwell's with their own instructions ('9.0a')."""
    if not torch.cuda.is_available():
        return ()
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return tuple(f"{major}.{minor}{'a' if major >= 9 else ''}" for major, minor in sorted(found))


class Recipe:
    """All that decides what a library is: what goes into its key, and its build file."""

    def __init__(self, name: str, arch: tuple[str, ...], *, portable: bool) -> None:
        self.name = name
        if not sources(name):
            raise BuildError(f"no sources in {PACKAGE / 'kernels' / name}")
        self.sources = source_hash(name)
        self.cxx = find_compiler()
        versions = [_version([self.cxx])]
        include = Path(torch.__file__).parent / "include"
        self.flags = [*_COMMON, f"-I{include}"]
        self.cpu_flags: tuple[str, ...] = ()
        self.arch: tuple[str, ...] = ()
        cpu: list[str] = []
        if name == "cpu":
            self.compiler = self.cxx
            self.flags += ["-fPIC", "-fvisibility=hidden", "-Wall", "-fno-math-errno", "-fno-trapping-math"]
            if sys.platform == "linux" and os.uname().machine == "x86_64" and portable:
                self.flags.append(f"-march={_PORTABLE}")
                self.cpu_flags = _PORTABLE_FLAGS
            else:
                self.flags.append("-march=native")
                cpu = sorted(cpu_flags())
        else:
            self.compiler = find_nvcc()
            versions.append(_version([self.compiler]))
            self.arch = arch or env.cuda_arch() or local_arch()
            if not self.arch:
                raise BuildError("no CUDA architecture given, and no GPU here to ask")
            _gencode(self.arch)  # a wrong name is refused here
            self.flags += ["-ccbin", self.cxx, "--expt-relaxed-constexpr", "-Xptxas=-v"]
            self.flags += ["-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA"]
            if env.cuda_debug():
                self.flags.append("-DFASTRES_CUDA_DEBUG")
        parts = [name, self.sources, self.flags, torch.__version__, self.cxx, versions, self.arch, cpu]
        self.key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]

    def write_ninja(self, folder: Path) -> None:
        def quoted(text: str) -> str:
            # `flags` is split by a shell: ninja's own escapes for $, and quotes for blanks.
            return "'" + text.replace("$", "$$") + "'" if re.search(r"[\s'$;]", text) else text

        def path(p: Path | str) -> str:
            return str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

        lib = Path(torch.__file__).parent / "lib"
        libraries = ["-ltorch_cpu", *(["-ltorch_cuda"] if (lib / "libtorch_cuda.so").exists() else [])]
        link = [self.cxx, "-shared"] if self.name == "cpu" else [self.compiler, "-shared", "-ccbin", self.cxx]
        link += [
            "$in",
            "-o",
            "$out",
            quoted(f"-L{lib}"),
            *(libraries if self.name == "cuda" else libraries[:1]),
        ]
        lines = [
            "ninja_required_version = 1.5",
            f"flags = {' '.join(quoted(f) for f in self.flags)}",
            "rule compile",
            f"  command = {quoted(self.compiler)} $flags $gencode -c $in -o $out",
            "rule link",
            f"  command = {' '.join(link)}",
        ]
        objects = []
        for source in sources(self.name):
            if source.suffix in _SOURCE_SUFFIXES:
                objects.append(f"{source.name}.o")
                lines.append(f"build {objects[-1]}: compile {path(source)}")
                if self.arch:
                    lines.append(f"  gencode = {' '.join(_gencode(_arch_for(source, self.arch)))}")
        lines.append(f"build fastres_{self.name}.so: link {' '.join(objects)}")
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")


def complaint(output: str) -> str:
    """The first error line of a compiler's output, else its end."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith("ninja:")]
    errors = [line for line in lines if re.search(r"\b(fatal )?error\b|not found|cannot ", line, re.I)]
    return (errors or lines[-1:] or ["no output"])[0][:400]


def ptxas_report(log_text: str) -> list[tuple[str, str, int, int, str]]:
    """(kernel, arch, registers, spilled bytes, shared memory) of every kernel in ptxas's verbose output."""
    rows, kernel, arch, spill = [], "", "", 0
    for line in log_text.splitlines():
        if found := re.search(r"Compiling entry function '([^']+)' for '([^']+)'", line):
            kernel, arch, spill = *found.groups(), 0
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spill = int(found[1]) + int(found[2])
        elif kernel and (found := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            rows.append((kernel, arch, int(found[1]), spill, shared[1] if shared else "0"))
            kernel = ""
    if rows and (filt := shutil.which("c++filt")):
        names = subprocess.run(
            [filt], input="\n".join(r[0] for r in rows), capture_output=True, text=True
        ).stdout
        if len(demangled := names.splitlines()) == len(rows):
            rows = [(new, *row[1:]) for new, row in zip(demangled, rows, strict=True)]
    return rows
