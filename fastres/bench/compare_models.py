"""One model, eager PyTorch against fastres: the measurement behind `fastres bench`."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastres.bench.timing import Timing, latencies, ratio, time_interleaved
from fastres.bench.verify import Errors, allowed, errors, oracle

PROVIDERS = ("eager NCHW", "eager channels_last", "fastres")
BASELINE = "eager channels_last"


@dataclass
class Result:
    """One provider in one setting; times in milliseconds, None where `failure` says why there are none."""

    provider: str
    dtype: torch.dtype
    batch: int
    failure: str = ""
    errors: Errors | None = None
    timing: Timing | None = None
    latency: Timing | None = None
    speedup: Timing | None = None
    first_call_s: float | None = None

    @property
    def images_per_s(self) -> float | None:
        return None if self.timing is None else self.batch / self.timing.median * 1e3


def compare(
    model: nn.Module,
    images: Tensor,
    *,
    dtype: torch.dtype,
    backend: str = "auto",
    budget_s: float = 10.0,
    on_step: Callable[[str], None] = lambda step: None,
) -> list[Result]:
    """Verify, then time, `PROVIDERS` on `images`.

    Args:
        model: eval mode, parameters in fp32, on the device to measure on; it is not changed.
        images: fp32 [N, 3, H, W] on the same device.
        dtype: what everybody computes in; eager gets a converted model, fastres the fp32 one.
        budget_s: seconds for the timed rounds of all providers together.
        on_step: called with what happens next.
    """
    device = images.device
    x = images.to(dtype)
    results = {name: Result(name, dtype, x.shape[0]) for name in PROVIDERS}
    on_step("fp64 oracle")
    reference = oracle(model, x)
    calls: dict[str, Callable[[], object]] = {}
    limit = None
    with torch.inference_mode():
        for name, make in _makers(model, x, backend):
            on_step(f"verify {name}")
            result = results[name]
            try:
                start = time.perf_counter()
                call = make()
                out = call()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                result.first_call_s = time.perf_counter() - start
                # The second call too: a plan may capture a graph there.
                result.errors = max((errors(y, reference) for y in (out, call())), key=lambda e: e.relative)
            except Exception as error:
                result.failure = f"{type(error).__name__}: {error}"
                continue
            if limit is None:
                limit = allowed(result.errors, dtype)
            if not result.errors.relative <= limit:
                result.failure = f"wrong: error {result.errors.relative:.1e}, allowed {limit:.1e}"
                continue
            calls[name] = call
        on_step("time")
        timings = time_interleaved(
            calls, budget_s=budget_s * 0.7, warmup_s=budget_s * 0.04, min_rounds=7, device=device
        )
        for name, call in calls.items():
            on_step(f"latency {name}")
            results[name].timing = timings[name]
            results[name].latency = latencies(call, budget_s=budget_s * 0.06, min_calls=10, device=device)
            if BASELINE in timings:
                results[name].speedup = ratio(timings[BASELINE], timings[name])
    return list(results.values())


def _makers(
    model: nn.Module, x: Tensor, backend: str
) -> Iterator[tuple[str, Callable[[], Callable[[], object]]]]:
    last = x.contiguous(memory_format=torch.channels_last)

    def eager(memory_format: torch.memory_format) -> Callable[[], object]:
        own = copy.deepcopy(model).to(dtype=x.dtype, memory_format=memory_format)
        given = x.contiguous() if memory_format == torch.contiguous_format else last
        return lambda: own(given)

    def ours() -> Callable[[], object]:
        from fastres import accelerate

        plan = accelerate(model, dtype=x.dtype, backend=backend)
        return lambda: plan(last)

    yield "eager NCHW", lambda: eager(torch.contiguous_format)
    yield "eager channels_last", lambda: eager(torch.channels_last)
    yield "fastres", ours
