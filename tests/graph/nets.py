"""Small networks, each with one trap, and how their accelerated forms are compared."""

import torch
from torch import nn

import fastres
from fastres.graph.capture import capture
from fastres.graph.ir import Conv, Opaque


def conv_bn(c: int, k: int, kernel: int = 3, **more) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c, k, kernel, padding=kernel // 2, bias=False, **more), nn.BatchNorm2d(k))


@torch.no_grad()
def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` in fp64 and eval mode with BNs that do something: an error in folding is larger than any rounding."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.double().eval()


def image(n: int = 2, c: int = 4, h: int = 9, w: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, c, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(out, expected) -> None:
    """fp64 on both sides: what differs is summation order."""
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def check(model: nn.Module, *inputs: torch.Tensor, calls: int = 2) -> nn.Module:
    """The accelerated model equals the model, in inference, twice, and with gradients; returned for more questions."""
    with torch.no_grad():
        expected = model(*[x.clone() for x in inputs])
    fast = fastres.accelerate(model)
    with torch.no_grad():
        for _ in range(calls):
            close(fast(*[x.clone() for x in inputs]), expected)
    with torch.enable_grad():
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            close(fast(*[x.clone() for x in inputs]), expected)
    return fast


def convs(model: nn.Module) -> list[Conv]:
    return [node for node in capture(model).nodes if isinstance(node, Conv)]


def opaques(model: nn.Module) -> list[Opaque]:
    return [node for node in capture(model).nodes if isinstance(node, Opaque)]


class Net(nn.Module):
    """A network whose forward is the given function of (module, x); children by name."""

    def __init__(self, forward, **children: nn.Module):
        super().__init__()
        self.body = forward
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x):
        return self.body(self, x)
