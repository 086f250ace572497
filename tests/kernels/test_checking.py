"""The check that all kernels are held to can fail."""

import pytest
import torch.nn.functional as F
from checking import check_candidate
from problems import conv_problem

from fastres.plan.candidate import Candidate
from fastres.plan.pattern import CONV_BN_ACT


class Reference(Candidate):
    """The layer in PyTorch; `spoil` may change what it writes."""

    name, pattern = "fake.conv", CONV_BN_ACT

    def __init__(self, spoil=lambda y: y):
        self.spoil = spoil

    def prepare(self, problem, config, parameters):
        return parameters["conv"].weight, *parameters["conv"].scale_shift()

    def bind(self, problem, config, buffers, constants):
        weight, scale, shift = (t if t.dim() == 4 else t.view(-1, 1, 1) for t in constants)

        def launch():
            y = F.conv2d(buffers["conv.x"], weight, padding=problem["conv"].padding) * scale + shift
            buffers["conv"].copy_(self.spoil(y))

        return launch


PROBLEM = conv_problem(8, 3, 6, 5, 4, 3)


def test_equal_images_must_give_equal_results_wherever_they_stand():
    check_candidate(Reference(), PROBLEM, distinct=3)
    check_candidate(Reference(), conv_problem(2, 3, 6, 5, 4, 3), distinct=3)

    def mixed(y):
        y[6] = y[4]
        return y

    with pytest.raises(AssertionError, match="images from 6 on differ"):
        check_candidate(Reference(mixed), PROBLEM, distinct=3)


def test_the_oracle_sees_the_different_images():
    with pytest.raises(AssertionError, match="outside the bound"):
        check_candidate(Reference(lambda y: y * 1.001), PROBLEM, distinct=3)
