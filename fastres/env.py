"""Every environment variable that fastres reads, in one place.

They are read when asked for, so that a test or a launcher may set them late; FASTRES_LOG alone at import. A value that
cannot be understood raises a ValueError naming the variable, what it holds and what it takes.
"""

import logging
import os
from pathlib import Path

VARIABLES = {
    "FASTRES_CACHE": "folder for compiled libraries and tuned tables (default: $XDG_CACHE_HOME/fastres)",
    "FASTRES_BACKENDS": "backends that automatic choice may use (default: all); with a minus what nobody may, as in "
    "-cuda.sm90_dual,-hopper",
    "FASTRES_LOG": "level of the `fastres` logger: debug, info, warning, error (default: warning)",
    "FASTRES_BUILD": "0: never run a compiler, use prebuilt or cached libraries only (default: 1)",
    "FASTRES_COMPILE_JOBS": "processes that compile a plan's Triton kernels (default: the cores, at most 16; 0: none)",
    "FASTRES_PROVE": "0: trust every kernel; 1: a GPU's first call of one is held to fp64 before (default: 1)",
    "FASTRES_CUDA_ARCH": "architectures to build CUDA kernels for, as in '8.0 9.0a' (default: the GPUs here)",
    "FASTRES_CUDA_DEBUG": "1: CUDA kernels give up a wait that lasts too long instead of hanging (default: 0)",
    "FASTRES_TRITON36": "tests only: folder that holds Triton 3.6, for the compile gate on two versions",
}

_LEVELS = ("debug", "info", "warning", "error")


def _read(name: str) -> str | None:
    """The value without blanks around it; None if unset or empty."""
    return os.environ.get(name, "").strip() or None


def cache_dir() -> Path:
    """Folder for what fastres keeps between runs. It is not made here: whoever writes makes it."""
    if value := _read("FASTRES_CACHE"):
        return Path(value).expanduser()
    # The XDG specification says that a relative path is to be ignored.
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path(os.path.expanduser("~")) / ".cache") / "fastres"


def backends() -> tuple[str, ...] | None:
    """Names of the backends that automatic choice may use; None: all of them."""
    names = tuple(name for name in _listed() if not name.startswith("-"))
    return names or None


def excluded() -> frozenset[str]:
    """What is never run, whoever asks: names of backends, of candidates ("cuda.sm90_dual"), and of the primitives of
    training ("triton.bn_act")."""
    return frozenset(name[1:].strip() for name in _listed() if name.startswith("-"))


def _listed() -> list[str]:
    return [name.strip() for name in (_read("FASTRES_BACKENDS") or "").split(",") if name.strip()]


def start_log() -> None:
    """Gives the `fastres` logger the level that FASTRES_LOG asks for, and a handler if it has none."""
    value = _read("FASTRES_LOG")
    if value is None:
        return
    if value.lower() not in _LEVELS:
        raise ValueError(f"FASTRES_LOG is {value!r}, it takes one of {', '.join(_LEVELS)}")
    logger = logging.getLogger("fastres")
    logger.setLevel(value.upper())
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
        logger.addHandler(handler)


def may_build() -> bool:
    """Whether a missing native library may be compiled now."""
    value = _read("FASTRES_BUILD") or "1"
    if value not in ("0", "1"):
        raise ValueError(f"FASTRES_BUILD is {value!r}, it takes 0 or 1")
    return value == "1"


def proves() -> bool:
    """Whether kernels are tried, in a process of their own, before a plan trusts them."""
    value = _read("FASTRES_PROVE") or "1"
    if value not in ("0", "1"):
        raise ValueError(f"FASTRES_PROVE is {value!r}, it takes 0 or 1")
    return value == "1"


def compile_jobs() -> int | None:
    """How many processes may compile kernels at once; None: as many as suit the machine."""
    value = _read("FASTRES_COMPILE_JOBS")
    if value is not None and not value.isdigit():
        raise ValueError(f"FASTRES_COMPILE_JOBS is {value!r}, it takes a number of processes, or 0")
    return None if value is None else int(value)


def cuda_arch() -> tuple[str, ...]:
    """CUDA architectures to build for, such as ('8.0', '9.0a'); empty: those of the GPUs here."""
    return tuple((_read("FASTRES_CUDA_ARCH") or "").replace(",", " ").replace(";", " ").split())


def cuda_debug() -> bool:
    """Whether CUDA kernels are built with bounded waits."""
    value = _read("FASTRES_CUDA_DEBUG") or "0"
    if value not in ("0", "1"):
        raise ValueError(f"FASTRES_CUDA_DEBUG is {value!r}, it takes 0 or 1")
    return value == "1"


def triton36() -> Path | None:
    """Folder that holds Triton 3.6 for the compile gate; None: that gate is skipped."""
    value = _read("FASTRES_TRITON36")
    return Path(value) if value else None
