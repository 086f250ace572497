"""Charts of a results file: `python -m benchmarks.plot FILE.csv [--out DIR] [--format png]`.

Speed-up bars per provider and batch, the latency curve, each layer's time against its floor (stacked: where a
network's time goes), and a roofline scatter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks import results
from benchmarks.providers import BASELINE
from benchmarks.results import Results, Row
from benchmarks.shapes import layers
from fastres.bench.roofline import Roofline
from fastres.bench.table import figure as short
from fastres.plan.problem import ConvSpec, dtype_from_name

# Okabe and Ito's colours, told apart with any colour vision; fastres is always vermilion.
_PEERS = ("#999999", "#56B4E9", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#000000", "#F0E442")
_OURS = ("#D55E00", "#FFC9A3", "#F2A978", "#B34700", "#E8833A", "#8C3800", "#FF8C66", "#C44536", "#5C2A0D")
_MARKERS = "osDv^<>Px*"


def plot(run: Results, out: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Draw every chart that the rows of `run` suffice for; the files written, named after its file."""
    out.mkdir(parents=True, exist_ok=True)
    stem = run.path.stem if run.path else "results"
    charts: dict[str, Callable[[Results], Figure | None]] = {
        "speedup": speedups,
        "latency": latency,
        "layers": layer_stack,
        "roofline": roofline,
    }
    written = []
    for name, draw in charts.items():
        figure = draw(run)
        if figure is None:
            continue
        written += [save(figure, out / f"{stem}-{name}.{kind}") for kind in formats]
    return written


def save(figure: Figure, path: Path) -> Path:
    """Write a chart; an SVG of the same rows is the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Text as text: a tenth of the size that its outlines take.
    with plt.rc_context({"svg.hashsalt": "fastres", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return path


def machine(run: Results) -> str:
    """Two lines: device and threads; torch, date, commit."""
    env = run.environment
    threads = f", {env['threads']} thread{'s' * (env['threads'] != '1')}" if env["threads"] else ""
    return (
        f"{env['device']}{threads}\n"
        f"torch {env['torch']}, {env['date'][:10]}, commit {env['commit'] or 'unknown'}"
    )


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for every provider, the same whatever the others are."""
    from benchmarks.providers import providers

    known = list(dict.fromkeys([p.name for p in providers()] + list(names)))
    ours = [name for name in known if name.startswith("fastres")]
    peers = [name for name in known if name not in ours]
    found = {name: _PEERS[i % len(_PEERS)] for i, name in enumerate(peers)}
    return found | {name: _OURS[i % len(_OURS)] for i, name in enumerate(ours)}


