"""Charts are drawn for whatever rows there are; README's section comes from files alone."""

import dataclasses

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("torchvision")

from benchmarks import readme, results, shapes
from benchmarks.cli import RESULTS
from benchmarks.plot import layer_stack, plot
from benchmarks.results import Results, Row
from fastres.bench.environment import environment

SIZE = 64


def network_row(provider, batch, ms, **changes):
    row = Row("model", "resnet18", f"n{batch} resnet18", "resnet18", 1, batch, "fp32", provider)
    row.median_ms, row.p20_ms, row.p80_ms, row.rounds = ms, 0.9 * ms, 1.2 * ms, 9
    row.latency_p50_ms, row.latency_p99_ms, row.images_s = ms, 1.5 * ms, batch / ms * 1e3
    row.speedup, row.speedup_p20, row.speedup_p80 = 10 / ms, 9 / ms, 11 / ms
    return dataclasses.replace(row, **changes)


def layer_rows(provider, factor):
    rows = []
    for network, layer in shapes.distinct_convs(["resnet18"], SIZE):
        problem = layer.problem(2, torch.float32)
        row = Row("layer", layer.name, problem.key, network, layer.count, 2, "fp32", provider)
        row.bytes, row.flops, row.floor_ms = problem.bytes, problem.flops, problem.flops / 1e9
        row.median_ms = row.floor_ms * factor
        row.tflop_s, row.copy_gb_s, row.matmul_tflop_s = problem.flops / row.median_ms / 1e9, 20.0, 1.0
        rows.append(row)
    return rows


@pytest.fixture
def file(tmp_path):
    rows = [
        network_row(p, n, ms * n) for n in (1, 8) for p, ms in (("eager channels_last", 10), ("fastres", 5))
    ]
    rows += layer_rows("eager channels_last", 3.0) + layer_rows("fastres", 2.0)
    rows.append(network_row("wrong one", 1, 1.0, status="wrong", speedup=None, latency_p50_ms=None))
    path = tmp_path / "results" / "machine-2030-01-01.csv"
    results.write(path, rows, environment("cpu"))
    return path


def test_all_four_charts_are_drawn_and_opened(file, tmp_path):
    written = plot(results.read(file), tmp_path, ("png", "svg"))
    assert sorted({path.stem.rsplit("-", 1)[1] for path in written}) == [
        "latency",
        "layers",
        "roofline",
        "speedup",
    ]
    for path in written:
        head = path.read_bytes()[:5]
        assert head == (b"\x89PNG\r" if path.suffix == ".png" else b"<?xml") and path.stat().st_size > 9000


def test_a_layer_stack_counts_every_layer_of_the_network(file):
    figure = layer_stack(results.read(file))
    floor = sum(
        layer.problem(2, torch.float32).flops / 1e9
        for layer in shapes.layers("resnet18", SIZE)
        if layer.pattern == "conv_bn_act"
    )
    heights = {}
    for bar in figure.axes[0].patches:
        at = round(bar.get_x() + bar.get_width() / 2)
        heights[at] = heights.get(at, 0.0) + bar.get_height()
    assert heights[0] == pytest.approx(floor, rel=1e-4)
    assert heights[1] == pytest.approx(3 * floor, rel=1e-4) and heights[2] == pytest.approx(
        2 * floor, rel=1e-4
    )


def test_no_rows_no_charts(tmp_path):
    assert plot(Results([], {}), tmp_path) == []


def test_readme_is_written_between_the_markers_and_then_up_to_date(file, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"above\n{readme.BEGIN}\nold\n{readme.END}\nbelow\n")
    assert readme.update(path, file.parent, write=False) and "old" in path.read_text()
    assert readme.update(path, file.parent)
    text = path.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and "old" not in text
    assert "| **fastres** | **200** (2.00x) | **200** (0.25x) |" in text
    assert "| eager channels_last | 100 | 100 |" in text
    assert "(results/machine-2030-01-01.csv)" in text and "wrong one" not in text
    chart = text.split("](")[-1].split(")")[0]
    assert (tmp_path / chart).is_file()
    assert not readme.update(path, file.parent)


def test_readme_shows_every_device_and_keeps_recordings_apart(file, tmp_path):
    folder, here = file.parent, environment("cpu")
    gpu = dataclasses.replace(
        here, device="A GPU", threads="", driver="1.2", cudnn="9", date="2029-01-01T00:00Z"
    )
    row = network_row("fastres", 8, 2.0)
    results.write(folder / "gpu-2029-01-01.csv", [row, network_row("fastres cudnn", 8, 4.0)], gpu)
    # measured again for comparison, and an older run of the same GPU: neither is shown
    again = dataclasses.replace(gpu, date="2029-02-01T00:00Z")
    results.write(folder / "gpu-2029-02-01-peers.csv", [network_row("eager NCHW", 8, 7.0)], again)
    old = dataclasses.replace(gpu, date="2028-12-01T00:00Z")
    results.write(folder / "gpu-2028-12-01.csv", [network_row("fastres", 8, 3.0)], old)
    results.write(folder / "recorded" / "peers.csv", [network_row("eager NCHW", 8, 5.0)], gpu)
    text = readme.section(folder, tmp_path)
    measured, recorded = text.split("**Recorded")
    assert [line.split("**")[1] for line in measured.splitlines() if line.startswith("**")] == [
        "A GPU",
        here.device,
    ]
    assert "| **fastres** | 4,000 (5.00x) |" in measured and "fastres cudnn" not in measured
    assert "eager NCHW" not in measured and "| eager NCHW | 1,600 (2.00x) |" in recorded
    assert "fastres is not among these rows" in recorded and "driver 1.2" in measured


def test_the_readme_here_is_what_the_results_here_make():
    assert not readme.update(RESULTS.parents[1] / "README.md", RESULTS, write=False)


def test_readme_without_markers_is_refused(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("nothing")
    with pytest.raises(ValueError, match="markers"):
        readme.update(path, tmp_path)
