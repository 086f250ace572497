"""Shared by the Hopper kernels: claiming tiles, activations.

One scheduler warp claims tiles from a counter in global memory and posts them as tickets in shared memory;
every other partition of the block reads each ticket that concerns it. Equal static shares let the slow
multiprocessors finish last: on an H100 dynamic tiles took 3x3 + expand + reduce at 56x56 from 388 to 353
us, and 64->256 with a residual from 343 to 316 us.

`ticket` [SLOTS, 1] int32, `posted` and `taken` [SLOTS, 1] mbarriers; `taken` counts the partitions that
read each ticket. Two consumer groups on alternate tickets need SLOTS even: each then meets only its own
slots, and the parity, which is all that an mbarrier wait sees, cannot alias.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

# As PyTorch's clamps do: a NaN stays one.
KEEP_NAN = gl.constexpr(tl.PropagateNan.ALL)


@gluon.jit
def claim(ticket, posted, taken, k, WARPS: gl.constexpr, SLOTS: gl.constexpr):
    """The block's k-th tile; the number of tiles when there is none left."""
    i = k % SLOTS
    mbarrier.wait(posted.index(i), (k // SLOTS) & 1)
    v = ticket.index(i).load(gl.BlockedLayout([1], [32], [WARPS], [0]))
    tile = gl.max(v, 0)
    mbarrier.arrive(taken.index(i), count=1)
    return tile


@gluon.jit
def post(ticket, posted, taken, k, tile, SLOTS: gl.constexpr):
    i = k % SLOTS
    mbarrier.wait(taken.index(i), ((k // SLOTS) & 1) ^ 1)
    ticket.index(i).store(gl.zeros((1,), gl.int32, gl.BlockedLayout([1], [32], [1], [0])) + tile)
    mbarrier.arrive(posted.index(i), count=1)


@gluon.jit
def schedule(
    counter, ticket, posted, taken, tiles, columns,
    ENDS: gl.constexpr, DYNAMIC: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """The scheduler warp: posts tile program_id first, then claimed ones (DYNAMIC) or every
    num_programs-th, and closes with ENDS tickets of value `tiles`.

    `columns` > 1: a block keeps to the tiles columns * m + program_id % columns (its weights stay in
    shared memory), and m comes from a counter for each column; the grid and `tiles` are then multiples of
    `columns`. Counters start at zero and are left at zero. Relaxed atomics: with the default order Gluon
    puts a fence over all of the GPU's memory before each."""
    column = gl.program_id(0) % columns
    k = 0
    tile = gl.program_id(0)
    while tile < tiles:
        post(ticket, posted, taken, k, tile, SLOTS)
        k += 1
        if DYNAMIC:
            claimed = gl.atomic_add(counter + column, 1, sem="relaxed")
            if claimed == tiles // columns - 1:
                gl.atomic_xchg(counter + column, 0, sem="relaxed")
            tile = claimed * columns + gl.num_programs(0) + column
        else:
            tile += gl.num_programs(0)
    for j in gl.static_range(ENDS):
        post(ticket, posted, taken, k + j, tiles, SLOTS)


@gluon.jit
def activate(x, ACT: gl.constexpr, slope):
    """Activation number ACT of fp32 x: identity, relu, relu6, silu, gelu, leaky_relu, gelu_tanh,
    hardswish."""
    if ACT == 1:
        x = gl.maximum(x, 0.0, propagate_nan=KEEP_NAN)
    elif ACT == 2:
        x = gl.minimum(gl.maximum(x, 0.0, propagate_nan=KEEP_NAN), 6.0, propagate_nan=KEEP_NAN)
    elif ACT == 3:
        x = x / (1.0 + gl.exp(-x))
    elif ACT == 4:
        x = 0.5 * x * (1.0 + gl.erf(x * 0.7071067811865476))
    elif ACT == 5:
        x = gl.where(x > 0.0, x, x * slope)
    elif ACT == 6:
        # 0.5 x (1 + tanh(u)) = x sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        u = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        x = x / (1.0 + gl.exp(-u))
    elif ACT == 7:
        x = x * gl.minimum(gl.maximum(x + 3.0, 0.0), 6.0) * 0.16666666666666666
    return x
