"""What a run covers: the machine, the sizes, the time it may take."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fastres.bench.models import load_model
from fastres.plan.problem import dtype_from_name


@dataclass(frozen=True)
class Scope:
    """One run.

    Attributes:
        size: "smoke" (does it work, under a minute), "quick" (the whole picture in minutes), "full".
        batches: None: each level's own choice.
        networks: for the model level; None: its own choice.
        seconds: timing of one provider in one case.
        minutes: the run ends by then; what is not measured says so; None: no limit.
    """

    size: str
    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    batches: tuple[int, ...] | None = None
    networks: tuple[str, ...] | None = None
    seconds: float = 1.0
    minutes: float | None = None

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def part_dtypes(self) -> tuple[torch.dtype, ...]:
        """Of what is smaller than a network: in a quick run on a GPU the first alone."""
        return self.dtypes[:1] if self.cuda and self.size == "quick" else self.dtypes

    @property
    def image(self) -> int:
        """Height and width of images."""
        return 32 if self.size == "smoke" else 224

    @property
    def patience(self) -> float:
        """Seconds that a provider may take to answer for the first time; a compiler may take three times it."""
        return self.pick(smoke=60.0, quick=120.0, full=300.0)

    def pick(self, *, smoke, quick, full, cuda_quick=None, cuda_full=None):
        """The value for this run's size and kind of device."""
        if self.size == "smoke":
            return smoke
        if self.size == "quick":
            return cuda_quick if self.cuda and cuda_quick is not None else quick
        return cuda_full if self.cuda and cuda_full is not None else full


def scope(
    size: str,
    device: str = "",
    dtypes: str = "",
    batches: str = "",
    networks: str = "",
    seconds: float | None = None,
    minutes: float | None = None,
) -> Scope:
    """A scope from a command's options; empty ones get defaults for the device.

    Raises:
        ValueError: for an option that says nothing sensible.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cuda = where.type == "cuda"
    names = dtypes or ("bf16,fp16" if cuda else "fp32,bf16" if size != "smoke" else "fp32")
    made = Scope(
        size,
        where,
        tuple(dtype_from_name(name.strip()) for name in names.split(",")),
        _numbers(batches),
        tuple(name.strip() for name in networks.split(",")) if networks else None,
    )
    for name in made.networks or ():
        load_model(name)
    # A GPU sample is a few milliseconds, a CPU sample of a network a few hundred.
    default = made.pick(smoke=0.03, quick=0.25, full=1.5, cuda_quick=0.12, cuda_full=0.4)
    limit = made.pick(smoke=0.8, quick=9.5, full=None, cuda_quick=7.5)
    return replace(made, seconds=seconds or default, minutes=minutes or limit)


def _numbers(text: str) -> tuple[int, ...] | None:
    if not text:
        return None
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = (0,)
    if min(numbers) < 1:
        raise ValueError(f"batch: got {text!r}, takes positive numbers, e.g. 1,8")
    return numbers