def speedups(run: Results) -> Figure | None:
    """Bars of the speed-up over eager channels_last: a line of panels for each network, a panel for each dtype
    and batch; providers in the order of the rows."""
    rows = [r for r in run.rows if r.level in ("model", "training") and r.speedup is not None]
    if not rows:
        return None
    colour = colours([r.provider for r in rows])
    lines = {
        name: list(dict.fromkeys(r.provider for r in rows if r.name == name))
        for name in dict.fromkeys(r.name for r in rows)
    }
    settings = {
        name: sorted({(r.dtype, r.batch) for r in rows if r.name == name}, key=lambda s: (s[0] != "fp32", s))
        for name in lines
    }
    columns = max(len(found) for found in settings.values())
    heights = [0.9 + 0.24 * len(names) for names in lines.values()]
    figure, axes = plt.subplots(
        len(lines),
        columns,
        figsize=(2.2 + 1.9 * columns, 0.9 + sum(heights)),
        squeeze=False,
        sharey="row",
        layout="constrained",
        height_ratios=heights,
    )
    for line, (network, names) in zip(axes, lines.items(), strict=True):
        most = max(r.speedup_p80 for r in rows if r.name == network)
        for axis in line[len(settings[network]) :]:
            axis.set_visible(False)
        for axis, (dtype, batch) in zip(line, settings[network], strict=False):
            group = [r for r in rows if (r.name, r.dtype, r.batch) == (network, dtype, batch)]
            for r in group:
                at = names.index(r.provider)
                error = [[max(0, r.speedup - r.speedup_p20)], [max(0, r.speedup_p80 - r.speedup)]]
                axis.barh(at, r.speedup, 0.75, color=colour[r.provider], xerr=error, capsize=2)
                axis.annotate(
                    f"{r.speedup:.2f}x",
                    (max(r.speedup, r.speedup_p80), at),
                    xytext=(3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=9,
                )
            axis.axvline(1, color="black", linewidth=0.8)
            axis.set_xlim(0, 1.35 * most)
            axis.set_title(f"{network.removesuffix(' step')}\n{dtype}, batch {batch}", fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
        line[0].set_ylim(len(names) - 0.4, -0.6)
        line[0].set_yticks(range(len(names)), names, fontsize=9)
        if network.endswith(" step"):
            line[0].set_ylabel("training step", fontsize=9)
    figure.supxlabel(
        f"speed-up over {BASELINE} (more is better)\nwhiskers: p20 to p80 of paired rounds", fontsize=10
    )
    figure.suptitle(machine(run), fontsize=10)
    return figure


def latency(run: Results) -> Figure | None:
    """Median latency of single calls against the batch size, p99 as the upper whisker."""
    rows = [r for r in run.rows if r.level == "model" and r.latency_p50_ms is not None]
    panels = list(dict.fromkeys((r.name, r.dtype) for r in rows))
    if not panels:
        return None
    colour = colours([r.provider for r in rows])
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.6 + 4.0 * len(panels), 4.4), squeeze=False, layout="constrained"
    )
    names = list(dict.fromkeys(r.provider for r in rows))
    for axis, panel in zip(axes[0], panels, strict=True):
        for i, name in enumerate(names):
            line = sorted(
                (r for r in rows if (r.name, r.dtype) == panel and r.provider == name),
                key=lambda r: r.batch,
            )
            if not line:
                continue
            low = [r.latency_p50_ms for r in line]
            up = [max(0, r.latency_p99_ms - r.latency_p50_ms) for r in line]
            axis.errorbar(
                [r.batch for r in line],
                low,
                yerr=[[0] * len(line), up],
                label=name,
                color=colour[name],
                marker=_MARKERS[i % len(_MARKERS)],
                markersize=5,
                capsize=2,
                linewidth=1.2,
            )
        batches = sorted({r.batch for r in rows if (r.name, r.dtype) == panel})
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(batches, [str(b) for b in batches])
        axis.minorticks_off()
        _plain_ticks(axis)
        axis.set_title(f"{panel[0]}, {panel[1]}", fontsize=10)
        axis.set_xlabel("batch size")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("latency of one call, ms (less is better)")
    handles = {
        label: handle
        for axis in axes[0]
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8)
    figure.suptitle(f"{machine(run)}\nmedian; whisker up to p99", fontsize=10)
    return figure


def layer_stack(run: Results) -> Figure | None:
    """Where a network's time goes: the convolutions' times stacked, layer by layer, beside their floors."""
    found = _stacks(run)
    if found is None:
        return None
    network, dtype, batch, names, stacks = found
    figure, axis = plt.subplots(figsize=(4.2 + 1.5 * len(stacks), 7.2), layout="constrained")
    shades = plt.get_cmap("tab20")
    total = max(sum(times) for times in stacks.values())
    for at, times in enumerate(stacks.values()):
        bottom = 0.0
        for i, ms in enumerate(times):
            axis.bar(at, ms, 0.8, bottom=bottom, color=shades(i % 20), edgecolor="white", linewidth=0.4)
            if ms > 0.028 * total:
                axis.text(at, bottom + ms / 2, names[i], ha="center", va="center", fontsize=6)
            bottom += ms
        axis.text(at, bottom, f"{short(bottom)} ms", ha="center", va="bottom", fontsize=9)
    axis.set_xticks(range(len(stacks)), [name.replace(" ", "\n") for name in stacks], fontsize=8)
    axis.set_ylabel("time of all convolution layers, ms (less is better)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(
        f"{network}, {dtype}, batch {batch}: every convolution with BN, add and ReLU,\n"
        f"equal layers together (n x first layer's name), stem at the bottom\n{machine(run)}",
        fontsize=9,
    )
    return figure


