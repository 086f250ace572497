"""What kernels/cuda believes of Hopper's instructions, one belief a test, in the emulator and on a GPU.

What must come out follows from a definition (a convolution's windows, a matrix product), not from the emulator. Where
kernels fail on a GPU, these say which belief is wrong, in seconds: `pytest -m gpu tests/kernels/cuda/test_probes.py`.
"""

import ctypes
import itertools
import math

import emulated
import numpy as np
import pytest
import torch
from probing import IMAGE, Call, run

BF16, FP16 = 0, 1  # types, by their codes (launch.h)
RNG = np.random.default_rng(0)


@pytest.fixture
def hopper(device):
    """`device`, but a GPU must be the one that the probes are for."""
    if device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the probes are compiled for sm_90a")
    if device == "cpu":
        emulated.library()
    return device


def _numbers(*shape):
    """Different 16-bit patterns, none of them zero."""
    return (np.arange(math.prod(shape), dtype=np.uint32) % 65521 + 1).astype(np.uint16).reshape(shape)


def _swizzled(rows):
    """[rows, 64] of 16 bits as they lie in shared memory, from a multiple of 1,024 bytes on; 0xff after them."""
    image = np.full(IMAGE, 0xFF, np.uint8)
    for r, row in enumerate(rows):
        for chunk in range(8):
            at = r * 128 + (chunk ^ r % 8) * 16
            image[at : at + 16] = row[8 * chunk : 8 * chunk + 8].view(np.uint8)
    return image


def _map(size, strides, box, step=(1, 1, 1, 1, 1), lower=(0, 0), upper=(0, 0), traversal=(0, 0)):
    def fill(values, count, by):
        return [*values, *[by] * (count - len(values))]

    numbers = [BF16, len(size), int(traversal[0] > 0), *fill(size, 5, 0), *fill(strides, 4, 0)]
    return [*numbers, *fill(box, 5, 0), *lower, *upper, *traversal, *fill(step, 5, 1)]


def _packed(size):
    """Strides in bytes of a dense tensor, of dimensions 1 on."""
    return [2 * math.prod(size[:d]) for d in range(1, len(size))]


def _load(hopper, tensor, arguments, c, offset, rows):
    """The rows arrive, all of the box's bytes are counted, and nothing else is written; with the L2's hints too."""
    numbers = [*arguments, *c, *[0] * (5 - len(c)), *offset, 128 * len(rows)]
    calls = [Call("load", [*numbers, hint], tensor, np.zeros(IMAGE, np.uint8)) for hint in (0, 1, 2)]
    for hint, shown in enumerate(run(hopper, calls)):
        arrived, phase = shown.status[:2]
        wrong = np.flatnonzero(shown.out != _swizzled(rows))
        assert arrived == 1, f"hint {hint}: the barrier counts other bytes than the whole box's"
        assert phase == 0, f"shared memory begins {phase} bytes after a multiple of 1,024"
        assert wrong.size == 0, (
            f"hint {hint}: {wrong.size} bytes differ, from {wrong[0]} (row {wrong[0] // 128}) to {wrong[-1]}"
        )


BOXES = {  # size, box, step, coordinates; innermost first
    "rows, over three edges": ((72, 40), (64, 48), (1, 1), (16, -3)),
    "filters of a tap": ((40, 9, 70), (64, 1, 64), (1, 1, 1), (0, 4, 32)),
    "pixels, from outside": ((64, 13, 11, 3), (64, 8, 10, 1), (1, 1, 1, 1), (0, -1, 6, 2)),
    "each second and third pixel": ((24, 2, 13, 11, 3), (64, 1, 5, 4, 2), (1, 1, 2, 3, 1), (0, 1, -1, -2, 1)),
    "each eighth pixel": ((8, 1, 70, 70, 1), (64, 1, 7, 7, 1), (1, 1, 8, 8, 1), (0, 0, 14, 14, 0)),
    "nothing of the tensor": ((64, 5, 5, 2), (64, 4, 4, 1), (1, 1, 1, 1), (0, 0, 0, 2)),
}


def _box_rows(tensor, box, step, c):
    """tensor: outermost first."""
    rows = np.zeros((math.prod(box[1:]), box[0]), np.uint16)
    for row, index in zip(rows, itertools.product(*map(range, reversed(box[1:]))), strict=True):
        at = [c[d] + i * step[d] for d, i in zip(range(len(box) - 1, 0, -1), index, strict=True)]
        if all(0 <= i < extent for i, extent in zip(at, tensor.shape, strict=False)):
            inside = tensor[tuple(at)][c[0] : c[0] + box[0]]
            row[: inside.size] = inside
    return rows


@pytest.mark.parametrize("name", BOXES)
def test_a_box(name, hopper):
    size, box, step, c = BOXES[name]
    tensor = _numbers(*reversed(size))
    _load(hopper, tensor, _map(size, _packed(size), box, step), c, (0, 0), _box_rows(tensor, box, step, c))


