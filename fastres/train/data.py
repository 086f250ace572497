"""Data sets, augmentation, and an order of samples that does not depend on who loads them.

Every sample of every epoch has a random state of its own, from (seed, epoch, index). So the number of
workers or processes, or an interruption in the middle of an epoch, changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from .distributed import Processes
from .recipe import Recipe

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Data:
    """Items of `train` and `test` are (uint8 image [3, H, W], class); mean and std are of values in 0..1."""

    train: Dataset
    test: Dataset
    classes: tuple[str, ...]
    size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


class _Transformed(Dataset):
    def __init__(self, images: Dataset, transform: Callable[[Tensor], Tensor]):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        return self.transform(image), int(label)


class _Seeded(Dataset):
    """Items by (epoch, index)."""

    def __init__(self, images: Dataset, seed: int):
        self.images, self.seed = images, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        before = torch.get_rng_state()
        # The CPU's generator alone: torch.manual_seed would queue work for GPUs as well.
        torch.default_generator.manual_seed((self.seed * 1_000_003 + epoch) * 16_777_259 + index)
        try:
            return self.images[index]
        finally:
            torch.set_rng_state(before)


class _Batches:
    """The keys of one process's batches in one epoch."""

    def __init__(self, length: int, recipe: Recipe, processes: Processes):
        self.length, self.recipe, self.processes = length, recipe, processes
        self.epoch = self.first_step = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.length, generator=generator)
        for step in range(self.first_step, self.length // self.recipe.batch):
            batch = order[step * self.recipe.batch :][: self.recipe.batch]
            parts = batch.view(self.processes.count, self.recipe.accumulate, -1)[self.processes.rank]
            for part in parts.tolist():
                yield [(self.epoch, index) for index in part]


class TrainLoader:
    """Batches of an epoch from a step on; every step is `accumulate` batches."""

    def __init__(self, data: Data, recipe: Recipe, processes: Processes):
        parts = processes.count * recipe.accumulate
        if recipe.batch % parts:
            raise ValueError(
                f"batch: expected a multiple of {processes.count} processes x {recipe.accumulate} parts, "
                f"got {recipe.batch}"
            )
        if recipe.batch > len(data.train):
            raise ValueError(f"batch: the training set has {len(data.train)} images, got {recipe.batch}")
        self.steps = len(data.train) // recipe.batch
        self._batches = _Batches(len(data.train), recipe, processes)
        self._loader = DataLoader(
            _Seeded(data.train, recipe.seed),
            batch_sampler=self._batches,
            num_workers=recipe.workers,
            persistent_workers=recipe.workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
        )

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        self._batches.epoch, self._batches.first_step = epoch, first_step
        return iter(self._loader)


def test_loader(data: Data, recipe: Recipe, processes: Processes) -> DataLoader:
    """This process's share of the test set."""
    return DataLoader(
        torch.utils.data.Subset(data.test, range(processes.rank, len(data.test), processes.count)),
        batch_size=max(recipe.batch // processes.count, 1),
        num_workers=recipe.workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )


def load(recipe: Recipe) -> Data:
    """The data set that a recipe names. ValueError if it is none, or a folder without train/ and val/."""
    match recipe.data:
        case "digits":
            return digits(recipe.size or 32)
        case "synthetic":
            return synthetic(recipe.size or 224)
        case folder if Path(folder).is_dir():
            return image_folder(Path(folder), recipe.size or 224)
    raise ValueError(f"data: expected digits, synthetic or a folder, got {recipe.data!r}")


def digits(size: int = 32) -> Data:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, enlarged; a fifth of each class tests."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install 'fastres[train]'") from error
    from torchvision.transforms import v2

    raw = load_digits()
    images = torch.from_numpy(raw.images).unsqueeze(1).mul(255 / 16).round().to(torch.uint8)
    images = v2.functional.resize(images, [size, size], antialias=True).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(raw.target)
    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=raw.target, random_state=0)
    pixels = images[train].double() / 255
    augment = v2.RandomAffine(10, translate=(0.1, 0.1), scale=(0.9, 1.1))
    return Data(
        _Transformed(TensorDataset(images[train], labels[train]), augment),
        TensorDataset(images[test], labels[test]),
        tuple(str(d) for d in range(10)),
        size,
        (pixels.mean().item(),) * 3,
        (pixels.std().item(),) * 3,
    )


def synthetic(size: int = 224, train: int = 2048, test: int = 256, classes: int = 10) -> Data:
    """Noise around one pattern per class: for measuring speed, and easy to learn."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 256, (classes, 3, 8, 8), generator=generator, dtype=torch.uint8)

    def make(count: int) -> TensorDataset:
        labels = torch.arange(count) % classes
        images = torch.nn.functional.interpolate(patterns[labels].float(), size)
        noise = torch.randn(images.shape, generator=generator) * 64
        return TensorDataset((images + noise).clamp_(0, 255).to(torch.uint8), labels)

    return Data(make(train), make(test), tuple(str(c) for c in range(classes)), size)


def image_folder(root: Path, size: int = 224) -> Data:
    """train/CLASS/* (random resized crop, flip) and val/CLASS/* (centre crop): ImageNet's usual treatment."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    missing = [name for name in ("train", "val") if not (root / name).is_dir()]
    if missing:
        raise ValueError(f"data: {root} has no folder {' and no folder '.join(missing)}")
    crop = v2.RandomResizedCrop(size, antialias=True)
    augment = v2.Compose([v2.ToImage(), crop, v2.RandomHorizontalFlip()])
    shorter = round(size * 256 / 224)
    centre = v2.Compose([v2.ToImage(), v2.Resize(shorter, antialias=True), v2.CenterCrop(size)])
    train, test = ImageFolder(str(root / "train"), augment), ImageFolder(str(root / "val"), centre)
    if train.classes != test.classes:
        differ = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(f"data: train and val differ in the classes {', '.join(differ)}")
    return Data(train, test, tuple(train.classes), size)