def _stacks(
    run: Results,
) -> tuple[str, str, int, list[str], dict[str, list[float]]] | None:
    """Network, dtype, batch, layer names and provider → times in the network's order, of the setting with the
    most complete providers; "floor" comes first."""
    timed = [r for r in run.rows if r.level == "layer" and r.status == "ok"]
    best = None
    for network, dtype, batch in dict.fromkeys((r.model, r.dtype, r.batch) for r in timed):
        size = _image_size(timed, network)
        convs: dict[str, tuple[str, int]] = {}
        for layer in layers(network, size):
            if isinstance(layer.spec, ConvSpec):
                key = layer.problem(batch, dtype_from_name(dtype)).key
                name, count = convs.get(key, (layer.name, 0))
                convs[key] = (name, count + 1)
        by_provider: dict[str, dict[str, Row]] = {}
        for r in timed:
            if (r.dtype, r.batch) == (dtype, batch):
                by_provider.setdefault(r.provider, {})[r.problem] = r
        complete = {name: rows for name, rows in by_provider.items() if all(key in rows for key in convs)}
        if not complete or (best is not None and len(complete) < len(best[4]) - 1):
            continue
        first = next(iter(complete.values()))
        stacks = {"floor": [first[key].floor_ms * count for key, (_, count) in convs.items()]}
        for name, rows in complete.items():
            stacks[name] = [rows[key].median_ms * count for key, (_, count) in convs.items()]
        names = [name if count == 1 else f"{count}x {name}" for name, count in convs.values()]
        if best is None or len(stacks) > len(best[4]) or network == "resnet50":
            best = (network, dtype, batch, names, stacks)
    return best


def _image_size(rows: Sequence[Row], network: str) -> int:
    """Of the images that the layer rows are for: the first layer's problem says "@224x224"."""
    sizes = [int(r.problem.rsplit("@", 1)[1].split("x")[0]) for r in rows if "@" in r.problem]
    return max(sizes)


def roofline(run: Results) -> Figure | None:
    """Arithmetic rate against arithmetic intensity of layers and fused patterns, under the measured roof."""
    rows = [
        r for r in run.rows if r.level in ("layer", "fused") and r.tflop_s and r.bytes and r.matmul_tflop_s
    ]
    dtypes = list(dict.fromkeys(r.dtype for r in rows))
    if not dtypes:
        return None
    colour = colours([r.provider for r in rows])
    figure, axes = plt.subplots(
        1, len(dtypes), figsize=(2.6 + 5.2 * len(dtypes), 5), squeeze=False, layout="constrained"
    )
    names = list(dict.fromkeys(r.provider for r in rows))
    # one unit for all panels: what the slowest of them calls for
    unit, scale = ("TFLOP/s", 1e12) if min(r.matmul_tflop_s for r in rows) > 10 else ("GFLOP/s", 1e9)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        group = [r for r in rows if r.dtype == dtype]
        roof = Roofline(group[0].copy_gb_s * 1e9, group[0].matmul_tflop_s * 1e12)
        intensities = [r.flops / r.bytes for r in group]
        low, high = 0.6 * min(intensities), 1.6 * max(*intensities, roof.ridge)
        line = [low, roof.ridge, high]
        axis.plot(
            line,
            [min(x * roof.copy, roof.matmul) / scale for x in line],
            color="black",
            linewidth=1.2,
            label="measured roof",
        )
        axis.text(
            high,
            roof.matmul / scale,
            f"matmul {short(roof.matmul / scale)} {unit} ",
            ha="right",
            va="bottom",
            fontsize=8,
        )
        axis.text(
            low,
            low * roof.copy / scale,
            f"  copy {short(roof.copy / 1e9)} GB/s",
            ha="left",
            va="top",
            fontsize=8,
        )
        for i, name in enumerate(names):
            points = [r for r in group if r.provider == name]
            axis.scatter(
                [r.flops / r.bytes for r in points],
                [r.tflop_s * 1e12 / scale for r in points],
                s=26,
                color=colour[name],
                marker=_MARKERS[i % len(_MARKERS)],
                label=name,
                alpha=0.75,
                linewidths=0,
            )
        axis.set_xscale("log")
        axis.set_yscale("log")
        _plain_ticks(axis)
        axis.set_xlabel("arithmetic intensity, FLOP per byte that must move")
        axis.set_title(f"{dtype}: layers and fused patterns", fontsize=10)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(f"{unit} (more is better)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    figure.suptitle(machine(run), fontsize=10)
    return figure


def _plain_ticks(axis: Axes) -> None:
    """Numbers instead of powers of ten, at 1, 2 and 5 of every decade."""
    for one in (axis.xaxis, axis.yaxis):
        if one.get_scale() == "log" and one.get_major_locator().__class__ is LogLocator:
            one.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
            one.set_minor_formatter(NullFormatter())


def main(
    file: Annotated[Path, typer.Argument(help="A results file.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the charts. Default: the file's.")] = None,
    kinds: Annotated[str, typer.Option("--format", help="png, svg, or both: png,svg.")] = "png",
) -> None:
    """Draw the charts of a results file."""
    try:
        run = results.read(file)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    for path in plot(run, out or file.parent, kinds.split(",")):
        print(f"wrote {path}")


if __name__ == "__main__":
    typer.run(main)
