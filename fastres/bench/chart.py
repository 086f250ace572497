"""The chart of `fastres bench`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastres.bench.compare_models import BASELINE, PROVIDERS, Result
from fastres.plan.problem import dtype_name

# Okabe and Ito's palette: told apart with any colour vision.
COLOURS = {"eager NCHW": "#999999", "eager channels_last": "#56B4E9", "fastres": "#D55E00"}


def speed_chart(path: Path, results: Sequence[Result], title: str) -> Path:
    """Bars of images/s per dtype, batch and provider, p20 to p80 as whiskers; written to `path`."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the chart needs matplotlib: pip install 'fastres[bench]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = list(dict.fromkeys((r.dtype, r.batch) for r in results))
    figure, axes = plt.subplots(
        1, len(settings), figsize=(1.2 + 2.3 * len(settings), 4.4), squeeze=False, layout="constrained"
    )
    for axis, (dtype, batch) in zip(axes[0], settings, strict=True):
        rows = {r.provider: r for r in results if (r.dtype, r.batch) == (dtype, batch)}
        for at, name in enumerate(PROVIDERS):
            timing = rows[name].timing
            if timing is None:
                axis.text(
                    at, 0, " no time:\n wrong or failed", rotation=90, ha="center", va="bottom", fontsize=8
                )
                continue
            rate = rows[name].images_per_s
            low, high = batch / timing.p80 * 1e3, batch / timing.p20 * 1e3
            axis.bar(at, rate, 0.8, color=COLOURS[name], yerr=[[rate - low], [high - rate]], capsize=3)
            speedup = rows[name].speedup
            text = f"{rate:.3g}" if rate < 1000 else f"{rate:,.0f}"
            if speedup is not None and name != BASELINE:
                text += f"\n{speedup.median:.2f}x"
            axis.annotate(
                text, (at, high), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=9
            )
        axis.set_title(f"{dtype_name(dtype)}, batch {batch}", fontsize=10)
        axis.set_xticks(range(len(PROVIDERS)), [name.replace(" ", "\n") for name in PROVIDERS], fontsize=8)
        axis.set_xlim(-0.6, len(PROVIDERS) - 0.4)
        axis.margins(y=0.18)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("images/s (more is better)")
    figure.suptitle(f"{title}\nx: speed-up over {BASELINE}; whiskers: p20 to p80", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
