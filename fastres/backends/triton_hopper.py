"""The Hopper family (Gluon: TMA, mbarriers, wgmma): importing this registers its candidates."""

from fastres.backends import triton_hopper_block, triton_hopper_conv, triton_hopper_stem  # noqa: F401
