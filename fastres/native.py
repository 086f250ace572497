"""Finds, builds and loads the C++ and CUDA libraries.

    available("cpu")            None once the library is loaded, else the reason why it cannot be
    build("cuda", ("9.0a",))    compiles ahead of time; raises BuildError
    python -m fastres.native --target cpu cuda --arch 8.0 9.0a [--out DIR]

A library is looked for next to the package (`fastres/_native/`, written by `--out`), then in the user's cache, where
ninja builds it once. Several processes may come at the same time: one builds in a temporary folder under a file
lock and renames it into place, so a build that dies half-way leaves nothing that could be loaded.

The libraries use LibTorch's stable ABI: no symbol of `at::` or `c10::`, so one build serves every torch >= 2.10. The
key of a cached build still counts torch's version, because its headers are compiled in.
"""

import argparse
import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fastres import env

log = logging.getLogger("fastres.native")

TARGETS = ("cpu", "cuda")
_PACKAGE = Path(__file__).resolve().parent
_SOURCE_SUFFIXES = {".cpp", ".cu"}
_COMMON = ("-O3", "-std=c++20", "-DNDEBUG", "-DTORCH_TARGET_VERSION=0x020a000000000000")
# x86-64-v3 (AVX2, FMA, F16C) is what a library built for other machines may count on.
_PORTABLE = "x86-64-v3"
_PORTABLE_FLAGS = ("avx2", "fma", "f16c", "bmi2")


class BuildError(RuntimeError):
    """A library cannot be built here; the message is the reason."""


def available(name: str) -> str | None:
    """Load a library once for the process.

    Args:
        name: "cpu" (torch.ops.fastres_cpu) or "cuda" (torch.ops.fastres_cuda).

    Returns:
        None if its ops can be called, else the reason. The outcome is kept: later calls cost nothing.
    """
    if name not in TARGETS:
        raise ValueError(f"name is {name!r}, it takes one of {', '.join(TARGETS)}")
    # Before the lock: this is on the way of every op.
    if name in _outcomes:
        return _outcomes[name]
    with _lock:
        if name not in _outcomes:
            try:
                path = find(name)
                torch.ops.load_library(str(path))
                log.info("loaded %s", path)
                _outcomes[name] = None
            except (BuildError, OSError, RuntimeError, ValueError) as error:
                _outcomes[name] = str(error)
                log.info("no native %s kernels: %s", name, error)
        return _outcomes[name]


_outcomes: dict[str, str | None] = {}
_lock = threading.Lock()


def find(name: str) -> Path:
    """Path of the library: prebuilt, cached, or built now. Raises BuildError with the reason."""
    if name == "cuda" and not torch.cuda.is_available():
        raise BuildError("no CUDA GPU is visible")
    prebuilt, why = _prebuilt(name)
    if prebuilt is not None:
        return prebuilt
    if why is not None:
        log.info("prebuilt %s library passed over: %s", name, why)
    return build(name)


def build(
    name: str, arch: Sequence[str] = (), out: Path | str | None = None, *, portable: bool | None = None
) -> Path:
    """Compile a library, unless the same one is in the cache already.

    Args:
        name: "cpu" or "cuda".
        arch: CUDA architectures such as "8.0" or "9.0a"; default FASTRES_CUDA_ARCH, else the GPUs here. The lowest
            plain one also gets PTX, for GPUs to come.
        out: folder that receives a copy, `fastres_<name>.so` beside its description `fastres_<name>.json`.
        portable: code for any x86-64-v3 machine instead of this one's CPU; default: if `out` is given.

    Raises:
        BuildError: no compiler, no ninja, no place to write, or the compiler's first complaint.
    """
    if name not in TARGETS:
        raise ValueError(f"name is {name!r}, it takes one of {', '.join(TARGETS)}")
    recipe = _Recipe(name, tuple(arch), portable=out is not None if portable is None else portable)
    library = _in_cache(recipe)
    if out is None:
        return library
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for source in (library, library.with_suffix(".json")):
        # Never written over in place: a process may have the old one mapped.
        fresh = folder / f".{source.name}.{os.getpid()}"
        shutil.copyfile(source, fresh)
        os.replace(fresh, folder / source.name)
    return folder / library.name


def sources(name: str) -> list[Path]:
    """All files that the library is made of, headers included, sorted."""
    folder = _PACKAGE / "kernels" / name
    return sorted(p for p in folder.glob("*") if p.suffix in {*_SOURCE_SUFFIXES, ".h", ".cuh"})


def _source_hash(name: str) -> str:
    digest = hashlib.sha256()
    for path in sources(name):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.cache
