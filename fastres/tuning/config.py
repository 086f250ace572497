"""What every kernel configuration can do: become a JSON object and come back from one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from fastres.plan.candidate import Candidate
    from fastres.plan.problem import Problem, Target


@dataclass(frozen=True)
class Config:
    """Base of the frozen dataclasses that configure kernels: ints, bools and strings only."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; a ValueError where the fields are not this class's."""
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            odd = ", ".join(sorted(set(values) ^ names))
            raise ValueError(
                f"config: {cls.__name__} has the fields {', '.join(sorted(names))}; differing: {odd}"
            )
        return cls(**values)

    def __str__(self) -> str:
        return " ".join(
            f"{name}={int(v) if isinstance(v, bool) else v}" for name, v in self.to_dict().items()
        )


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as a JSON object; {} for the `None` of candidates that have nothing to choose."""
    return {} if config is None else asdict(config)


def from_dict(candidate: Candidate, problem: Problem, target: Target, values: Mapping[str, Any]) -> Any:
    """The candidate's configuration that a table holds as `values`; the heuristic's choice where that class
    has changed since, so that an old table costs speed and nothing else."""
    heuristic = candidate.configs(problem, target)[0]
    if heuristic is None:
        return None
    known = {field.name for field in fields(heuristic)}
    return type(heuristic)(**values) if set(values) == known else heuristic
