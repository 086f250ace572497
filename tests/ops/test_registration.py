"""The raw ops as PyTorch's tools see them: opcheck, torch.compile, torch.export, AOTInductor, versions."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from fastres import ops

RAW = torch.ops.fastres
ALL_CHECKS = {"test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"}


def _vectors(channels):
    weight, bias = (torch.randn(channels, requires_grad=True) for _ in range(2))
    return weight, bias, torch.randn(channels), torch.rand(channels) + 0.5


def _cases():
    x = torch.randn(3, 4, 5, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    residual = torch.randn(3, 4, 5, 3, requires_grad=True)
    weight, bias, mean, var = _vectors(4)
    yield "bn_act", (x, residual, weight, bias, mean, var, None, None, 0.1, 1e-5, 1, 0.0, "")
    yield "bn_act", (x, None, None, None, None, None, None, None, 0.1, 1e-5, 3, 0.0, "")
    yield "bn_act", (torch.randn(3, 4), None, weight, bias, mean, var, mean, var, 0.1, 1e-5, 0, 0.0, "")
    yield "bn_act_frozen", (x, residual, weight, bias, mean, var, 1e-5, 1, 0.0)
    yield "bn_act_frozen", (x, None, None, bias, mean, var, 1e-5, 5, 0.1)
    vectors = (torch.zeros(4), torch.ones(4))
    y = x.detach()
    yield "bn_act_backward", (y, y, None, None, None, *vectors, y, True, 1, 0.0, "", [True] * 4)
    yield (
        "bn_act_backward",
        (y, y, y, None, None, *vectors, None, False, 3, 0.0, "", [True, False, True, False]),
    )
    yield "add_relu", (x, residual)
    yield "add_relu_", (x.detach().clone(), residual.detach())
    kernel = torch.randn(6, 2, 3, 3, requires_grad=True)
    weight, bias, mean, var = _vectors(6)
    residual = torch.randn(3, 6, 3, 2, requires_grad=True)
    geometry = ([2, 2], [1, 1], [1, 1], 2)
    yield "conv_bn_act", (x, kernel, bias, weight, bias, mean, var, 1e-5, *geometry, residual, 1, 0.0)
    yield "conv_bn_act", (x, kernel, None, None, None, None, None, 1e-5, *geometry, None, 4, 0.0)
    yield "conv_stats", (x, kernel, *geometry)


@pytest.mark.parametrize(("name", "arguments"), list(_cases()), ids=lambda v: v if isinstance(v, str) else "")
def test_opcheck_passes_every_check(name, arguments):
    assert set(torch.library.opcheck(getattr(RAW, name).default, arguments)) == ALL_CHECKS


class Layers(nn.Module):
    """Every public op once."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3) * 0.2)
        self.scale, self.shift = nn.Parameter(torch.rand(4) + 0.5), nn.Parameter(torch.randn(4))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)
        self.register_buffer("fixed_mean", torch.randn(4))
        self.register_buffer("fixed_var", torch.rand(4) + 0.5)

    def forward(self, x):
        statistics = (self.scale, self.shift, self.fixed_mean, self.fixed_var)
        y = ops.conv_bn_act(x, self.weight, None, *statistics, padding=1, residual=x)
        affine = (self.scale, self.shift)
        y = ops.bn_act(y, self.mean, self.var, *affine, self.training, residual=x, act="silu")
        z = ops.add_relu_(y * 2, x)
        return ops.add_relu(z, y)


def _train_step(model, function, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = function(x)
    out.square().sum().backward()
    gradients = [x.grad, *(p.grad.clone() for p in model.parameters())]
    return [out.detach(), model.mean.clone(), model.var.clone(), *gradients]


@pytest.mark.parametrize(
    ("training", "backend_name"), [(True, "aot_eager"), (False, "aot_eager"), (True, "inductor")]
)
def test_compiled_in_one_graph_gives_the_same_step(training, backend_name):
    torch._dynamo.reset()
    model = Layers().train(training)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend_name)
    for batch in (2, 5):
        x = torch.randn(batch, 4, 6, 5)
        model.load_state_dict(state)
        want = _train_step(model, model, x)
        model.load_state_dict(state)
        got = _train_step(model, compiled, x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def exported():
    model = Layers().eval()
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
    with torch.no_grad():
        return model, torch.export.export(model, (torch.randn(2, 4, 6, 5),), dynamic_shapes=dynamic)


def test_exported_program_shows_the_ops_and_takes_any_batch(exported):
    model, program = exported
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {
        "fastres.conv_bn_act.default",
        "fastres.bn_act_frozen.default",
        "fastres.add_relu.default",
    } <= called
    for batch in (1, 7):
        x = torch.randn(batch, 4, 6, 5)
        torch.testing.assert_close(program.module()(x), model(x))


def test_aot_inductor_package_runs_in_a_process_that_only_imported_fastres(exported, tmp_path):
    model, program = exported
    package, data = str(tmp_path / "model.pt2"), str(tmp_path / "data.pt")
    torch._inductor.aoti_compile_and_package(program, package_path=package)
    x = torch.randn(3, 4, 6, 5)
    with torch.no_grad():
        torch.save((x, model(x)), data)
    script = f"""
        import torch
        import fastres
        x, want = torch.load({data!r})
        model = torch._inductor.aoti_load_package({package!r})
        torch.testing.assert_close(model(x), want)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)


def test_raw_ops_are_differentiable():
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    out, *_ = RAW.bn_act(x, None, None, None, None, None, None, None, 0.1, 1e-5, 1, 0.0, "")
    assert out.requires_grad
    assert RAW.add_relu(x, x).requires_grad


def test_ops_without_a_second_formula_refuse_instead_of_returning_wrong_gradients():
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    vectors = torch.zeros(4), torch.ones(4)
    with pytest.raises(RuntimeError, match=r"bn_act_backward.*has no derivative"):
        RAW.bn_act_backward(x, x, None, None, None, *vectors, x, True, 1, 0.0, "", [True] * 4)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_tangent_is_refused_instead_of_lost(frozen):
    x, vectors = torch.randn(2, 4, 3, 3), (torch.zeros(4), torch.ones(4))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            ops.bn_act(dual, *vectors, training=not frozen)
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            ops.add_relu(dual, x)
        assert ops.bn_act(x, *vectors, training=not frozen).shape == x.shape
