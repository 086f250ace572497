"""What this device can do, measured now: the rate of a large copy and of a large matrix product.

A floor is max(bytes / copy rate, flops / matmul rate); the share of the roofline is floor / time. A problem
that fits into a cache can beat a floor made of memory bandwidth: its share is then above 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from fastres.bench.timing import time_gpu, time_interleaved

_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
_MATMUL_SIZE = {"cuda": 8192, "cpu": 1536}


@dataclass(frozen=True)
class Roofline:
    """Measured rates of one device in one dtype.

    Attributes:
        copy: bytes a second, read plus written, of a copy larger than the caches.
        matmul: floating-point operations a second of a square matrix product under torch's current flags.
    """

    copy: float
    matmul: float

    def floor_ms(self, nbytes: float, flops: float) -> float:
        """The least time in milliseconds for moving `nbytes` and computing `flops`."""
        return 1e3 * max(nbytes / self.copy, flops / self.matmul)

    @property
    def ridge(self) -> float:
        """The arithmetic intensity, in flops a byte, at which both limits are equal."""
        return self.matmul / self.copy


def measure(device: torch.device | str, dtype: torch.dtype) -> Roofline:
    """The roofline of `device` in `dtype`: measured once a process, thread count and TF32 flag."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _measure(device, dtype, torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32)


@lru_cache(maxsize=32)
def _measure(device: torch.device, dtype: torch.dtype, threads: int, tf32: bool) -> Roofline:
    kind = "cuda" if device.type == "cuda" else "cpu"
    size, nbytes = _MATMUL_SIZE[kind], _COPY_BYTES[kind]
    if kind == "cuda":
        nbytes = min(nbytes, torch.cuda.get_device_properties(device).total_memory // 8)
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    if kind == "cuda":
        with torch.cuda.device(device):
            copy_ms = time_gpu(lambda: target.copy_(source)).median
            matmul_ms = time_gpu(lambda: torch.mm(a, b)).median
    else:
        fns = {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(a, b)}
        # The best samples: what the machine can do does not depend on who else was using it.
        timings = time_interleaved(fns, budget_s=1.5, warmup_s=0.1, min_rounds=5)
        copy_ms, matmul_ms = (min(timings[name].samples) for name in fns)
    return Roofline(2 * nbytes / copy_ms * 1e3, 2 * size**3 / matmul_ms * 1e3)
