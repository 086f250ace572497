"""Finds, builds and loads the C++ and CUDA libraries.

    available("cpu")            None once the library is loaded, else the reason why it cannot be
    build("cuda", ("9.0a",))    compiles ahead of time; raises BuildError
    python -m fastres.native --target cpu cuda --arch 8.0 9.0a [--out DIR]

A library is looked for next to the package (`fastres/_native/`, written by `--out`), then in the user's
cache, where ninja builds it once. Several processes may come at the same time: one builds in a temporary
folder under a file lock and renames it into place, so a build that dies half-way leaves nothing to be loaded.

The libraries use LibTorch's stable ABI (no symbol of `at::` or `c10::`), so one build serves every torch
from 2.10 on. The key of a cached build still counts torch's version, because its headers are compiled in.
"""

import argparse
import contextlib
import ctypes
import fcntl
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fastres import env
from fastres.toolchain import (
    PACKAGE,
    TARGETS,
    BuildError,
    Recipe,
    complaint,
    cpu_flags,
    find_compiler,
    find_ninja,
    find_nvcc,
    local_arch,
    ptxas_report,
    source_hash,
    sources,
)

__all__ = [
    "BuildError",
    "available",
    "build",
    "find",
    "find_compiler",
    "find_nvcc",
    "local_arch",
    "main",
    "sources",
]

log = logging.getLogger("fastres.native")


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
                try:
                    torch.ops.load_library(str(path))
                except OSError as error:
                    if path.parent != PACKAGE / "_native":
                        raise
                    log.warning("prebuilt %s library passed over: %s", name, error)
                    path = build(name)
                    torch.ops.load_library(str(path))
                if name == "cuda" and (reason := _cuda_why_not(path)):
                    raise BuildError(reason)
                log.info("loaded %s", path)
                _outcomes[name] = None
            except (BuildError, OSError, RuntimeError, ValueError) as error:
                _outcomes[name] = str(error)
                log.info("no native %s kernels: %s", name, error)
        return _outcomes[name]


_outcomes: dict[str, str | None] = {}
_lock = threading.Lock()


def _cuda_why_not(library: Path) -> str:
    """Why the library's CUDA runtime cannot work with the driver, or ""."""
    why_not = ctypes.CDLL(str(library)).fastres_cuda_why_not
    why_not.restype = ctypes.c_char_p
    return why_not().decode()


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
        arch: CUDA architectures such as "8.0" or "9.0a"; default FASTRES_CUDA_ARCH, else the GPUs here. The
            lowest plain one also gets PTX, for GPUs to come.
        out: folder that receives a copy, `fastres_<name>.so` beside its description `fastres_<name>.json`.
        portable: code for any x86-64-v3 machine instead of this one's CPU; default: if `out` is given.

    Raises:
        BuildError: no compiler, no ninja, no place to write, or the compiler's first complaint.
    """
    if name not in TARGETS:
        raise ValueError(f"name is {name!r}, it takes one of {', '.join(TARGETS)}")
    recipe = Recipe(name, tuple(arch), portable=out is not None if portable is None else portable)
    library = _in_cache(recipe)
    return library if out is None else _install(library, Path(out))


def _install(library: Path, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for source in (library, library.with_suffix(".json")):
        # Never written over in place: a process may have the old one mapped.
        fresh = folder / f".{source.name}.{os.getpid()}"
        shutil.copyfile(source, fresh)
        os.replace(fresh, folder / source.name)
    return folder / library.name


def _prebuilt(name: str) -> tuple[Path | None, str | None]:
    """The library next to the package, or (None, why it is passed over)."""
    library = PACKAGE / "_native" / f"fastres_{name}.so"
    if not library.exists():
        return None, None
    try:
        about = json.loads(library.with_suffix(".json").read_text())
    except (OSError, ValueError) as error:
        return None, f"its description cannot be read ({error})"
    if about.get("sources") != source_hash(name):
        return None, "it was built from other sources"
    missing = [flag for flag in about.get("cpu_flags", ()) if flag not in cpu_flags()]
    if missing:
        return None, f"this CPU lacks {' '.join(missing)}"
    if name == "cuda" and not _runs_here(about.get("arch", ())):
        return None, f"it was built for {' '.join(about.get('arch', ()))}"
    return library, None


def _runs_here(arch: Sequence[str]) -> bool:
    """Whether code for these architectures runs on the current GPU: its own, or an older plain one's PTX."""
    major, minor = torch.cuda.get_device_capability()
    plain = [float(a) for a in arch if not a[-1].isalpha()]
    return f"{major}.{minor}a" in arch or any(a <= major + minor / 10 for a in plain)


def _roots() -> Iterator[tuple[Path, bool]]:
    """Folders where builds may be kept, best first, and whether others may write beside them."""
    yield env.cache_dir() / "native", False
    # For a read-only home, as in containers and on batch systems.
    yield Path(tempfile.gettempdir()) / f"fastres-{os.getuid()}", True


def _trusted(folder: Path) -> bool:
    """Whether nobody else can have put a library there for us to load."""
    about = folder.lstat()
    return stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid() and not about.st_mode & 0o022


def _in_cache(recipe: Recipe) -> Path:
    """The library of a recipe, built now if it is in no cache yet."""
    for root, shared in _roots():
        library = root / f"{recipe.name}-{recipe.key}" / f"fastres_{recipe.name}.so"
        if library.exists() and (not shared or _trusted(root)):
            return library
    if not env.may_build():
        raise BuildError("not built yet, and FASTRES_BUILD=0 forbids to build it")
    reasons = []
    for root, shared in _roots():
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            if shared and not _trusted(root):
                raise PermissionError(f"others may write to {root}")
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


def _build_locked(recipe: Recipe, root: Path) -> Path:
    final = root / f"{recipe.name}-{recipe.key}"
    library = final / f"fastres_{recipe.name}.so"
    if library.exists():
        return library
    for stale in root.glob(f".{final.name}.*"):
        shutil.rmtree(stale, ignore_errors=True)
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=root))
        log.info("building the %s kernels in %s", recipe.name, folder)
        start = time.perf_counter()
        recipe.write_ninja(folder)
        done = subprocess.run(
            [find_ninja(), "-C", str(folder), *_jobs()],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode != 0:
            raise BuildError(f"{recipe.compiler} fails: {complaint(done.stdout + done.stderr)}")
        about = {
            "sources": recipe.sources,
            "torch": torch.__version__,
            "arch": recipe.arch,
            "cpu_flags": recipe.cpu_flags,
            "seconds": round(time.perf_counter() - start, 1),
        }
        (folder / library.name).with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
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
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _jobs() -> list[str]:
    """MAX_JOBS as torch's own extension builder takes it; ninja's default otherwise."""
    jobs = os.environ.get("MAX_JOBS", "")
    return ["-j", jobs] if jobs.isdigit() else []


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
            recipe = Recipe(name, tuple(options.arch), portable=options.out is not None)
            built = _in_cache(recipe)
            path = built if options.out is None else _install(built, options.out)
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
