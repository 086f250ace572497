"""The portable Triton kernels (sm_80 and newer, and what AMD's compiler takes): candidates and launchers."""

from fastres.backends.triton_portable import conv_bn_act, dual, expand_reduce, pool, stem_pool

__all__ = ["conv_bn_act", "dual", "expand_reduce", "pool", "stem_pool"]
