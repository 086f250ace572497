"""The index arithmetic of the CUDA kernels, compiled for the CPU, against brute force."""

import ctypes
import random
from dataclasses import replace

import emulated
import pytest
import torch
from problems import conv_problem, network_problems, random_problems

from fastres.backends.cuda.conv_bn_act import merged_groups
from fastres.backends.cuda.latency import best_box, box_taps
from fastres.backends.cuda.sm90_conv_bn_act import HALO_TILES, TILES, takes_halo, takes_positions
from fastres.plan.pattern import CONV_BN_ACT

NETWORKS = ("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2")


@pytest.fixture(scope="module")
def c() -> ctypes.CDLL:
    return emulated.library()


def _numbers(spec, groups=None):
    """The fields of ConvShape."""
    values = (spec.n, spec.h, spec.w, spec.c, spec.p, spec.q, spec.k, *spec.kernel, *spec.stride)
    values += (*spec.padding, *spec.dilation, groups or spec.groups)
    return (ctypes.c_int * 16)(*values)


def _random_specs(count):
    problems = random_problems(CONV_BN_ACT, 4 * count, torch.bfloat16, seed=5)
    specs = [p["conv"] for p in problems if p.flops // p["conv"].k < 4e6]
    assert len(specs) >= count
    return specs[:count]


def _network_specs(size):
    return [p["conv"] for p in network_problems(CONV_BN_ACT, NETWORKS, 2, torch.bfloat16, size)]


def test_addresses_of_500_random_convolutions(c):
    for spec in _random_specs(500):
        assert c.check_addresses(_numbers(spec)) == 0, spec


def test_addresses_of_the_layers_of_networks(c):
    for spec in _network_specs(64):
        merged = spec.groups // merged_groups(spec)
        if spec.flops // spec.k < 8e6 * spec.groups:
            assert c.check_addresses(_numbers(spec, merged)) == 0, spec


def test_strides_through_the_depth(c):
    for spec in (*_random_specs(200), *_network_specs(224)):
        for step in (16, 32, 64):
            assert c.check_strides(_numbers(spec), step) == 0, (spec, step)


def test_tiles_cover_every_output_and_all_of_the_depth_once(c):
    rng = random.Random(0)
    for spec in (*_random_specs(500), *_network_specs(32)):
        block_m, block_n = rng.choice(((64, 64), (128, 64), (128, 128), (64, 128), (64, 56), (64, 32)))
        splits = rng.randint(1, 7)
        assert c.check_tiles(_numbers(spec), block_m, block_n, splits, 32) == 0, (spec, block_m, splits)


def test_boxes_hold_every_product_once_and_no_padding(c):
    rng, box, total = random.Random(1), (ctypes.c_int * 3)(), ctypes.c_long()
    skipped = 0
    for spec in (*_random_specs(500), *_network_specs(32)):
        groups = spec.groups // merged_groups(spec)
        chunks = -(-(spec.c // groups) // 64)
        pixels, more = rng.choice((32, 64, 128)), rng.randint(0, 3)
        filters = rng.choice((64, 128))
        (images, rows, columns), steps, longest = best_box(spec, pixels, chunks, more)
        box[:] = images, rows, columns
        assert 1 <= images * rows * columns <= pixels
        boxes = -(-spec.n // images) * -(-spec.p // rows) * -(-spec.q // columns)
        assert (
            c.check_boxes(_numbers(spec, groups), box, filters, rng.choice((1, 2, 4, 8)), ctypes.byref(total))
            == 0
        ), spec
        assert total.value == steps - boxes * more and longest * boxes >= steps
        skipped += boxes * chunks * spec.kernel[0] * spec.kernel[1] - total.value
    assert skipped > 1000


def test_parts_of_the_depth_differ_by_at_most_one(c):
    out = (ctypes.c_int * 2)()
    for steps in (1, 7, 72, 1000):
        for parts in range(1, min(steps, 24) + 1):
            sizes = []
            for part in range(parts):
                c.part_of_steps(steps, part, parts, out)
                sizes.append(out[1] - out[0])
            assert sum(sizes) == steps and max(sizes) - min(sizes) <= 1 and min(sizes) > 0


def test_division_by_a_product(c):
    powers = [2**i + d for i in range(31) for d in (-1, 0, 1) if 0 < 2**i + d < 2**31]
    for by in (*range(1, 2000), *powers, 2**31 - 1):
        assert c.check_divisor(by) == 0, by


def test_rows_that_ldmatrix_reads_together_lie_in_different_banks(c):
    for first in range(0, 128, 8):
        for chunk in range(4):
            places = [c.swizzle_64_of(first + row, chunk) for row in range(8)]
            # Eight 16-byte places in the 128 bytes that the 32 banks serve at once.
            assert len({place % 128 // 16 for place in places}) == 8
            assert all(place // 64 == first + row for row, place in enumerate(places))


def test_hopper_tiles_and_loads_of_500_random_convolutions(c):
    rng, checked = random.Random(1), 0
    for spec in _random_specs(1000):
        if spec.groups != 1 or spec.c % 8:
            # The same geometry with channels that it takes.
            spec = replace(spec, groups=1, c=8 * rng.randint(1, 20))
        tile, cluster = rng.choice(TILES), rng.choice((1, 2))
        every = 1 if spec.n * spec.p * spec.q * spec.c * spec.kernel[0] * spec.kernel[1] < 4e5 else 7
        assert c.check_sm90_conv(_numbers(spec), 0, *tile, cluster, every) == 0, (spec, tile, cluster)
        checked += 1
        if checked == 500:
            return
    pytest.fail("too few convolutions")


@pytest.mark.parametrize("tile", TILES, ids=lambda t: "x".join(map(str, t)))
def test_hopper_tiles_and_loads_of_the_layers_of_networks(c, tile):
    specs = [spec for spec in _network_specs(224) if spec.groups == 1 and spec.c % 8 == 0]
    assert len(specs) > 30
    for index, spec in enumerate(specs):
        second = (0, 64, 72)[index % 3]
        assert c.check_sm90_conv(_numbers(spec), second, *tile, 1 + index % 2, 23) == 0, spec


def test_steps_of_the_stem_complete_every_row(c):
    for h in (*range(1, 40), 223, 224, 225, 448):
        for rows in {1, 2, 3, 5, -(-h // 8), -(-h // 4), 200}:
            assert c.check_stem_rows(h, rows) == 0, (h, rows)


def test_windows_of_the_stem_lie_where_lanes_look(c):
    for column in range(4):
        assert c.check_stem_columns(column) == 0, column


def test_halo_tiles_and_loads_of_every_layer_that_takes_them_and_of_odd_batches(c):
    specs = [spec for spec in _network_specs(224) if spec.c % 8 == 0 and takes_halo(spec)]
    assert {spec.w for spec in specs} == {56, 28, 14, 7}
    specs += [replace(specs[0], n=n, c=c, h=h, w=w, k=k) for n, c, h, w, k in _HALO_SHAPES]
    for index, spec in enumerate(specs):
        for tile in HALO_TILES:
            numbers = _numbers(spec, 1)
            assert (
                c.check_sm90_conv(numbers, 0, *tile, 1 + index % 2, 1 if spec.n * spec.h < 40 else 13) == 0
            ), (spec, tile)


_HALO_SHAPES = [
    (1, 8, 1, 56, 8),
    (5, 72, 9, 28, 136),
    (7, 64, 13, 14, 64),
    (17, 40, 7, 7, 72),
    (60, 8, 3, 1, 8),
    (9, 16, 5, 8, 24),
]


def test_tiles_by_position_cover_every_output_and_leave_the_padding_out(c):
    rng, total, seen = random.Random(2), ctypes.c_long(), 0
    specs = [spec for spec in (*_random_specs(500), *_network_specs(64)) if takes_positions(spec)]
    for spec in specs:
        spec = replace(spec, groups=1, c=8 * rng.randint(1, 20), n=rng.randint(1, 5))
        pixels, cluster = rng.choice((128, 256)), rng.choice((1, 2))
        assert c.check_positions(_numbers(spec), 128, pixels, cluster, ctypes.byref(total)) == 0, spec
        rows, columns = (sum(box_taps(spec, axis, 1)) for axis in (0, 1))
        tiles = -(-spec.n // (pixels * cluster)) * cluster
        assert total.value == rows * columns * -(-spec.c // 64) * tiles
        seen += 1
    assert seen > 50


def test_tensors_beyond_the_l2_are_streamed_and_their_filters_kept(c):
    """(pixels, filters, outputs): 0 as all, 1 leave first, 2 leave last."""
    wanted = {
        (8, 64, 256, 1): (0, 0, 0),
        (256, 256, 64, 1): (1, 2, 1),  # pixels are read once where one tile has all filters
        (256, 64, 256, 1): (0, 2, 1),
        (256, 64, 64, 3): (0, 2, 1),  # a tap reads what another one read
        (256, 512, 16, 1): (1, 2, 0),
    }
    out = (ctypes.c_int * 3)()
    for (n, channels, filters, size), evictions in wanted.items():
        spec = conv_problem(n, channels, 56, 56, filters, size, torch.bfloat16)["conv"]
        c.evictions_of(_numbers(spec), 128, 256, out)
        assert tuple(out) == evictions, (n, channels, filters, size)


def test_a_residual_has_the_slots_that_leave_four_stages(c):
    """Else its chunks come one after the other, each after the one before has left: a basic block adds to a 3x3."""
    wanted = {
        (64, 56, 3, 64, 448): (3, 4),
        (128, 28, 3, 128, 224): (4, 4),
        (512, 7, 3, 128, 256): (2, 4),
        (512, 7, 3, 128, 128): (4, 5),
        (64, 64, 3, 64, 256): (4, 4),
        (256, 14, 1, 128, 256): (4, 3),  # four steps: all of a tile's chunks, whatever it costs
    }
    out = (ctypes.c_int * 2)()
    for (channels, side, size, filters, pixels), ring in wanted.items():
        spec = conv_problem(64, channels, side, side, channels, size, torch.bfloat16)["conv"]
        c.ring_of(_numbers(spec), filters, pixels, out)
        assert tuple(out) == ring, (channels, side, size, filters, pixels)
