"""The clock tells slow from fast, takes turns fairly, and pairs its samples."""

import pytest
import torch

from fastres.bench import timing as timing_module
from fastres.bench.timing import (
    Timing,
    host_overhead,
    latencies,
    quantile,
    ratio,
    threads,
    time_gpu,
    time_gpu_interleaved,
    time_interleaved,
)


@pytest.fixture
def work(monkeypatch):
    """`work(ms)` makes a call that takes so long by the module's clock, whatever else the machine does."""
    now = [0.0]
    monkeypatch.setattr(timing_module.time, "perf_counter", lambda: now[0])

    def work(ms, then=lambda: None):
        def call():
            now[0] += (ms() if callable(ms) else ms) / 1e3
            then()

        return call

    return work


def test_twice_the_work_takes_twice_the_time(work):
    timings = time_interleaved({"one": work(4.0), "two": work(8.0)}, rounds=7, warmup_s=0.01)
    assert timings["one"].n == timings["two"].n == 7
    assert timings["one"].median == pytest.approx(4.0)
    assert ratio(timings["two"], timings["one"]).median == pytest.approx(2.0)


def test_every_round_calls_everyone_and_the_order_rotates(work):
    calls: list[str] = []
    competitors = {name: work(1.0, lambda name=name: calls.append(name)) for name in "abc"}
    time_interleaved(competitors, rounds=3, warmup_s=0.0)
    assert "".join(calls[-9:]) == "abcbcacab"


def test_short_calls_are_repeated_within_a_sample(work):
    calls = []
    timing = time_interleaved({"x": work(0.01, lambda: calls.append(1))}, rounds=2, warmup_s=0.0)["x"]
    assert len(calls) == 2 + 2 * 20 and timing.median == pytest.approx(0.01)


def test_warm_up_lasts_its_time_and_at_least_two_calls(work):
    calls = []
    time_interleaved({"x": work(10.0, lambda: calls.append(1))}, rounds=1, warmup_s=0.095)
    assert len(calls) == 10 + 1
    calls.clear()
    time_interleaved({"x": work(1000.0, lambda: calls.append(1))}, rounds=1, warmup_s=0.095)
    assert len(calls) == 2 + 1


def test_a_slow_first_call_does_not_use_up_the_budget(work):
    first = iter([5000.0])
    timing = time_interleaved({"x": work(lambda: next(first, 2.0))}, budget_s=0.1, warmup_s=0.0)["x"]
    assert timing.n == 50 and timing.median == pytest.approx(2.0)


def test_budget_bounds_the_rounds(work):
    fns = {"a": work(10.0), "b": work(40.0)}
    assert time_interleaved(fns, budget_s=0.51, warmup_s=0.0, min_rounds=3)["a"].n == 10
    assert time_interleaved(fns, budget_s=0.0, warmup_s=0.0, min_rounds=3)["a"].n == 3
    assert time_interleaved(fns, budget_s=1e9, warmup_s=0.0, max_rounds=6)["a"].n == 6


def test_no_round_begins_after_the_end_once_there_are_three(work):
    over = timing_module.time.monotonic() - 1
    assert time_interleaved({"x": work(1.0)}, rounds=9, warmup_s=0.0, until=over)["x"].n == 3
    assert time_interleaved({"x": work(1.0)}, rounds=9, warmup_s=0.0, until=over + 1e6)["x"].n == 9


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


def test_latency_keeps_single_calls_and_their_tail(work):
    slow = iter([False] * 12 + [True] + [False] * 1000)
    timing = latencies(work(lambda: 30.0 if next(slow) else 0.5), budget_s=0.0, min_calls=20)
    assert timing.n == 20 and timing.median == pytest.approx(0.5)
    assert timing.percentile(1.0) == pytest.approx(30.0)


def test_host_overhead_is_per_call(work):
    assert host_overhead(work(1.0), calls=3, rounds=3).median == pytest.approx(1.0)


def test_who_cannot_be_captured_is_named_and_the_others_are_timed(work, monkeypatch):
    """The graphs are imitated; no GPU is needed for who takes part, how often, and what is kept alive."""
    keeps, refused = [], {}

    def capture(group, *, keep):
        keeps.append((len(group), keep))
        return timing_module._in_turn([launch for launch in group if launch() is None])

    def bad():
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(timing_module, "capture", capture)
    monkeypatch.setattr(timing_module, "_cuda_sample", timing_module._cpu_sample)
    competitors = {"one": [work(0.5)], "bad": [bad], "five": [work(1.0)] * 5}
    timings = time_gpu_interleaved(competitors, rounds=3, on_refusal=refused.__setitem__)
    assert list(timings) == ["one", "five"] and "not permitted" in str(refused["bad"])
    assert timings["one"].median == pytest.approx(0.5) and timings["five"].median == pytest.approx(1.0)
    # at least 16 launches a graph, and no more results alive than there are buffers
    assert keeps == [(16, 1), (16, 1), (20, 5)]
    with pytest.raises(RuntimeError, match="not permitted"):
        time_gpu_interleaved(competitors, rounds=3)


@pytest.mark.gpu
def test_gpu_graph_keeps_only_the_latest_results():
    made = []

    def launch():
        out = torch.zeros(1 << 20, device="cuda")
        made.append(out.data_ptr())
        return out

    replay = timing_module.capture([launch] * 16, warmups=1, keep=2)
    assert len(replay.kept) == 2 and len(set(made[-16:])) <= 3
    replay()


@pytest.mark.gpu
def test_gpu_time_of_a_copy_is_within_what_memory_can_do():
    a = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    timing = time_gpu(lambda: b.copy_(a))
    assert 2 * a.numel() / timing.median / 1e9 < 20  # TB/s
