"""The planner: the cheapest cover of a graph by kernel calls, by dynamic programming over layer times.

The sum of layer times predicts a whole ResNet-50 within 1 % (measured on an H100 under graph replay), so
    cost(i) = min over candidates c covering nodes i … j-1 of ms(c) + cost(j)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fastres import env
from fastres.graph.ir import Graph, Node
from fastres.plan.candidate import REGISTRY, Candidate
from fastres.plan.pattern import Match
from fastres.plan.problem import Problem, Target
from fastres.plan.specs import Shapes, problem_of


@dataclass(frozen=True)
class Cost:
    """A candidate's time for a problem. `kind`: "measured" or "nearest" (tables), "now" (measured at this call),
    "prototype" (an earlier form of the kernel was measured) or "estimate" (a guess that only ranks, or a time measured
    at a batch size more than eight times away)."""

    config: Any
    ms: float
    kind: str


# what a guess must promise to be preferred to a measurement; unmeasured kernels are assumed at half of the roofline
_DOUBT = 1.5
_FAR = 8


def _doubted(total: float, cost: Cost) -> float:
    return total + (_DOUBT - 1) * cost.ms if cost.kind == "estimate" else total


CostModel = Callable[[Candidate, Problem, Target], Cost]


@dataclass
class Segment:
    """One step of a plan. Without a candidate the one node is evaluated as it is.

    `others` tells, for every other candidate of any pattern that could have begun here, its cost or why it can't run.
    """

    nodes: tuple[Node, ...]
    match: Match | None = None
    candidate: Candidate | None = None
    problem: Problem | None = None
    cost: Cost | None = None
    reason: str = ""
    others: list[tuple[str, Cost | None, str]] = field(default_factory=list)


@dataclass
class Plan:
    graph: Graph
    shapes: Shapes
    dtype: torch.dtype
    target: Target
    segments: list[Segment]
    # whether its kernels were compiled ahead of binding
    compiled: bool = False
    # (candidate name, problem) → why it must not run; None: nobody has tried
    faults: dict[tuple[str, Problem], str] | None = None

    @property
    def predicted_ms(self) -> float:
        return sum(segment.cost.ms for segment in self.segments if segment.cost is not None)


class NoCandidate(ValueError):
    """A requested backend can run no layer at all; the message gives its reasons."""


# ms added to what a requested backend leaves to PyTorch: more than any layer, so that it is left the least
_NOT_ASKED_FOR = 1e6


def table_cost(candidate: Candidate, problem: Problem, target: Target) -> Cost:
    """From the user's table, the shipped ones, else the candidate's own estimate."""
    from fastres.tuning import table

    entry = table.lookup(candidate.name, problem, target)
    configs = list(candidate.configs(problem, target))
    if entry is not None:
        wanted, ms = dict(entry.config), entry.ms
        # carried over so far, it is a guess: small grids wait, large ones stream
        far = max(entry.batch, problem.n) > _FAR * min(entry.batch, problem.n)
        kind = "estimate" if far else entry.kind
        if entry.batch != problem.n:
            ms = max(ms, candidate.least_ms(problem, target))
        for config in configs:
            if _as_dict(config) == wanted:
                return Cost(config, ms, kind)
        if not wanted:
            return Cost(configs[0], ms, kind)
    return estimated_cost(candidate, problem, target)


def estimated_cost(candidate: Candidate, problem: Problem, target: Target) -> Cost:
    configs = candidate.configs(problem, target)
    return Cost(configs[0], candidate.estimate_ms(problem, target), "estimate")


def make_plan(
    graph: Graph,
    shapes: Shapes,
    dtype: torch.dtype,
    target: Target,
    flags: tuple[str, ...] = (),
    cost_model: CostModel = table_cost,
    backends: Sequence[str] | None = None,
    dropped: dict[tuple[str, Problem], str] | None = None,
    strict: bool = True,
) -> Plan:
    """The cheapest plan.

    Args:
        backends: families asked for; None: all. What they have no kernel for is left to "reference".
        strict: raise NoCandidate if they can run no layer at all.
        dropped: (candidate name, problem) → why it failed when it ran; such pairs are left out.
    """
    return _Planner(graph, shapes, dtype, target, flags, cost_model, backends, dropped or {}).run(strict)


class _Planner:
    def __init__(self, graph, shapes, dtype, target, flags, cost_model, backends, dropped):
        self.graph, self.shapes, self.dtype, self.target, self.flags = graph, shapes, dtype, target, flags
        self.cost_model, self.backends, self.dropped = cost_model, backends, dropped
        self.users = graph.users()
        self.excluded = env.excluded()
        self.known: dict[tuple[str, Problem], tuple[Cost | None, str]] = {}

    def run(self, strict: bool) -> Plan:
        nodes = self.graph.nodes
        best: list[tuple[float, Segment | None]] = [(0.0, None)] * (len(nodes) + 1)
        for start in range(len(nodes) - 1, -1, -1):
            best[start] = self._best_from(start, best)
        segments = []
        at = 0
        while at < len(nodes):
            segment = best[at][1]
            segments.append(segment)
            at += len(segment.nodes)
        if strict:
            self._check_backends(segments)
        return Plan(self.graph, self.shapes, self.dtype, self.target, segments)

    def _best_from(self, start: int, best) -> tuple[float, Segment]:
        nodes = self.graph.nodes
        options: list[tuple[float, Segment]] = []
        others: list[tuple[str, Cost | None, str]] = []
        for pattern in REGISTRY.patterns():
            for match in pattern.matches(nodes, start, self.users):
                problem = problem_of(match, self.shapes, self.dtype, self.flags)
                if problem is None:
                    continue
                for candidate in REGISTRY.for_pattern(pattern):
                    cost, reason = self._cost(candidate, problem)
                    others.append((candidate.name, cost, reason))
                    if cost is not None:
                        covered = nodes[start : match.stop]
                        segment = Segment(tuple(covered), match, candidate, problem, cost)
                        extra = 0.0 if self._asked_for(candidate) else _NOT_ASKED_FOR
                        options.append((cost.ms + extra + best[match.stop][0], segment))
        if any(segment.cost.kind != "estimate" for _, segment in options):
            options = [(_doubted(total, segment.cost), segment) for total, segment in options]
        if options:
            total, segment = min(options, key=lambda option: option[0])
            segment.others = others
            return total, segment
        return best[start + 1][0], Segment((nodes[start],), reason=self.shapes.reasons[start], others=others)

    def _asked_for(self, candidate: Candidate) -> bool:
        return self.backends is None or candidate.backend in self.backends

    def _check_backends(self, segments: list[Segment]) -> None:
        if self.backends is None or any(
            s.candidate is not None and self._asked_for(s.candidate) for s in segments
        ):
            return
        reasons = [
            f"{name}: {reason}"
            for segment in segments
            for name, _, reason in segment.others
            if self._asked_for(REGISTRY[name]) and reason
        ]
        if reasons:
            why = "; ".join(dict.fromkeys(reasons))
            raise NoCandidate(f"backend {'/'.join(self.backends)} can run no layer of this network: {why}")

    def _cost(self, candidate: Candidate, problem: Problem) -> tuple[Cost | None, str]:
        key = (candidate.name, problem)
        if key not in self.known:
            self.known[key] = self._ask(candidate, problem)
        return self.known[key]

    def _ask(self, candidate: Candidate, problem: Problem) -> tuple[Cost | None, str]:
        if not self._asked_for(candidate) and candidate.backend != "reference":
            return None, "its backend was not asked for"
        if self.excluded & {candidate.backend, candidate.name}:
            return None, "FASTRES_BACKENDS leaves it out"
        reason = self.dropped.get((candidate.name, problem)) or candidate.accepts(problem, self.target)
        if reason is not None:
            return None, reason
        try:
            return self.cost_model(candidate, problem, self.target), ""
        except Exception as error:
            return None, f"{type(error).__name__}: {error}"


def _as_dict(config: Any) -> dict[str, Any]:
    return {} if config is None else asdict(config)
