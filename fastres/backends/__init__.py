"""One module a family. `load()` imports them all, which registers their candidates; what it can't has a reason."""

from __future__ import annotations

import importlib
from functools import cache

# family → the modules that register its candidates
FAMILIES = {
    "reference": ("reference",),
    "onednn": ("onednn",),
    "cpu": ("cpu",),
    "cudnn": ("cudnn",),
    "triton": ("triton_portable",),
    "hopper": ("triton_hopper",),
    "cuda": ("cuda",),
}


@cache
def load() -> dict[str, str]:
    """Registers every family's candidates; family → why it is not there (families that are have no entry)."""
    missing: dict[str, str] = {}
    for family, modules in FAMILIES.items():
        for name in modules:
            try:
                importlib.import_module(f"fastres.backends.{name}")
            except ImportError as error:
                missing[family] = f"cannot be imported: {error}"
    return missing