def test_a_box_of_rows_of_neighbouring_images(hopper):
    """Strides need not grow: images lie between columns and rows."""
    n, h, w, c = 5, 14, 14, 64
    tensor, box, at = _numbers(n, h, w, c), (64, 14, 4, 3), (0, -1, 2, -1)
    arguments = _map((c, w, n, h), (2 * c, 2 * c * w * h, 2 * c * w), box)
    rows = _box_rows(np.ascontiguousarray(tensor.transpose(1, 0, 2, 3)), box, (1, 1, 1, 1), at)
    _load(hopper, tensor, arguments, at, (0, 0), rows)


WINDOWS = {  # [n, h, w, c], filter, stride, padding, dilation (height, width each), tap, first output, pixels, channel
    "3x3": ((2, 7, 9, 64), (3, 3), (1, 1), (1, 1), (1, 1), (0, 0), 0, 128, 0),
    "height is not width": ((3, 6, 9, 72), (2, 4), (1, 1), (1, 2), (2, 1), (1, 3), 7, 128, 16),
    "stride 2": ((3, 8, 8, 64), (3, 3), (2, 2), (1, 1), (1, 1), (2, 1), 5, 32, 0),
    "stride 2, odd": ((3, 7, 9, 64), (1, 1), (2, 2), (0, 0), (1, 1), (0, 0), 1, 48, 0),
    "strides 3 and 2, a rest": ((4, 10, 12, 64), (3, 2), (3, 2), (1, 0), (1, 1), (2, 1), 3, 64, 0),
    "past the last image": ((2, 5, 5, 64), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 45, 128, 0),
    "no image at all": ((2, 5, 5, 64), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 53, 64, 0),
    "few channels": ((2, 5, 6, 8), (3, 3), (1, 1), (1, 1), (1, 1), (0, 2), 2, 64, 0),
    "far taps": ((1, 9, 30, 64), (1, 3), (1, 1), (0, 100), (1, 100), (0, 2), 11, 64, 0),
    "all of a stage": ((4, 16, 16, 64), (3, 3), (1, 1), (1, 1), (1, 1), (0, 1), 250, 256, 0),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_a_run_of_windows(name, hopper):
    (n, h, w, c), filters, stride, pad, dilation, tap, first, pixels, channel = WINDOWS[name]
    reach = [d * (k - 1) for d, k in zip(dilation, filters, strict=True)]
    p, q = ((size + 2 * pad[i] - reach[i] - 1) // stride[i] + 1 for i, size in enumerate((h, w)))
    tensor, rows = _numbers(n, h, w, c), np.zeros((pixels, 64), np.uint16)
    for row, pixel in zip(rows, range(first, first + pixels), strict=True):
        image, y, x = pixel // (p * q), pixel // q % p, pixel % q
        y, x = y * stride[0] - pad[0] + tap[0] * dilation[0], x * stride[1] - pad[1] + tap[1] * dilation[1]
        if image < n and 0 <= y < h and 0 <= x < w:
            inside = tensor[image, y, x, channel : channel + 64]
            row[: inside.size] = inside
    corners = {"lower": (-pad[1], -pad[0]), "upper": (pad[1] - reach[1], pad[0] - reach[0])}
    arguments = _map((c, w, h, n), _packed((c, w, h, n)), (64, pixels), traversal=stride[::-1], **corners)
    start = (first % q * stride[1] - pad[1], first // q % p * stride[0] - pad[0], first // (p * q))
    _load(hopper, tensor, arguments, (channel, *start), (tap[1] * dilation[1], tap[0] * dilation[0]), rows)


@pytest.mark.parametrize(
    ("size", "strides", "box", "c"),
    [
        ((72, 40), (144,), (64, 48), (16, -3)),
        ((72, 5, 13), (144 * 13, 144), (64, 4, 1), (64, 3, 12)),  # k, n, positions
        ((72, 14, 5, 14), (144, 144 * 14 * 14, 144 * 14), (64, 14, 4, 1), (64, 0, 3, 13)),  # c, w, n, h
    ],
)
def test_a_store_leaves_out_what_is_outside(size, strides, box, c, hopper):
    rows = _numbers(math.prod(box[1:]), 64)
    before = np.full(math.prod(size) + 512, 0xABAB, np.uint16)
    want = before.copy()
    for row, index in zip(rows, itertools.product(*map(range, reversed(box[1:]))), strict=True):
        at = [c[d] + i for d, i in zip(range(len(box) - 1, 0, -1), index, strict=True)][::-1]
        if all(0 <= i < extent for i, extent in zip(at, size[1:], strict=True)):
            element = sum(i * s // 2 for i, s in zip(at, strides, strict=True)) + c[0]
            count = min(64, size[0] - c[0])
            want[element : element + count] = row[:count]
    numbers = [*_map(size, strides, box), *c, *[0] * (5 - len(c)), 0, 0, 0, 0]
    (shown,) = run(hopper, [Call("store", numbers, _swizzled(rows), before)])
    assert shown.status[0] == 1 and np.array_equal(shown.out, want)


def _cluster(fences):
    filters = _numbers(128, 3, 64)
    numbers = [
        *_map((64, 3, 128), _packed((64, 3, 128)), (64, 1, 64)),
        0,
        1,
        0,
        0,
        0,
        0,
        0,
        2 * 64 * 128,
        fences,
    ]
    return filters, Call("cluster", numbers, filters, np.zeros(2 * IMAGE, np.uint8))


def test_blocks_of_a_cluster_load_for_each_other_and_arrive_at_each_other(hopper):
    filters, call = _cluster(fences=1)
    (shown,) = run(hopper, [call])
    want = _swizzled(filters[:, 1])[: IMAGE - 64]
    for rank in range(2):
        loaded, met, told, word, other, block = shown.status[6 * rank : 6 * rank + 6]
        assert loaded == 1, "the barrier does not get the bytes that both blocks load"
        assert np.array_equal(shown.out[rank * IMAGE :][: want.size], want), f"what lies in block {rank}"
        assert (met, told) == (1, 1), "an arrival at another block's barrier"
        assert word == 4321 + rank, "a word that another block stored before it arrived"
        assert other == 1 + (rank ^ 1), "a read of the other block's shared memory"
        assert block == 11 * rank, "blockIdx.x is rank in a cluster of a grid of one"


def test_the_emulator_refuses_a_remote_store_that_nothing_orders_before_the_arrival():
    emulated.schedule(0, 0)
    with pytest.raises(RuntimeError, match="fence_cluster"):
        run("cpu", [_cluster(fences=0)[1]])


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (0, None),
        (1, "wgmma after a wait, or the first one, without wgmma_fence"),
        (2, "wgmma after a wait, or the first one, without wgmma_fence"),
        (3, None),
        (4, "a store without fence_async_shared of all threads"),
        (5, "fewer than 2^20 bytes"),
    ],
)
def test_the_emulator_refuses_what_a_gpu_would_get_wrong_now_and_then(what, words):
    emulated.schedule(0, 0)
    error = ctypes.create_string_buffer(256)
    assert emulated.library().emulator_refusal(what, error) == (words is not None)
    assert (words or "") in error.value.decode()


@pytest.mark.parametrize("offset", [0, 16, 48])
def test_a_tensor_map_is_encoded_where_the_driver_takes_it_wherever_the_caller_keeps_it(offset):
    """g++ 12 gives a temporary that holds a result 16 bytes of alignment, whatever its type asks for."""
    error = ctypes.create_string_buffer(256)
    refused = emulated.library().emulator_map_refusal(offset, error)
    assert not refused, error.value.decode()


def test_products_of_every_width(hopper):
    """Whole numbers are exact: a descriptor, a step along the depth, a fragment or a width that is wrong shows."""
    kinds = [(n, False) for n in (32, 64, 128, 224, 256)] + [(64, True), (256, True)]
    calls, wants = [], []
    for dtype, (n, registers) in itertools.product((BF16, FP16), kinds):
        a, b = (RNG.integers(-4, 5, (rows, 64)).astype(np.float32) for rows in (64, n))
        both = torch.from_numpy(np.concatenate((a, b))).to((torch.bfloat16, torch.float16)[dtype])
        calls.append(
            Call(
                "wgmma", [dtype, n, registers], both.view(torch.int16).numpy(), np.zeros((64, n), np.float32)
            )
        )
        wants.append(2 * a @ b.T)
    wrong = [
        f"type {call.arguments[0]}, n {call.arguments[1]}{', a in registers' * call.arguments[2]}"
        for call, shown, want in zip(calls, run(hopper, calls), wants, strict=True)
        if shown.status[0] != 1 or not np.array_equal(shown.out, want)
    ]
    assert not wrong


def test_matrices_are_transposed_on_their_way(hopper):
    data = np.full(IMAGE // 2, 0xFFFF, np.uint16)
    data[:256] = _numbers(256)
    (shown,) = run(hopper, [Call("matrices", [], data, np.zeros(1024, np.uint8))])
    lane, matrix, half = np.ogrid[:32, :4, :2]
    read = data[matrix * 64 + (lane % 4 * 2 + half) * 8 + lane // 4]
    assert np.array_equal(shown.out[:512].view(np.uint16).reshape(32, 4, 2), read)
    assert np.array_equal(shown.out[512:].view(np.uint16), data[:256])


def test_roles_share_out_a_blocks_registers_and_a_warp_elects_the_same_lane_each_time(hopper):
    (shown,) = run(hopper, [Call("registers", [], np.zeros(8, np.uint8), np.zeros(384, np.uint8))])
    assert shown.status[0] == 1
    elected = shown.out.reshape(12, 32)
    assert (elected.sum(1) == 3).all() and (elected.max(1) == 3).all()


def test_a_row_of_overlapping_launches_with_clusters_as_a_graph(hopper):
    """Each adds one to what its predecessor wrote, over what that one read: 30 launches, four times."""
    (shown,) = run(hopper, [Call("chain", [], np.zeros(128, np.int32), np.zeros(128, np.int32))])
    assert (shown.out == 120).all()
