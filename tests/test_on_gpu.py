"""The whole path on a GPU: plans, CUDA graphs, streams, staleness while a graph replays, training, drop-in blocks.

Kernels have their own tests (tests/kernels). Here the network is small where the mechanism is asked for, and real where
the numbers are.
"""

import copy
import threading
import warnings

import pytest
import torch
import torchvision
from oracle import assert_close_to_oracle
from torch import nn

import fastres
from fastres.bench.calibrate import calibrate_bn
from fastres.bench.photographs import photographs, photographs_uint8

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# cuDNN alone: nothing but PyTorch's own calls is compiled or can be at fault for the mechanism.
MECHANISM = dict(backend="cudnn")


@pytest.fixture(scope="module")
def trained():
    """A ResNet-50 in fp32 on the GPU, with BN statistics of photographs; four photographs."""
    torch.manual_seed(0)
    model = calibrate_bn(torchvision.models.resnet50(), photographs(8, size=96)).eval()
    return model.cuda(), photographs(4, size=224, seed=3).cuda()


def small(dtype=FP16) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
    )
    return model.eval().cuda().to(dtype)


def images(n=2, dtype=FP16, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 8, 12, 12, generator=generator).cuda().to(dtype)


def alike(out, expected) -> None:
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


def contexts(fast) -> list:
    return [c for idle in fast._fastres.engine._idle.values() for c in idle]


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "cudnn", "triton", "hopper", "cuda"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_a_resnet50_stays_within_the_bound_through_every_family(backend, dtype, trained):
    model, x = trained
    fast = fastres.accelerate(model, dtype=dtype, backend=backend)
    if backend == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no Hopper")
    wide, rounded = copy.deepcopy(model).double(), x.to(dtype)
    narrow = copy.deepcopy(model).to(dtype).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        ref = wide(rounded.double())
        own = narrow(rounded.contiguous(memory_format=torch.channels_last))
        first, second, third = (fast(x).clone() for _ in range(3))
    assert_close_to_oracle(first, ref, own, what=f"{backend} {dtype}")
    # The second call captured a CUDA graph, the third replays it.
    assert torch.equal(first, second) and torch.equal(second, third)
    assert any(c.graph is not None for c in contexts(fast)), fast.report(measure=False).notes
    dropped = fast._fastres.engine.dropped
    assert not dropped, {name: why for (name, _), why in dropped.items()}


@pytest.mark.parametrize("tf32", [False, True])
def test_fp32_follows_pytorchs_flag(tf32, trained, monkeypatch):
    model, x = trained
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    fast = fastres.accelerate(model)
    with torch.inference_mode():
        ref, own, out = copy.deepcopy(model).double()(x.double()), model(x), fast(x)
    assert_close_to_oracle(out, ref, own, what=f"tf32 {tf32}")


def test_uint8_images_are_normalised_in_the_plan(trained):
    model, _ = trained
    raw = photographs_uint8(2, size=224).cuda()
    fast = fastres.accelerate(model, dtype=BF16, normalize=(MEAN, STD))
    mean, std = (torch.tensor(v, device="cuda", dtype=torch.float64)[:, None, None] for v in (MEAN, STD))
    with torch.inference_mode():
        x = (raw.double() / 255 - mean) / std
        ref = copy.deepcopy(model).double()(x)
        own = (
            copy.deepcopy(model)
            .to(BF16)
            .to(memory_format=torch.channels_last)(x.to(BF16).contiguous(memory_format=torch.channels_last))
        )
        assert_close_to_oracle(fast(raw), ref, own, what="uint8")


@pytest.mark.parametrize("backend", ["cudnn", "reference"])
def test_uint8_images_are_normalised_in_a_cuda_graph_by_pytorchs_own_calls_too(backend):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval().cuda()
    raw = photographs_uint8(2, size=32).cuda()
    fast = fastres.accelerate(model, dtype=FP32, normalize=(MEAN, STD), backend=backend)
    mean, std = (torch.tensor(v, device="cuda")[:, None, None] for v in (MEAN, STD))
    with torch.inference_mode():
        expected = model((raw.float() / 255 - mean) / std)
        for _ in range(3):
            alike(fast(raw), expected)
    assert any(c.graph is not None for c in contexts(fast))


