"""fastres: the fastest way to run a ResNet from PyTorch.

Importing it registers the operators (`torch.ops.fastres`), so that exported and ahead-of-time compiled programs find
them. It compiles nothing, imports no Triton, touches no GPU and makes no folder: the other public names are loaded on
first use (PEP 562).
"""

import importlib

from fastres import env as env
from fastres import ops as ops

env.start_log()

__version__ = "0.1.0"

# public name -> module that defines it
_EXPORTS: dict[str, str] = {
    "accelerate": "fastres.accelerate",
    "verify": "fastres.verify",
    "Activation": "fastres.activation",
    **dict.fromkeys(
        (
            "BNAct",
            "BasicBlock",
            "Bottleneck",
            "ConvBNAct",
            "ResNet",
            "resnet11",
            "resnet18",
            "resnet34",
            "resnet50",
            "resnet101",
            "resnet152",
            "resnext50_32x4d",
            "resnext101_32x8d",
            "resnext101_64x4d",
            "wide_resnet50_2",
            "wide_resnet101_2",
        ),
        "fastres.nn",
    ),
    **dict.fromkeys(("add_relu", "add_relu_", "bn_act", "conv_bn_act"), "fastres.ops"),
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_EXPORTS))