def _cpu_flags() -> frozenset[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def _prebuilt(name: str) -> tuple[Path | None, str | None]:
    """The library next to the package, or (None, why it is passed over)."""
    library = _PACKAGE / "_native" / f"fastres_{name}.so"
    if not library.exists():
        return None, None
    try:
        about = json.loads(library.with_suffix(".json").read_text())
    except (OSError, ValueError) as error:
        return None, f"its description cannot be read ({error})"
    if about.get("sources") != _source_hash(name):
        return None, "it was built from other sources"
    missing = [flag for flag in about.get("cpu_flags", ()) if flag not in _cpu_flags()]
    if missing:
        return None, f"this CPU lacks {' '.join(missing)}"
    return library, None


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


def _find_ninja() -> str:
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


def local_arch() -> tuple[str, ...]:
    """Architectures of the GPUs here, Hopper's and Blackwell's with their own instructions ('9.0a')."""
    if not torch.cuda.is_available():
        return ()
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return tuple(f"{major}.{minor}{'a' if major >= 9 else ''}" for major, minor in sorted(found))


class _Recipe:
    """All that decides what a library is: what goes into its key, and its build file."""

    def __init__(self, name: str, arch: tuple[str, ...], *, portable: bool) -> None:
        self.name = name
        if not sources(name):
            raise BuildError(f"no sources in {_PACKAGE / 'kernels' / name}")
        self.sources = _source_hash(name)
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
                cpu = sorted(_cpu_flags())
        else:
            self.compiler = find_nvcc()
            versions.append(_version([self.compiler]))
            self.arch = arch or env.cuda_arch() or local_arch()
            if not self.arch:
                raise BuildError("no CUDA architecture given, and no GPU here to ask")
            self.flags += [*_gencode(self.arch), "-ccbin", self.cxx, "--expt-relaxed-constexpr", "-Xptxas=-v"]
            self.flags += ["-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA"]
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
            f"  command = {quoted(self.compiler)} $flags -c $in -o $out",
            "rule link",
            f"  command = {' '.join(link)}",
        ]
        objects = []
        for source in sources(self.name):
            if source.suffix in _SOURCE_SUFFIXES:
                objects.append(f"{source.name}.o")
                lines.append(f"build {objects[-1]}: compile {path(source)}")
        lines.append(f"build fastres_{self.name}.so: link {' '.join(objects)}")
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")


def _roots() -> Iterator[Path]:
    """Folders where builds may be kept, best first."""
    yield env.cache_dir() / "native"
    # Read-only home (containers, batch systems). Others may write to /tmp: take the folder only if it is ours.
    yield Path(tempfile.gettempdir()) / f"fastres-{os.getuid()}"


def _ours(folder: Path) -> bool:
    about = folder.lstat()
    return about.st_uid == os.getuid() and not about.st_mode & 0o022 and not folder.is_symlink()


def _in_cache(recipe: _Recipe) -> Path:
    file = f"fastres_{recipe.name}.so"
    for root in _roots():
        done = root / f"{recipe.name}-{recipe.key}" / file
        if done.exists() and (root.parent != Path(tempfile.gettempdir()) or _ours(root)):
            return done
    if not env.may_build():
        raise BuildError("not built yet, and FASTRES_BUILD=0 forbids to build it")
    reasons = []
    for root in _roots():
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not os.access(root, os.W_OK):
                raise PermissionError(f"{root} is read-only")
            if root.parent == Path(tempfile.gettempdir()) and not _ours(root):
                raise PermissionError(f"{root} belongs to another user, or others may write to it")
            lock = (root / f"{recipe.name}-{recipe.key}.lock").open("a")
        except OSError as error:
            reasons.append(str(error))
            continue
        with lock:
            # A file system without locks: two may build, the renaming still lets one win.
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            return _build_locked(recipe, root)
    raise BuildError("no folder to build in: " + "; ".join(reasons))


def _build_locked(recipe: _Recipe, root: Path) -> Path:
    final = root / f"{recipe.name}-{recipe.key}"
    library = final / f"fastres_{recipe.name}.so"
    if library.exists():
        return library
    for stale in root.glob(f".{final.name}.*"):
        shutil.rmtree(stale, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=root))
    try:
        log.info("building the %s kernels in %s", recipe.name, folder)
        start = time.perf_counter()
        recipe.write_ninja(folder)
        done = subprocess.run(
            [_find_ninja(), "-C", str(folder), *_jobs()],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode != 0:
            raise BuildError(f"{recipe.compiler} fails: {_complaint(done.stdout + done.stderr)}")
        about = {
            "sources": recipe.sources,
            "torch": torch.__version__,
            "arch": recipe.arch,
            "cpu_flags": recipe.cpu_flags,
            "seconds": round(time.perf_counter() - start, 1),
        }
        (folder / f"fastres_{recipe.name}.json").write_text(json.dumps(about, indent=1) + "\n")
        (folder / "build.log").write_text(done.stdout)
        for leftover in (*folder.glob("*.o"), *folder.glob(".ninja*"), folder / "build.ninja"):
            leftover.unlink(missing_ok=True)
        with (folder / library.name).open("rb") as file:
            os.fsync(file.fileno())
        try:
            os.rename(folder, final)
        except OSError:
            if not library.exists():
                raise
        return library
    except OSError as error:
        raise BuildError(f"cannot build in {root}: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _jobs() -> list[str]:
    """MAX_JOBS as torch's own extension builder takes it; ninja's default otherwise."""
    jobs = os.environ.get("MAX_JOBS", "")
    return ["-j", jobs] if jobs.isdigit() else []


def _complaint(output: str) -> str:
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


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m fastres.native`: build ahead of time, say how long it took and what ptxas reports."""
    parser = argparse.ArgumentParser(prog="python -m fastres.native", description=main.__doc__)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="default: both")
    parser.add_argument("--arch", nargs="+", default=(), help="CUDA architectures, as in 8.0 9.0a")
    parser.add_argument(
        "--out", type=Path, help="folder for the libraries (fastres/_native makes them prebuilt)"
    )
    options = parser.parse_args(argv)
    failed = False
    for name in options.target:
        start = time.perf_counter()
        try:
            recipe = _Recipe(name, tuple(options.arch), portable=options.out is not None)
            built = _in_cache(recipe)
            path = build(name, options.arch, options.out)
        except (BuildError, ValueError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = True
            continue
        seconds = json.loads(built.with_suffix(".json").read_text())["seconds"]
        took = time.perf_counter() - start
        print(
            f"{name}: {path} ({took:.1f} s; compiling took {seconds} s{', cached' if took < seconds else ''})"
        )
        for kernel, arch, registers, spill, shared in ptxas_report((built.parent / "build.log").read_text()):
            print(f"  {arch:8} {registers:4} registers {spill:5} B spilled {shared:>7} B shared  {kernel}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
