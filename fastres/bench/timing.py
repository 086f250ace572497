"""Timing: time-based warm-up, competitors interleaved round by round, median, p20, p80, paired ratios.

Two clocks. `time_interleaved` times whole calls as a user makes them, host time included, on CPU
(`perf_counter`) or CUDA (events around back-to-back calls). `time_gpu` times kernels alone: the launches are
captured into one CUDA graph, each on its own buffers, so that the host costs nothing and, with enough
buffers, no input sits in the L2.
"""

from __future__ import annotations

import gc
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

# A CUDA sample spans at least this many milliseconds, so that the gap between an event and the first kernel
# (5 to 10 us) is below 1 % of it.
_GPU_SAMPLE_MS = 2.0
# perf_counter itself takes about 50 ns; a CPU sample spans at least this many milliseconds.
_CPU_SAMPLE_MS = 0.2
_MAX_REPEATS = 1000


@dataclass(frozen=True)
class Timing:
    """Times of one call in milliseconds: median, 20th and 80th percentile, number of samples.

    `samples` holds them in the order of the rounds; samples of competitors at one index were taken in
    the same round.
    """

    median: float
    p20: float
    p80: float
    n: int
    samples: tuple[float, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        if not samples:
            raise ValueError("samples: got none, takes at least one")
        return cls(*(quantile(samples, q) for q in (0.5, 0.2, 0.8)), len(samples), tuple(samples))

    def percentile(self, q: float) -> float:
        """The `q` quantile (0 to 1) of the samples, in milliseconds."""
        return quantile(self.samples, q)

    def __str__(self) -> str:
        return f"{self.median:.4g} ms ({self.p20:.4g} to {self.p80:.4g}, n={self.n})"


def quantile(samples: Sequence[float], q: float) -> float:
    """Linearly interpolated quantile, as numpy's default."""
    ordered = sorted(samples)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def ratio(a: Timing, b: Timing) -> Timing:
    """a / b, unitless: computed pair by pair where both were sampled in the same rounds, so that clock drift
    cancels; from the medians (p20 / p80 and p80 / p20 as the spread) where they were not."""
    if len(a.samples) == len(b.samples) and a.samples:
        return Timing.of([x / y for x, y in zip(a.samples, b.samples, strict=True)])
    return Timing(a.median / b.median, a.p20 / b.p80, a.p80 / b.p20, min(a.n, b.n))


@contextmanager
def threads(n: int | None) -> Iterator[int]:
    """PyTorch's thread count fixed at `n` (None: as it is) inside the block."""
    before = torch.get_num_threads()
    if n is not None:
        torch.set_num_threads(n)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_gc() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def time_interleaved(
    fns: Mapping[str, Callable[[], object]],
    *,
    rounds: int | None = None,
    budget_s: float = 2.0,
    warmup_s: float = 0.3,
    min_rounds: int = 5,
    max_rounds: int = 200,
    until: float | None = None,
    device: torch.device | str = "cpu",
    on_round: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """Time whole calls of competitors, one sample of each in every round.

    Args:
        fns: name → callable without arguments.
        rounds: number of rounds; None: as many as fit into `budget_s`, within [min_rounds, max_rounds].
        budget_s: seconds for the measured rounds of all competitors together.
        warmup_s: each competitor is called at least twice, and for this many seconds, before the first round.
        until: `time.monotonic()` after which no round is begun, once there are three.
        device: "cpu", or a CUDA device whose work is timed with events, the host's waiting included.
        on_round: called with (done, total) after each round.

    Samples are means over as many back-to-back calls as make a sample long enough for the clock. The order
    within a round rotates, so that nobody always runs after the same neighbour.
    """
    if not fns:
        return {}
    cuda = torch.device(device).type == "cuda"
    sample = _cuda_sample if cuda else _cpu_sample
    least_ms = _GPU_SAMPLE_MS if cuda else _CPU_SAMPLE_MS
    repeats, round_s = {}, 0.0
    for name, fn in fns.items():
        one_ms = _warm_up(fn, sample, warmup_s)
        repeats[name] = max(1, min(_MAX_REPEATS, math.ceil(least_ms / max(one_ms, 1e-6))))
        round_s += repeats[name] * one_ms / 1e3
    if rounds is None:
        rounds = max(min_rounds, min(max_rounds, int(budget_s / max(round_s, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in fns}
    order = list(fns)
    with _no_gc():
        for i in range(rounds):
            if until is not None and i >= 3 and time.monotonic() > until:
                break
            for name in order:
                samples[name].append(sample(fns[name], repeats[name]))
            order.append(order.pop(0))
            if on_round is not None:
                on_round(i + 1, rounds)
    return {name: Timing.of(taken) for name, taken in samples.items()}


def _warm_up(fn: Callable[[], object], sample: Callable[..., float], warmup_s: float) -> float:
    """Call `fn` for `warmup_s` seconds; the milliseconds of a call, from the later half of the calls."""
    start, times = time.perf_counter(), []
    while True:
        times.append(sample(fn, 1))
        if len(times) > 1 and time.perf_counter() - start >= warmup_s:
            return quantile(times[len(times) // 2 :], 0.5)


def _cpu_sample(fn: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        fn()
    return (time.perf_counter() - start) * 1e3 / repeats


def _cuda_sample(fn: Callable[[], object], repeats: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        fn()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


def latencies(
    fn: Callable[[], object],
    *,
    budget_s: float = 1.0,
    min_calls: int = 10,
    max_calls: int = 2000,
    device: torch.device | str = "cpu",
) -> Timing:
    """Wall-clock latency of single calls, each waited for; `.percentile(0.99)` is the p99."""
    cuda = torch.device(device).type == "cuda"
    wait = torch.cuda.synchronize if cuda else (lambda: None)
    fn()
    wait()
    samples: list[float] = []
    until = time.perf_counter() + budget_s
    with _no_gc():
        while len(samples) < max_calls and (len(samples) < min_calls or time.perf_counter() < until):
            start = time.perf_counter()
            fn()
            wait()
            samples.append((time.perf_counter() - start) * 1e3)
    return Timing.of(samples)


def host_overhead(
    fn: Callable[[], object], *, calls: int = 50, rounds: int = 20, device: torch.device | str = "cpu"
) -> Timing:
    """Milliseconds until a call returns to the host. On CUDA nothing is waited for within the `calls` of a
    round."""
    cuda = torch.device(device).type == "cuda"
    wait = torch.cuda.synchronize if cuda else (lambda: None)
    for _ in range(3):
        fn()
    samples = []
    with _no_gc():
        for _ in range(rounds):
            wait()
            samples.append(_cpu_sample(fn, calls))
    wait()
    return Timing.of(samples)


def rotation(nbytes: int, device: torch.device | str = "cuda", *, most: int = 64) -> int:
    """How many copies of a working set of `nbytes` to rotate through, so that a copy's data have left the
    cache before its turn comes again: three L2s' worth on CUDA (at least 2, at most `most`), 1 on CPU."""
    device = torch.device(device)
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(most, math.ceil(3 * cache / max(nbytes, 1))))


def time_gpu(
    launches: Callable[[], object] | Sequence[Callable[[], object]],
    *,
    rounds: int | None = None,
    budget_s: float = 0.1,
    warmup_s: float = 0.02,
    graph: bool = True,
) -> Timing:
    """Milliseconds of one launch on the current CUDA device, host time excluded where `graph` is true.

    Args:
        launches: one launch, or several that do the same on different buffers (see `rotation`).
        rounds, budget_s, warmup_s: as in `time_interleaved`.
        graph: capture the launches into a CUDA graph and replay it; False for what cannot be captured.

    Raises whatever a launch raises.
    """
    return time_gpu_interleaved(
        {"": launches}, rounds=rounds, budget_s=budget_s, warmup_s=warmup_s, graph=graph
    )[""]


def time_gpu_interleaved(
    launches: Mapping[str, Callable[[], object] | Sequence[Callable[[], object]]],
    *,
    rounds: int | None = None,
    budget_s: float = 0.3,
    warmup_s: float = 0.02,
    graph: bool | Mapping[str, bool] = True,
    on_refusal: Callable[[str, Exception], None] | None = None,
) -> dict[str, Timing]:
    """`time_gpu` of competitors, one sample of each in every round. `graph` may be given per name.

    Args:
        on_refusal: called with the name and the error of a competitor that cannot be captured, which then
            takes no part; None: the error is raised.
    """
    calls, counts = {}, {}
    for name, given in launches.items():
        group = [given] if callable(given) else list(given)
        if not group:
            raise ValueError(f"launches: {name!r} has none")
        buffers = len(group)
        # Short groups are repeated inside the graph: a replay of a single 5 us kernel would time the replay.
        group = group * max(1, math.ceil(16 / buffers))
        captured = graph if isinstance(graph, bool) else graph.get(name, True)
        try:
            calls[name] = capture(group, keep=buffers) if captured else _in_turn(group)
        except Exception as error:
            if on_refusal is None:
                raise
            on_refusal(name, error)
            continue
        counts[name] = len(group)
    timings = time_interleaved(
        calls, rounds=rounds, budget_s=budget_s, warmup_s=warmup_s, min_rounds=7, device="cuda"
    )
    return {
        name: Timing.of([sample / counts[name] for sample in timing.samples])
        for name, timing in timings.items()
    }


def _in_turn(group: Sequence[Callable[[], object]]) -> Callable[[], None]:
    def call() -> None:
        for launch in group:
            launch()

    return call


def capture(
    group: Sequence[Callable[[], object]], *, warmups: int = 2, keep: int | None = None
) -> Callable[[], None]:
    """A CUDA graph of the calls, one after the other, as a callable that replays it.

    Args:
        keep: so many of the latest results are alive at once, in `.kept` (None: all). Later calls write where
            earlier ones did: sixteen results of a large layer, times every competitor, would not fit.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmups):
            for launch in dict.fromkeys(group):
                launch()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    kept: deque[object] = deque(maxlen=keep)
    with torch.cuda.graph(captured):
        for launch in group:
            kept.append(launch())

    def replay() -> None:
        captured.replay()

    replay.kept = kept
    return replay
