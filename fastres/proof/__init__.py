"""Kernels prove themselves on a GPU before they are trusted with anybody's data.

Kernels written by hand meet GPUs, drivers and compilers that nobody has tried together. So before a plan first runs,
and before a first training step, each kernel runs on random data in a process of its own and is held to PyTorch's
unfused arithmetic in fp64. What is wrong, crashes or hangs there is left out, with the reason in the log and in the
report, and the next best runs instead.

    plan.py     the kernel calls of a plan
    ops.py      the primitives of training
    record.py   who is asked, and what is kept: under FASTRES_CACHE/proofs, for this GPU, driver, PyTorch, Triton and
                these sources, so that nothing is proved twice

FASTRES_PROVE=0 trusts every kernel.
"""