def test_verify_and_report_speak_of_what_ran(trained):
    model, x = trained
    fast = fastres.accelerate(model, dtype=BF16)
    with torch.inference_mode():
        fast(x)
    found = fastres.verify(fast, x)
    assert found.ok, str(found)
    report = fast.report()
    assert report.rows and all(row.ms > 0 for row in report.rows)
    assert all(row.floor_ms and row.floor_ms < 20 * row.ms for row in report.rows if row.problem), str(report)


def test_batches_of_any_size_and_none(trained):
    model, x = trained
    fast = fastres.accelerate(model, dtype=BF16, **MECHANISM)
    with torch.inference_mode():
        for n in (0, 1, 3):
            assert fast(x[:n]).shape == (n, 1000)


# -- graphs and streams ------------------------------------------------------------------------------------------------


def test_results_of_earlier_calls_are_not_written_by_later_ones():
    model = small()
    fast = fastres.accelerate(model, **MECHANISM)
    with torch.inference_mode():
        results = [fast(images(seed=seed)) for seed in range(5)]
        for seed, result in enumerate(results):
            alike(result, model(images(seed=seed)))


def test_weights_that_change_while_a_graph_replays_are_in_the_result():
    model = small()
    fast = fastres.accelerate(model, **MECHANISM)
    x = images()
    with torch.inference_mode():
        for _ in range(3):
            fast(x)
    assert any(c.graph is not None for c in contexts(fast))
    for change in range(3):
        with torch.no_grad():
            model[0].weight.mul_(-1.5)
            model[4].running_mean.add_(0.1 * change)
        with torch.inference_mode():
            alike(fast(x), model(x))
    model.load_state_dict(small().state_dict(), assign=True)
    with torch.inference_mode():
        alike(fast(x), model(x))


def test_it_runs_inside_the_users_own_capture():
    """As PyTorch's documentation says to do it: warm up on a side stream, capture on it, replay with new data."""
    model = small()
    fast = fastres.accelerate(model, **MECHANISM)
    x, stream = images(), torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                fast(x)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            out = fast(x)
        for seed in (1, 2):
            x.copy_(images(seed=seed))
            graph.replay()
            alike(out, model(x))
        # and it goes on as before
        alike(fast(images(seed=3)), model(images(seed=3)))


def test_streams_and_threads_have_contexts_of_their_own():
    model = small()
    fast = fastres.accelerate(model, **MECHANISM)
    wanted = {seed: model(images(seed=seed)).detach() for seed in range(4)}
    torch.cuda.synchronize()
    failures = []

    def work(seed: int) -> None:
        try:
            stream = torch.cuda.Stream()
            with torch.inference_mode(), torch.cuda.stream(stream):
                x = images(seed=seed)
                for _ in range(20):
                    alike(fast(x), wanted[seed])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


class Inverse(nn.Module):
    """Asks the GPU for its result, which no capture allows."""

    def __init__(self):
        super().__init__()
        self.layers = small(FP32)

    def forward(self, x):
        y = self.layers(x)
        return torch.linalg.inv(y + 9 * torch.ones(12, device=y.device).diag())


def test_a_capture_that_fails_leaves_everything_as_it_was():
    model = Inverse().eval()
    fast = fastres.accelerate(model, **MECHANISM)
    x, stream = images(dtype=FP32), torch.cuda.current_stream()
    with torch.inference_mode():
        expected = model(x)
        for _ in range(3):
            alike(fast(x), expected)
            assert torch.cuda.current_stream() == stream
        assert all(c.graph is None for c in contexts(fast))
        assert any("CUDA graph" in note for note in fast.report(measure=False).notes)
        # another network's capture, afterwards
        other = small()
        expected, fast = other(images()), fastres.accelerate(other, **MECHANISM)
        for _ in range(3):
            alike(fast(images()), expected)
        assert any(c.graph is not None for c in contexts(fast))


def test_without_graphs_nothing_is_captured():
    fast = fastres.accelerate(small(), graphs="off", **MECHANISM)
    with torch.inference_mode():
        for _ in range(3):
            fast(images())
    assert all(c.graph is None for c in contexts(fast))


