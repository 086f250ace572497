"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process among `count`, and its device. Made by `join`."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, t: Tensor) -> Tensor:
        """`t` summed over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(t)
        return t

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()


def join(device: str | None = None) -> Processes:
    """Meets the other processes if torchrun's environment names any.

    Args:
        device: "cpu", "cuda", "cuda:1"; None: a GPU where there is one, the local rank's under torchrun.
    """
    count, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type == "cuda":
        if where.index is None:
            where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(where)
    if count > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    return Processes(rank, count, where)


def leave(processes: Processes) -> None:
    """Ends what `join` began."""
    if processes.count > 1 and dist.is_initialized():
        dist.destroy_process_group()
