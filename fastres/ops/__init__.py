"""Differentiable operators, as functions and as `torch.ops.fastres.*`.

They work under autograd, autocast, torch.compile, torch.export and CUDA graphs; which backend computes is
decided inside, on real tensors.
"""

from .add_relu import add_relu, add_relu_
from .bn_act import bn_act
from .conv_bn_act import conv_bn_act
from .conv_stats import conv_stats

__all__ = ["add_relu", "add_relu_", "bn_act", "conv_bn_act", "conv_stats"]