def test_release_gives_the_memory_back():
    # twice before: libraries keep workspaces of their own from the first time on
    for _ in range(2):
        fast = fastres.accelerate(small(), **MECHANISM)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        with torch.inference_mode():
            for _ in range(3):
                fast(images(n=64))
        held = torch.cuda.memory_allocated() - before
        fast.release()
        torch.cuda.synchronize()
        after = torch.cuda.memory_allocated() - before
    assert held > 0 and after <= 0, (held, after)


def test_another_device_type_or_dtype_is_refused_before_anything_runs():
    fast = fastres.accelerate(small(), **MECHANISM)
    with torch.inference_mode():
        with pytest.raises(ValueError, match="x: is on cpu, the parameters are on cuda"):
            fast(images().cpu())
        with pytest.raises(TypeError, match="bf16"):
            fast(images(dtype=BF16))


def test_a_network_that_moves_to_the_gpu_and_back_is_planned_where_it_is():
    model = small(FP32).cpu()
    fast = fastres.accelerate(model)
    x = images(dtype=FP32)
    with torch.inference_mode():
        expected = model(x.cpu())
        alike(fast(x.cpu()), expected)
        model.cuda()
        for _ in range(3):
            alike(fast(x).cpu(), expected)
        assert not fast._fastres.engine.dropped
        model.cpu()
        alike(fast(x.cpu()), expected)


# -- drop-in modules and training --------------------------------------------------------------------------------------


def test_drop_in_blocks_in_torchvisions_network():
    torch.manual_seed(0)
    ours = torchvision.models.resnet.ResNet(fastres.Bottleneck, [1, 1, 1, 1]).cuda().eval()
    theirs = torchvision.models.resnet.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1])
    theirs.load_state_dict(ours.state_dict(), strict=True)
    theirs.cuda().eval()
    x = photographs(2, size=64).cuda()
    with torch.inference_mode(), torch.autocast("cuda", BF16):
        ref = copy.deepcopy(theirs).double()
        with torch.autocast("cuda", enabled=False):
            ref = ref(x.double())
        assert_close_to_oracle(ours(x), ref, theirs(x), what="blocks under autocast")


@pytest.mark.parametrize("dtype", [None, BF16], ids=["fp32", "bf16 autocast"])
def test_a_training_step_is_torchvisions(dtype):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=10).cuda().to(memory_format=torch.channels_last)
    wide = copy.deepcopy(theirs).double()
    fast = fastres.accelerate(copy.deepcopy(theirs)).train()
    x = photographs(8, size=64).cuda().contiguous(memory_format=torch.channels_last)
    y = torch.arange(8, device="cuda") % 10

    def step(model, x, autocast):
        with torch.autocast("cuda", dtype or BF16, enabled=autocast):
            loss = nn.functional.cross_entropy(model.train()(x).float(), y)
        loss.backward()
        return [p.grad for p in model.parameters()], [b for b in model.buffers() if b.is_floating_point()]

    ref = step(wide, x.double(), False)
    own, out = step(theirs, x, dtype is not None), step(fast, x, dtype is not None)
    for kind in (0, 1):
        for got, eager, exact in zip(out[kind], own[kind], ref[kind], strict=True):
            error, allowed = (got - exact).norm(), (eager - exact).norm()
            assert error <= 2 * allowed + 1e-5 * exact.norm(), (got.shape, error, allowed)


