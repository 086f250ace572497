"""Where values lie: no two that live at the same time share a byte, and dead ones give their place away."""

import random

import pytest

from fastres.plan.arena import ALIGNMENT, Life, layout


@pytest.mark.parametrize("seed", range(60))
def test_values_that_live_together_never_overlap(seed):
    generator = random.Random(seed)
    steps = generator.randint(1, 30)
    lives = []
    for value in range(generator.randint(1, 60)):
        first = generator.randint(0, steps)
        size = generator.choice((0, 1, 255, 256, 257, generator.randint(1, 100_000)))
        lives.append(Life(value, size, first, generator.randint(first, steps)))
    offsets, total = layout(lives)
    assert set(offsets) == {life.value for life in lives}
    for a in lives:
        assert offsets[a.value] % ALIGNMENT == 0 and offsets[a.value] + a.size <= total
        for b in lives:
            if a.value < b.value and a.first <= b.last and b.first <= a.last:
                begin, end = offsets[b.value], offsets[b.value] + max(b.size, 1)
                assert offsets[a.value] + max(a.size, 1) <= begin or end <= offsets[a.value]
    peak = max(
        sum(life.size for life in lives if life.first <= step <= life.last) for step in range(steps + 1)
    )
    assert total >= peak


def test_a_dead_values_place_is_used_again():
    chain = [Life(value, 1000, value, value + 1) for value in range(10)]
    _, total = layout(chain)
    assert total == 2 * 1024


def test_nothing_takes_no_memory():
    assert layout([]) == ({}, 0)
