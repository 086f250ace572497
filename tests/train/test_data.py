"""Data: the order and the augmentation depend on (seed, epoch, index) alone."""

import pytest
import torch
from PIL import Image

from fastres.train import Recipe, data
from fastres.train.distributed import Processes

CPU = torch.device("cpu")


def epochs(recipe, loaded, count=1, first_step=0):
    """Per process, the batches of epochs 0 and 1."""
    loaders = [data.TrainLoader(loaded, recipe, Processes(rank, count, CPU)) for rank in range(count)]
    return [[batch for e in (0, 1) for batch in loader.epoch(e, first_step)] for loader in loaders]


@pytest.fixture(scope="module")
def digits():
    return data.digits(16)


def test_digits_are_split_by_class_and_never_overlap(digits):
    train, test = digits.train.images.tensors, digits.test.tensors
    assert len(train[1]) + len(test[1]) == 1797 and len(digits.classes) == 10
    assert (torch.bincount(test[1]) - 36).abs().max() <= 1
    images = {t.numpy().tobytes() for t in train[0]}
    assert not any(t.numpy().tobytes() in images for t in test[0])


def test_the_order_and_the_augmentation_repeat_and_differ_between_epochs(digits):
    recipe = Recipe(batch=128)
    (first,), (second,) = epochs(recipe, digits), epochs(recipe, digits)
    assert all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True)
    )
    steps = len(digits.train) // 128
    assert len(first) == 2 * steps and not torch.equal(first[0][0], first[steps][0])
    (other,) = epochs(Recipe(batch=128, seed=1), digits)
    assert not torch.equal(first[0][1], other[0][1])


def test_the_process_random_state_is_left_alone(digits):
    before = torch.get_rng_state()
    epochs(Recipe(batch=256), digits)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_goes_on_from_any_step(digits):
    recipe = Recipe(batch=256)
    (whole,), (rest,) = epochs(recipe, digits), epochs(recipe, digits, first_step=3)
    steps = len(whole) // 2
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[3:steps], rest, strict=False))


def test_processes_and_parts_share_every_batch_of_one_process(digits):
    (whole,) = epochs(Recipe(batch=64), digits)
    shares = epochs(Recipe(batch=64, accumulate=2), digits, count=2)
    for step, (images, labels) in enumerate(whole[:3]):
        parts = [shares[rank][2 * step + part] for rank in range(2) for part in range(2)]
        assert torch.equal(torch.cat([p[0] for p in parts]), images)
        assert torch.equal(torch.cat([p[1] for p in parts]), labels)


def test_workers_load_the_same_batches(digits):
    batches = [next(epochs_iterator(workers, digits)) for workers in (0, 1)]
    assert torch.equal(batches[0][0], batches[1][0])


def epochs_iterator(workers, loaded):
    recipe = Recipe(batch=32, workers=workers)
    return data.TrainLoader(loaded, recipe, Processes(0, 1, CPU)).epoch(0)


def _folder(root, splits):
    for split, classes in splits.items():
        for label in classes:
            (root / split / label).mkdir(parents=True)
            for i in range(4):
                pixels = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(root / split / label / f"{i}.png")
    return root


def test_an_image_folder_gives_bytes_of_the_asked_size(tmp_path):
    loaded = data.load(Recipe(data=str(_folder(tmp_path, {"train": "ab", "val": "ab"})), size=24))
    assert loaded.classes == ("a", "b") and len(loaded.train) == 8
    for images in (loaded.train, loaded.test):
        image, label = images[5]
        assert image.shape == (3, 24, 24) and image.dtype == torch.uint8 and label == 1


def test_bad_data_is_refused_by_name(tmp_path, digits):
    with pytest.raises(ValueError, match="data: expected digits, synthetic or a folder, got 'nowhere'"):
        data.load(Recipe(data="nowhere"))
    with pytest.raises(ValueError, match="has no folder train and no folder val"):
        data.load(Recipe(data=str(tmp_path)))
    with pytest.raises(ValueError, match="train and val differ in the classes b, c"):
        data.image_folder(_folder(tmp_path, {"train": "ab", "val": "ac"}))
    with pytest.raises(ValueError, match="batch: expected a multiple of 2 processes x 3 parts, got 64"):
        data.TrainLoader(digits, Recipe(batch=64, accumulate=3), Processes(0, 2, CPU))
    with pytest.raises(ValueError, match="batch: the training set has 1437 images, got 2048"):
        data.TrainLoader(digits, Recipe(batch=2048), Processes(0, 1, CPU))