def test_a_training_step_can_be_captured():
    """No synchronisation, nothing on the host that depends on data."""
    model = fastres.accelerate(small(FP32)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, stream = images(n=4, dtype=FP32), torch.cuda.Stream()

    def step():
        optimizer.zero_grad(set_to_none=False)
        model(x).square().mean().backward()
        optimizer.step()

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph, before = torch.cuda.CUDAGraph(), model[1].running_mean.clone()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    assert not torch.equal(model[1].running_mean, before)


def test_ops_pass_opcheck_on_the_gpu():
    x = torch.randn(2, 8, 5, 5, device="cuda", requires_grad=True)
    weight, bias = (torch.rand(8, device="cuda", requires_grad=True) for _ in range(2))
    mean, var = torch.zeros(8, device="cuda"), torch.ones(8, device="cuda")
    train = torch.ops.fastres.bn_act.default
    arguments = (x, None, weight, bias, mean, var, None, None, 0.1, 1e-5, 1, 0.0, "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(train, arguments)
        torch.library.opcheck(torch.ops.fastres.add_relu.default, (x, x.detach().clone()))


def test_the_first_call_finds_its_kernels_compiled_by_other_processes(tmp_path, monkeypatch):
    """GELU and odd channels: kernels that no other test has compiled in this process."""
    triton = pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FASTRES_COMPILE_JOBS", "4")
    hits = []
    monkeypatch.setattr(
        triton.knobs.compilation,
        "listener",
        lambda *, src, cache_hit, **_: hits.append((src.name, cache_hit)),
    )
    layers, channels = [], 8
    for k, size in ((24, 3), (40, 1), (72, 5), (136, 3), (200, 1)):
        layers += [nn.Conv2d(channels, k, size, padding=size // 2), nn.BatchNorm2d(k), nn.GELU()]
        channels = k
    model = nn.Sequential(*layers).eval().cuda().to(FP16)
    x = images(3)
    fast = fastres.accelerate(model, backend="triton")
    with torch.inference_mode():
        alike(fast(x), model(x))
    assert len(list(tmp_path.glob("*/*.cubin"))) >= 4
    assert len(hits) >= 4 and all(hit for _, hit in hits), hits


def test_tuning_measures_kernels_of_every_family(tmp_path):
    from fastres import backends
    from fastres.plan.target import detect
    from fastres.tuning.tune import problems_of, tune

    missing, device = backends.load(), torch.device("cuda", torch.cuda.current_device())
    problems = problems_of(small(), (2, 8, 12, 12), FP16)
    results = tune(problems, detect(device), device, user=tmp_path, limit_s=60, jobs=2, budget_s=0.01)
    measured = {result.candidate.partition(".")[0] for result in results if not result.reason}
    reasons = [(result.candidate, result.reason) for result in results if result.reason]
    assert {"cudnn", "triton", "cuda"} - missing.keys() <= measured, reasons
    assert list(tmp_path.rglob("cuda.*.json"))


def test_a_plan_is_proved_once_and_none_of_its_kernels_is_left_out(tmp_path, monkeypatch):
    from torchvision.models import resnet

    from fastres import env, native, workers
    from fastres.proof.record import Record

    native.available("cuda")  # from its cache, if it is there
    monkeypatch.setattr(env, "cache_dir", lambda: tmp_path)
    monkeypatch.setenv("FASTRES_PROVE", "1")
    model = resnet.ResNet(resnet.Bottleneck, [2, 1, 1, 1]).eval().to("cuda", torch.bfloat16)
    x = torch.randn(4, 3, 64, 64, device="cuda", dtype=torch.bfloat16)
    for known in (False, True):
        if known:
            monkeypatch.setattr(workers, "ask", lambda *_, **__: pytest.fail("proved twice"))
        fast = fastres.accelerate(model)
        with torch.no_grad():
            fast(x)
        assert not [note for note in fast.report().notes if "left out" in note]
        record = Record.of(x.device)
        own = [row for row in fast.report().rows if row.source.startswith("kernels/")]
        assert own and record.known and not any(record.known.values()), record.known


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_the_primitives_of_training_are_right(dtype):
    from fastres.proof import ops

    pieces = ops._pieces("cuda", dtype)
    assert {"add_relu", "bn_act"} <= {piece.op for piece in pieces}
    for piece in pieces:
        ops.prove_op(piece, dtype, "cuda")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_network_that_moves_between_gpus_keeps_its_kernels():
    model = small()
    fast, x = fastres.accelerate(model, backend="cuda"), images()
    with torch.inference_mode():
        for device in ("cuda:1", "cuda:0"):
            model.to(device)
            for _ in range(3):
                alike(fast(x.to(device)), model(x.to(device)))
            with pytest.raises(ValueError, match="parameters are on"):
                fast(x.to("cuda:0" if device == "cuda:1" else "cuda:1"))
    assert not fast._fastres.engine.dropped and torch.cuda.current_device() == 0
