"""What is tried first: the configuration that a network's time most likely depends on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastres.plan.candidate import REGISTRY, Candidate
from fastres.plan.planner import table_cost
from fastres.plan.problem import Problem, Target

# Each further configuration of a candidate is believed to be the best with this much less likelihood: the heuristic's
# choice comes first, and a sweep after it is in no order.
_FURTHER = 0.6


@dataclass(frozen=True)
class Trial:
    """One configuration of one candidate on one problem; `config` counts in `Candidate.configs`."""

    candidate: str
    problem: Problem
    config: int

    def choice(self, target: Target) -> Any:
        """The configuration."""
        return REGISTRY[self.candidate].configs(self.problem, target)[self.config]


def ranked(
    todo: Sequence[tuple[Problem, Sequence[Candidate]]], counts: Mapping[Problem, int], target: Target
) -> list[tuple[float, Trial]]:
    """(value, trial) of all configurations of `todo`'s candidates, the most valuable first.

    value = share x likelihood: the share of a network's predicted time, at its batch size, that the problem's layers
    take (as often as `counts` says, once where it does not); and (what the layers are believed to take otherwise / what
    the candidate is believed to take)^2, at most 1, times 0.6 for each configuration before.
    """
    predicted = {
        (problem, candidate.name): _hoped_ms(candidate, problem, target)
        for problem, candidates in todo
        for candidate in candidates
    }
    best = {p: min(predicted[p, c.name] for c in candidates) for p, candidates in todo if candidates}
    by_layer = {problem.first: ms for problem, ms in best.items() if len(problem.layers) == 1}
    # All layers apart make up the network; what covers several stands for them again.
    totals: dict[int, float] = {}
    for problem, ms in best.items():
        if len(problem.layers) == 1:
            totals[problem.n] = totals.get(problem.n, 0.0) + counts.get(problem, 1) * ms
    found = []
    for problem, candidates in todo:
        apart = sum(by_layer.get(spec, 0.0) for _, spec in problem.layers)
        otherwise = apart if len(problem.layers) > 1 and apart else best[problem]
        share = counts.get(problem, 1) * otherwise / max(totals.get(problem.n, 0.0), 1e-9)
        for candidate in candidates:
            likely = min(1.0, otherwise / max(predicted[problem, candidate.name], 1e-9)) ** 2
            for i in range(len(candidate.configs(problem, target))):
                found.append((share * likely * _FURTHER**i, Trial(candidate.name, problem, i)))
    return sorted(found, key=lambda pair: -pair[0])


def _hoped_ms(candidate: Candidate, problem: Problem, target: Target) -> float:
    """As plans believe, where something was measured; an estimate, which plans must not be flattered by, may be
    anything down to what is possible at all: the geometric mean of the two."""
    cost = table_cost(candidate, problem, target)
    if cost.kind != "estimate":
        return cost.ms
    return math.sqrt(cost.ms * min(cost.ms, candidate.least_ms(problem, target)))
