"""What was found out about kernels on a device, by processes that try them for this one; and what is kept of it."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastres
from fastres import env

log = logging.getLogger("fastres")

# Where kernels meet what nobody has tried; those of a CPU are tested on CPUs.
DEVICES = ("cuda",)
# What one proof may take before its process is ended, in seconds; it compiles where nothing was compiled ahead.
_PATIENCE_S = 60.0
_GREETING = "does the device answer there?"


class Disproved(Exception):
    """A kernel's numbers are wrong."""


def wanted(device: torch.device) -> bool:
    """Whether kernels are proved there; ValueError for a FASTRES_PROVE that is neither 0 nor 1."""
    return device.type in DEVICES and env.proves()


def faults_of(
    pieces: Mapping[str, Any], device: torch.device, work: Callable[..., Any], *context: Any
) -> dict[str, str]:
    """key → why it must not run, of pieces by key: `work(piece, *context)` raises for those that are broken.

    What the record has not is tried in another process. What cannot be tried, because no process can be started or the
    GPU's memory is full, is trusted. Never raises.
    """
    try:
        record = Record.of(device)
        if unknown := {key: piece for key, piece in pieces.items() if key not in record}:
            start = time.perf_counter()
            _find_out(unknown, record, device, work, context)
            took = time.perf_counter() - start
            log.info("proved %d kernel calls in %.1f s", sum(key in record for key in unknown), took)
        return {key: fault for key in pieces if (fault := record.fault(key))}
    except Exception as error:  # never the user's failure
        log.info("kernels are not proved: %s: %s", type(error).__name__, error)
        return {}


def _find_out(unknown: Mapping[str, Any], record: Record, device: torch.device, work, context: tuple) -> None:
    """Into the record, what can be found out."""
    from fastres.workers import ask

    answers = False

    def pieces() -> Iterator[tuple[str, Any]]:
        yield _GREETING, None
        if answers:
            yield from unknown.items()

    asked = ask(pieces(), _asked, (str(device), work, context), jobs=1, patience_s=_PATIENCE_S)
    for (key, _), answer in asked:
        fault = why_left_out(answer.reason)
        if key == _GREETING:
            answers = not answer.reason
            if not answers:
                log.info("kernels are not proved, a process of their own has no GPU: %s", answer.reason)
        elif answer.reason and not fault:
            log.info("not proved: %s: %s", key, answer.reason)
        else:
            record.add(key, fault)


def _asked(piece: tuple[str, Any], device: str, work: Callable[..., Any], context: tuple) -> Any:
    from fastres import backends

    key, what = piece
    if key == _GREETING:
        backends.load()
        return float(torch.zeros(1, device=device).item())
    return work(what, *context)


def why_left_out(reason: str) -> str:
    """The reason as a report says it, where it speaks against the kernel; else "" (no memory, no process)."""
    if reason.startswith(f"{Disproved.__name__}: "):
        return f"it was wrong on this device: {reason.partition(': ')[2]}"
    if "out of memory" in reason or "SIGKILL" in reason or "did not start" in reason:
        return ""
    if "its process died" in reason or "CUDA error" in reason or "Triton Error [CUDA]" in reason:
        return f"it crashed on this device: {reason}"
    return f"it hung on this device: {reason}" if "did not end" in reason else ""


class Record:
    """What was proved on a device with the software that is here: a line of text a key, and its fault or "".

    Processes append to one file; what cannot be written is known to this process alone.
    """

    def __init__(self, path: Path):
        self.path = path
        self.known: dict[str, str] = {}
        with contextlib.suppress(OSError):
            for line in path.read_text().splitlines():
                key, tab, fault = line.partition("\t")
                if tab:
                    self.known[key] = fault

    @staticmethod
    def of(device: torch.device) -> Record:
        return _record(env.cache_dir() / "proofs", _surroundings(device))

    def __contains__(self, key: str) -> bool:
        return key in self.known

    def fault(self, key: str) -> str:
        fault = self.known.get(key, "")
        return f"{fault} (noted in {self.path})" if fault else ""

    def add(self, key: str, fault: str = "") -> None:
        fault = " ".join(fault.split())
        self.known[key] = fault
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write(f"{key}\t{fault}\n")
        except OSError as error:
            log.info("proofs are not kept: %s", error)


@cache
def _record(folder: Path, surroundings: str) -> Record:
    return Record(folder / f"{hashlib.sha256(surroundings.encode()).hexdigest()[:16]}.txt")


@cache
def _surroundings(device: torch.device) -> str:
    """What a proof holds for."""
    from fastres.plan.target import detect

    target = detect(device)
    driver = ""
    with contextlib.suppress(OSError):
        driver = Path("/proc/driver/nvidia/version").read_text()
    return "\n".join([target.name, target.arch, driver, torch.__version__, _version("triton"), _sources()])


@cache
def _sources() -> str:
    """A digest of the kernels and of what launches them."""
    folder, digest = Path(fastres.__file__).parent, hashlib.sha256()
    for path in sorted([*(folder / "kernels").rglob("*"), *(folder / "backends").rglob("*")]):
        if path.suffix in (".py", ".cu", ".cuh", ".cpp", ".h"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
