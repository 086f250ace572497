"""What a measurement was made on: device, driver, clocks, power, versions, commit, date."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_SMI_FIELDS = "driver_version,clocks.sm,clocks.mem,power.limit"


@dataclass(frozen=True)
class Environment:
    """One machine at one time. Clocks in MHz, power limit in W; empty: does not apply, or unknown."""

    device: str
    driver: str
    clock_sm: str
    clock_mem: str
    power: str
    threads: str
    cpu: str
    python: str
    torch: str
    cuda: str
    cudnn: str
    triton: str
    fastres: str
    commit: str
    date: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)

    @property
    def slug(self) -> str:
        """The device's name as part of a file name."""
        name = re.sub(r"\(R\)|\(TM\)|NVIDIA|CPU|@.*$", " ", self.device)
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        return f"{slug}-{self.threads}t" if self.threads else slug

    def lines(self) -> list[str]:
        """A few lines for people."""
        rows = [self.device + (f", {self.threads} threads" if self.threads else "")]
        if self.driver:
            rows.append(
                f"driver {self.driver}, SM {self.clock_sm} MHz, memory {self.clock_mem} MHz, {self.power} W"
            )
        parts = [f"torch {self.torch}", f"Python {self.python}", f"fastres {self.fastres}"]
        for name in ("cuda", "cudnn", "triton", "commit"):
            if getattr(self, name):
                parts.insert(-1, f"{name} {getattr(self, name)}")
        return [*rows, ", ".join(parts)]


def environment(device: torch.device | str) -> Environment:
    """The environment of `device`, now. Clocks are read at the moment of the call."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    driver, clock_sm, clock_mem, power = _nvidia_smi(device) if cuda else ("", "", "", "")
    return Environment(
        device=torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        driver=driver,
        clock_sm=clock_sm,
        clock_mem=clock_mem,
        power=power,
        threads="" if cuda else str(torch.get_num_threads()),
        cpu=_cpu_name(),
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=(torch.version.cuda or "") if cuda else "",
        cudnn=str(torch.backends.cudnn.version() or "") if cuda else "",
        triton=_version("triton"),
        fastres=_version("fastres"),
        commit=commit(),
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%MZ"),
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "0.1.0+checkout" if package == "fastres" else ""


def commit() -> str:
    """The checkout's commit, with a "+" where tracked files differ from it; empty outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    head = _output(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
    dirty = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return head + ("+" if head and dirty else "")


def _nvidia_smi(device: torch.device) -> tuple[str, str, str, str]:
    index = torch.cuda.current_device() if device.index is None else device.index
    # nvidia-smi counts all GPUs, PyTorch the visible ones: ask by UUID where PyTorch knows it.
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    which = f"GPU-{uuid}" if uuid else str(index)
    smi = ["nvidia-smi", f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader,nounits", "-i", which]
    fields = [field.strip() for field in _output(smi).split(",")]
    return tuple(fields) if len(fields) == 4 else ("", "", "", "")  # type: ignore[return-value]


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _output(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=20,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
