"""Where values lie: one block of memory, places reused as soon as their value is dead."""

from __future__ import annotations

from dataclasses import dataclass

ALIGNMENT = 256


@dataclass(frozen=True)
class Life:
    """A value of `size` bytes, written by step `first`, read for the last time by step `last`."""

    value: int
    size: int
    first: int
    last: int


def layout(lives: list[Life]) -> tuple[dict[int, int], int]:
    """(value → offset, total bytes): the largest first, each at the lowest place that is free for all of its life
    (greedy by size, as in Pisarchyk and Lee, 2020, "Efficient Memory Management for Deep Neural Net Inference")."""
    placed: list[tuple[Life, int]] = []
    for life in sorted(lives, key=lambda one: (-one.size, one.first)):
        overlapping = sorted(
            (at, at + _aligned(other.size))
            for other, at in placed
            if other.first <= life.last and life.first <= other.last
        )
        offset = 0
        for begin, end in overlapping:
            if offset + _aligned(life.size) <= begin:
                break
            offset = max(offset, end)
        placed.append((life, offset))
    total = max((at + _aligned(life.size) for life, at in placed), default=0)
    return {life.value: at for life, at in placed}, total


def _aligned(size: int) -> int:
    return -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
