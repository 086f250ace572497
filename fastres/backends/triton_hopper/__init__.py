"""The Hopper family (Gluon: TMA, mbarriers, wgmma, Triton 3.6 and newer): candidates and their bound calls."""

from fastres.backends.triton_hopper import conv_bn_act, dual, expand_reduce, halo, shifted_block, stem_pool

__all__ = ["conv_bn_act", "dual", "expand_reduce", "halo", "shifted_block", "stem_pool"]
