"""Batch statistics, of one process or of all processes of a group, and their counterparts in backward.

Groups come by name, as operators can take strings only; "" is no group. The exchange happens inside the
operator's implementation: tracing sees one opaque call.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from . import primitives


def statistics_of(x, count: int, mean, var, new_mean: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of x: those given, or computed now with the mean in `new_mean`."""
    if mean is not None:
        return mean.to(new_mean.dtype), var.to(new_mean.dtype)
    new_var = torch.empty_like(new_mean)
    if count:
        primitives.get("bn_stats", x)(x, new_mean, new_var)
    else:
        # A process without samples still takes part in the group's exchange.
        new_mean.zero_(), new_var.zero_()
    return new_mean, new_var


def merge_over(group: str, mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The group's mean, biased variance and count (Chan et al. 1979), the same bits on every process."""
    group = dist.distributed_c10d._resolve_process_group(group)
    mine = torch.cat([mean, var, mean.new_full((1,), count)])
    every = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(every, mine, group)
    means, variances, counts = torch.stack(every).split([mean.numel(), mean.numel(), 1], dim=1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    var = (counts * (variances + (means - mean).square())).sum(0) / total
    return mean, var, total


def mean_over(group: str, sums: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Both `sums` [C] divided by the count, over one process or a group of them."""
    if not group:
        return tuple(torch._foreach_div(sums, count))
    total = torch.cat([*sums, sums[0].new_full((1,), count)])
    dist.all_reduce(total, group=dist.distributed_c10d._resolve_process_group(group))
    return tuple((total[:-1] / total[-1]).chunk(2))
