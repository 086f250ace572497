"""Photographs: as many as asked for, all different, the same every time, from a folder too."""

import pytest
import torch

from fastres.bench.photographs import photographs, photographs_uint8

pytest.importorskip("skimage", reason="photographs come with scikit-image")


def test_more_images_than_sources_are_all_different_and_repeatable():
    images = photographs_uint8(20, size=32)
    assert images.shape == (20, 3, 32, 32) and images.dtype == torch.uint8
    assert len({tuple(image.flatten().tolist()) for image in images}) == 20
    assert torch.equal(images, photographs_uint8(20, size=32))
    assert not torch.equal(images, photographs_uint8(20, size=32, seed=1))


def test_normalised_images_have_imagenets_range():
    images = photographs(8, size=24)
    assert images.dtype == torch.float32
    assert -2.2 < images.min() < 0 < images.max() < 2.7


def test_a_folder_of_ones_own(tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (50, 30), (255, 0, 0)).save(tmp_path / "red.png")
    images = photographs_uint8(2, size=16, folder=tmp_path)
    assert (images[:, 0] == 255).all() and (images[:, 1:] == 0).all()


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no image"):
        photographs(1, folder=tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        photographs(1, folder=tmp_path / "nothing")
