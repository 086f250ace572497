"""What every kernel configuration can do: become a JSON object, and a line of text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Config:
    """Base of the frozen dataclasses that configure kernels: ints, bools and strings only."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return " ".join(
            f"{name}={int(v) if isinstance(v, bool) else v}" for name, v in self.to_dict().items()
        )


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as a JSON object; {} for the `None` of candidates that have nothing to choose."""
    return {} if config is None else asdict(config)
