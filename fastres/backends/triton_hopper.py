"""The Hopper family (Gluon: TMA, mbarriers, wgmma): importing this registers its candidates."""

from fastres.backends import (  # noqa: F401
    triton_hopper_block,
    triton_hopper_conv,
    triton_hopper_halo,
    triton_hopper_stem,
)
