"""Training and fine-tuning on fastres's modules."""

from .loop import Interrupted, Progress, Result, train
from .recipe import Recipe

__all__ = ["Interrupted", "Progress", "Recipe", "Result", "train"]
