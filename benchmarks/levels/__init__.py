"""The levels, from a single op to a training step. Each lists its cases for a scope."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from benchmarks.case import Case
from benchmarks.scope import Scope

# The order of a run: what matters most comes first, in case time runs out.
LEVELS = ("model", "fused", "layer", "block", "op", "host", "training")


def cases(level: str, scope: Scope) -> list[Case]:
    """The cases of `level` in `scope`; nothing is built yet.

    Raises:
        ValueError: for an unknown level.
    """
    if level not in LEVELS:
        raise ValueError(f"level: got {level!r}, takes {', '.join(LEVELS)}")
    found: Sequence[Case] = importlib.import_module(f"benchmarks.levels.{level}").cases(scope)
    return list(found)
