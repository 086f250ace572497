"""The clock tells slow from fast, takes turns fairly, and pairs its samples."""

import time

import pytest
import torch

from fastres.bench.timing import (
    Timing,
    host_overhead,
    latencies,
    quantile,
    ratio,
    threads,
    time_gpu,
    time_interleaved,
)


def test_a_sleep_is_timed_at_its_length_and_twice_the_sleep_at_ratio_two():
    timings = time_interleaved(
        {"one": lambda: time.sleep(0.004), "two": lambda: time.sleep(0.008)}, rounds=7, warmup_s=0.01
    )
    assert timings["one"].n == timings["two"].n == 7
    assert 4.0 <= timings["one"].median < 8.0
    assert 1.2 < ratio(timings["two"], timings["one"]).median < 2.2


def test_every_round_calls_everyone_and_the_order_rotates():
    calls: list[str] = []

    def competitor(name):
        def call():
            calls.append(name)
            time.sleep(0.001)

        return call

    time_interleaved({name: competitor(name) for name in "abc"}, rounds=3, warmup_s=0.0)
    measured = "".join(calls[-9:])
    assert measured == "abcbcacab"


def test_short_calls_are_repeated_within_a_sample():
    count = 0

    def call():
        nonlocal count
        count += 1

    timing = time_interleaved({"x": call}, rounds=2, warmup_s=0.001)["x"]
    assert count > 200 and timing.median < 0.05


def test_budget_bounds_the_rounds():
    start = time.perf_counter()
    timing = time_interleaved({"x": lambda: time.sleep(0.002)}, budget_s=0.1, warmup_s=0.01, min_rounds=3)[
        "x"
    ]
    assert 3 <= timing.n <= 50 and time.perf_counter() - start < 2


def test_quantiles_are_numpys():
    assert quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert quantile([1.0], 0.99) == 1.0
    timing = Timing.of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert (timing.median, timing.p20, timing.p80, timing.n) == (3.5, 2.0, 5.0, 6)


def test_ratio_pairs_rounds_so_that_drift_cancels():
    drift = [1.0, 2.0, 4.0, 8.0]
    pairwise = ratio(Timing.of([2 * d for d in drift]), Timing.of(drift))
    assert (pairwise.median, pairwise.p20, pairwise.p80) == (2.0, 2.0, 2.0)


def test_ratio_of_different_runs_spreads_by_both_noises():
    other = ratio(Timing(2.0, 1.8, 2.2, 9), Timing(1.0, 0.9, 1.1, 5))
    assert (
        other.median == 2.0
        and other.p20 == pytest.approx(1.8 / 1.1)
        and other.p80 == pytest.approx(2.2 / 0.9)
    )


def test_no_samples_is_refused():
    with pytest.raises(ValueError, match="samples"):
        Timing.of([])
    assert time_interleaved({}) == {}


def test_threads_are_restored_even_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), threads(before + 1) as n:
        assert n == before + 1 == torch.get_num_threads()
        raise RuntimeError
    assert torch.get_num_threads() == before


def test_latency_keeps_single_calls_and_their_tail():
    slow = iter([False] * 12 + [True] + [False] * 1000)
    timing = latencies(lambda: time.sleep(0.03 if next(slow) else 0.0005), budget_s=0.0, min_calls=20)
    assert timing.n == 20 and timing.median < 10 < timing.percentile(1.0)


def test_host_overhead_is_per_call():
    assert host_overhead(lambda: time.sleep(0.001), calls=3, rounds=3).median == pytest.approx(1.2, abs=0.8)


@pytest.mark.gpu
def test_gpu_time_of_a_copy_is_within_what_memory_can_do():
    a = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    timing = time_gpu(lambda: b.copy_(a))
    assert 2 * a.numel() / timing.median / 1e9 < 20  # TB/s
