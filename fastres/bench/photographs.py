"""Photographs as input: noise is no substitute, networks answer it with almost the same logits every time."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

# Photographs in colour that lie in scikit-image's wheel: nothing is downloaded.
_SHIPPED = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "retina.jpg",
    "camera.png",
    "coins.png",
    "moon.png",
    "gravel.png",
    "grass.png",
    "brick.png",
)


def photographs(n: int, *, size: int = 224, folder: str | Path | None = None, seed: int = 0) -> Tensor:
    """`n` normalised photographs: fp32 [n, 3, size, size], ImageNet's mean and standard deviation.

    Args:
        folder: the user's own images (jpg, png, webp, bmp; searched recursively); None: scikit-image's.
        seed: of the random crops (8 % to 100 % of the area, aspect 3/4 to 4/3) and mirrorings, which make as
            many different images as are wanted out of a few.
    """
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (photographs_uint8(n, size=size, folder=folder, seed=seed).float() / 255 - mean) / std


def photographs_uint8(n: int, *, size: int = 224, folder: str | Path | None = None, seed: int = 0) -> Tensor:
    """The same before normalisation: uint8 [n, 3, size, size]."""
    sources = _load(None if folder is None else str(folder))
    generator = torch.Generator().manual_seed(seed)
    out = torch.empty(n, 3, size, size, dtype=torch.uint8)
    for i in range(n):
        crop = _random_crop(sources[i % len(sources)], generator)
        resized = F.interpolate(
            crop[None].float(), (size, size), mode="bilinear", antialias=True, align_corners=False
        )
        out[i] = resized[0].round_().clamp_(0, 255).to(torch.uint8)
    return out


def _random_crop(image: Tensor, generator: torch.Generator) -> Tensor:
    _, height, width = image.shape
    scale, aspect, top, left, mirror = torch.rand(5, generator=generator).tolist()
    area = height * width * (0.08 + 0.92 * scale)
    aspect = math.exp((2 * aspect - 1) * math.log(4 / 3))
    h = max(1, min(height, round(math.sqrt(area / aspect))))
    w = max(1, min(width, round(math.sqrt(area * aspect))))
    y, x = int(top * (height - h + 1)), int(left * (width - w + 1))
    crop = image[:, min(y, height - h) :, min(x, width - w) :][:, :h, :w]
    return crop.flip(2) if mirror < 0.5 else crop


@lru_cache(maxsize=4)
def _load(folder: str | None) -> list[Tensor]:
    try:
        import numpy
        from PIL import Image
    except ImportError as error:
        raise ImportError("photographs need Pillow: pip install 'fastres[bench]'") from error
    paths = _shipped() if folder is None else _files(Path(folder))
    images = []
    for path in paths:
        with Image.open(path) as image:
            # Larger than needed for a 224-pixel crop costs only time.
            image.thumbnail((640, 640))
            images.append(torch.from_numpy(numpy.array(image.convert("RGB"))).permute(2, 0, 1).contiguous())
    return images


def _shipped() -> list[Path]:
    try:
        import skimage
    except ImportError as error:
        raise ImportError(
            "photographs come with scikit-image: pip install 'fastres[bench]', or name a folder of images"
        ) from error
    folder = Path(skimage.__file__).parent / "data"
    paths = [folder / name for name in _SHIPPED if (folder / name).is_file()]
    if not paths:
        raise FileNotFoundError("scikit-image is installed without its photographs; name a folder of images")
    return paths


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"images: {str(folder)!r} is no folder")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"images: {str(folder)!r} holds no image ({', '.join(SUFFIXES)})")
    return paths[:512]
