"""Every kernel at a few real problems, in a minute: which are right, which are not, and how fast those are that are.

    python tests/kernels/triage.py [--device cuda] [--seconds 85] [--out FOLDER] [--import MODULE …]

Each is tried in a process of its own turn: wrong numbers, an illegal address or a hang cost one line. A line: kernel,
what came of it, its error against fp64, its time, the floor of the device, and PyTorch's own call on the same layers.
FOLDER gets triage.csv, a row as soon as it is known, and `excluded`: what FASTRES_BACKENDS leaves out the broken ones
by. PyTorch's own calls (cudnn, onednn, reference) are shown and never left out. Exit status 1: something is broken, or
nothing was tried.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Uninstalled, from wherever it is called; processes that it starts get the same path.
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]

import primitive_cases  # noqa: E402
import torch  # noqa: E402
from checking import check_candidate  # noqa: E402
from problems import DISTINCT, network_problems  # noqa: E402

from fastres import ahead, backends, env, native  # noqa: E402
from fastres.ops import primitives  # noqa: E402
from fastres.plan.candidate import REGISTRY, Candidate  # noqa: E402
from fastres.plan.pattern import PATTERNS  # noqa: E402
from fastres.plan.planner import table_cost  # noqa: E402
from fastres.plan.problem import ConvSpec, Problem, Target  # noqa: E402
from fastres.plan.target import detect  # noqa: E402
from fastres.tuning.order import Trial  # noqa: E402
from fastres.tuning.tune import time_trial  # noqa: E402
from fastres.workers import Answer, ask  # noqa: E402

# What a check may take, in seconds, and a timing; kernels are compiled before.
CHECK_S, TIME_S = 25.0, 15.0
# PyTorch's own calls.
OWN = ("cudnn", "onednn", "reference")
COLUMNS = ("kernel", "verdict", "error", "ms", "floor_ms", "own_ms", "problem", "reason")


@dataclass(frozen=True)
class Piece:
    """One kernel at one problem; `planar`: inputs come contiguous. A primitive of training has no problem; PyTorch's
    arithmetic is tried on what another, `like`, is tried on."""

    kernel: str
    problem: Problem | None = None
    planar: bool = False
    like: str | None = None

    def __str__(self) -> str:
        if self.problem is None:
            return "a tensor of a residual block"
        return f"{self.problem}{' contiguous' * self.planar}"


@dataclass
class Row:
    piece: Piece
    verdict: str = "not reached"
    error: float | None = None
    ms: float | None = None
    reason: str = ""


def pieces(target: Target) -> list[Piece]:
    """Every kernel that runs here at the largest layer of each window that it takes, of a ResNet-50 in large batches
    and else in small ones; in the callers' memory order and type too, for the stem. On a CPU of small images."""
    cuda = target.kind == "cuda"
    dtype, batches, size = (torch.bfloat16, (256, 8, 1), 224) if cuda else (torch.float32, (2,), 64)
    found: list[Piece] = []
    for pattern in PATTERNS:
        for candidate in REGISTRY.for_pattern(pattern):
            if candidate.backend == "reference" or env.excluded() & {candidate.name, candidate.backend}:
                continue
            for problem in _examples(candidate, target, dtype, batches, size):
                planar = candidate.planar(problem)
                found += [
                    Piece(candidate.name, problem, order) for order in ((False, True) if planar else (False,))
                ]
    return found + [Piece(name) for name in primitive_cases.names(target.kind, dtype)]


def _examples(candidate: Candidate, target: Target, dtype: torch.dtype, batches, size: int) -> list[Problem]:
    for n in batches:
        known = [
            problem
            for normalize in (False, True)
            for problem in network_problems(candidate.pattern, ("resnet50",), n, dtype, size, normalize)
        ]
        taken = [problem for problem in known if candidate.accepts(problem, target) is None]
        if taken:
            largest = {_window(p): p for p in sorted(taken, key=lambda p: p.flops + p.bytes)}
            return list(largest.values())
    return []


def _window(problem: Problem) -> tuple:
    """What makes a kernel take another way: the window and stride of its layers, which of them are there."""
    layers = [
        (role, getattr(spec, "kernel", None), getattr(spec, "stride", None)) for role, spec in problem.layers
    ]
    return tuple(layers)


@cache
def own_calls(problem: Problem, target: Target) -> list[Piece]:
    """PyTorch's own calls for the problem's layers: one for all where there is one, else one a layer."""
    for backend in OWN[:-1]:
        for candidate in REGISTRY.candidates.values():
            if candidate.backend == backend and candidate.pattern.name == problem.pattern:
                if candidate.accepts(problem, target) is None:
                    return [Piece(candidate.name, problem)]
    convs = [(role, spec) for role, spec in problem.layers if isinstance(spec, ConvSpec)]
    if len(convs) == len(problem.layers) > 1:
        found = []
        for _, spec in convs:
            names = ("conv.x", "conv.residual") if spec.residual else ("conv.x",)
            found += own_calls(
                Problem("conv_bn_act", (("conv", spec),), problem.dtype, names, ("conv",)), target
            )
        return found
    name = f"reference.{problem.pattern}"
    return [Piece(name, problem)] if REGISTRY[name].accepts(problem, target) is None else []


def check(piece: Piece, target: Target, device: str, modules: tuple[str, ...]) -> float:
    """The relative error; AssertionError where it is more than may be."""
    begin(modules)
    if piece.problem is None:
        require(piece, target)
        return primitive_cases.check(piece.kernel, device)
    candidate, config = require(piece, target)
    return check_candidate(candidate, piece.problem, config, device, distinct=DISTINCT, planar=piece.planar)


def timed(piece: Piece, target: Target, device: str, modules: tuple[str, ...]) -> float:
    """Milliseconds, alone on the device."""
    begin(modules)
    if piece.problem is None:
        require(piece, target)
        return primitive_cases.timed(piece.kernel, device, piece.like)
    candidate, config = require(piece, target)
    number = list(candidate.configs(piece.problem, target)).index(config)
    return time_trial(Trial(piece.kernel, piece.problem, number), target, device, 0.03)


def begin(modules: tuple[str, ...]) -> None:
    backends.load()
    for module in modules:
        importlib.import_module(module)


def require(piece: Piece, target: Target) -> tuple[Candidate | None, object]:
    """(candidate, the configuration that plans would run), its native library loaded; RuntimeError: why it cannot."""
    if piece.problem is None:
        library = {b.name: b.library for b in primitives.BACKENDS}[piece.kernel.partition(".")[0]]
        candidate, reason = None, library and native.available(library)
    else:
        candidate = REGISTRY[piece.kernel]
        reason = candidate.accepts(piece.problem, target)
    if reason:
        raise RuntimeError(reason)
    return candidate, table_cost(candidate, piece.problem, target).config if candidate else None


def verdict(reason: str) -> str:
    for word, sign in (
        ("wrong", "AssertionError"),
        ("crashed", "its process died"),
        ("hung", "did not end within"),
    ):
        if sign in reason:
            return word
    return "failed" if reason else "ok"


@dataclass
class Triage:
    target: Target
    device: str
    until: float
    modules: tuple[str, ...] = ()
    out: Path | None = None
    rows: dict[Piece, Row] = field(default_factory=dict)
    own: dict[Piece, float] = field(default_factory=dict)

    def run(self) -> None:
        self.rows = {piece: Row(piece) for piece in pieces(self.target)}
        jobs = min(8, os.cpu_count() or 1) if self.target.kind == "cuda" else 1
        context = self.target, self.device, self.modules
        start = time.monotonic()
        # What a slow machine has not compiled by then is compiled where it is checked.
        seconds = self.until - start
        ahead.compile_ahead(self._compiled(), self.target, worth=1, until=start + 0.35 * seconds)
        print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
        # The last part of the time is for timing.
        until = start + 0.7 * seconds
        for piece, answer in ask(list(self.rows), check, context, jobs=jobs, patience_s=CHECK_S, until=until):
            self._told(piece, answer)
        print(f"checked by {time.monotonic() - start:.0f} s", flush=True)
        for piece, answer in ask(
            self._to_time(), timed, context, jobs=1, patience_s=TIME_S, until=self.until
        ):
            row = self.rows.get(piece)
            if row is None:
                self.own[piece] = float("nan") if answer.reason else answer.value
            elif answer.reason:
                row.verdict, row.reason = verdict(answer.reason), f"while it was timed: {answer.reason}"
            else:
                row.ms = answer.value
            self._write()
        print(f"timed by {time.monotonic() - start:.0f} s", flush=True)

    def _compiled(self) -> list[ahead.Job]:
        found = []
        for piece in self.rows:
            candidate = piece.problem and REGISTRY[piece.kernel]
            if candidate and candidate.compiles:
                planar = candidate.planar(piece.problem) if piece.planar else frozenset()
                _, config = require(piece, self.target)
                found.append(ahead.Job(piece.kernel, piece.problem, config, planar))
        return found

    def _told(self, piece: Piece, answer: Answer) -> None:
        row = self.rows[piece]
        row.verdict, row.error, row.reason = verdict(answer.reason), answer.value, answer.reason[:200]
        if row.verdict != "ok":
            print(f"{row.verdict.upper()} {piece.kernel} on {piece}: {row.reason}", flush=True)
        self._write()

    def _to_time(self) -> Iterator[Piece]:
        """What is right, each followed by PyTorch's own calls for its layers; those are compared with even where the
        weights' folding to 16 bits takes them out of a bound that is made for kernels which fold in fp32."""
        for row in list(self.rows.values()):
            if row.verdict == "ok" or (row.verdict == "wrong" and row.piece.kernel.partition(".")[0] in OWN):
                yield row.piece
                for piece in self._own_of(row.piece):
                    if piece not in self.rows and piece not in self.own:
                        self.own[piece] = float("nan")
                        yield piece

    def _own_of(self, piece: Piece) -> list[Piece]:
        if piece.problem is None:
            return [Piece(f"torch.{piece.kernel.partition('.')[2]}", like=piece.kernel)]
        return own_calls(piece.problem, self.target)

    def own_ms(self, piece: Piece) -> float | None:
        calls = self._own_of(piece)
        times = [self.rows[p].ms if p in self.rows else self.own.get(p) for p in calls]
        return sum(times) if times and all(ms is not None and ms == ms for ms in times) else None

    def floor_ms(self, piece: Piece) -> float | None:
        if piece.problem is None:
            nbytes = primitive_cases.nbytes(piece.kernel)
            return 1e3 * nbytes / self.target.bandwidth if self.target.bandwidth else None
        return self.target.floor_ms(piece.problem)

    @property
    def broken(self) -> list[str]:
        """Kernels, not PyTorch's own, that are not what they should be at some problem."""
        bad = [
            r.piece.kernel for r in self.rows.values() if r.verdict in ("wrong", "failed", "crashed", "hung")
        ]
        return [name for name in dict.fromkeys(bad) if name.partition(".")[0] not in (*OWN, "torch")]

    @property
    def tried(self) -> int:
        """Pieces of which something is known."""
        return sum(r.verdict != "not reached" for r in self.rows.values())

    def _write(self) -> None:
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "excluded").write_text(",".join(f"-{name}" for name in self.broken) + "\n")
            with open(self.out / "triage.csv", "w", newline="") as stream:
                table = csv.writer(stream)
                table.writerow(COLUMNS)
                for row in self.rows.values():
                    numbers = [row.error, row.ms, self.floor_ms(row.piece), self.own_ms(row.piece)]
                    shown = ["" if x is None else f"{x:.6g}" for x in numbers]
                    table.writerow([row.piece.kernel, row.verdict, *shown, str(row.piece), row.reason])

    def report(self) -> int:
        """Prints the table; how many kernels are broken."""
        self._write()
        print(f"{'kernel':26s} {'':11s} {'error':>8s} {'ms':>8s} {'floor':>7s} {'own':>8s}  problem")
        for row in self.rows.values():
            cells = [
                _cell(row.error, "8.1e", 8),
                _cell(row.ms, "8.4f", 8),
                _cell(self.floor_ms(row.piece), "7.4f", 7),
            ]
            cells.append(_cell(self.own_ms(row.piece), "8.4f", 8))
            what = str(row.piece) if row.verdict in ("ok", "not reached") else f"{row.piece}: {row.reason}"
            print(f"{row.piece.kernel:26s} {row.verdict:11s} {' '.join(cells)}  {what}")
        print(f"tried {self.tried} of {len(self.rows)}")
        if self.broken:
            print(f"broken: {', '.join(self.broken)}")
        return len(self.broken)


def _cell(value: float | None, form: str, width: int) -> str:
    return " " * width if value is None else format(value, form)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=85.0, help="nothing is begun after so long")
    parser.add_argument("--out", type=Path, help="folder for triage.csv and `excluded`")
    parser.add_argument("--import", dest="modules", nargs="*", default=(), help="imported first, everywhere")
    options = parser.parse_args(arguments)
    until = time.monotonic() + options.seconds
    begin(tuple(options.modules))
    if torch.device(options.device).type == "cuda":
        print(f"native: {native.available('cuda') or 'ready'}", flush=True)
    triage = Triage(
        detect(torch.device(options.device)), options.device, until, tuple(options.modules), options.out
    )
    try:
        triage.run()
    finally:
        count = triage.report()
    return int(count > 0 or not triage.tried)


if __name__ == "__main__":
    import triage  # by its name: other processes must find what they are to do

    sys.exit(triage.main(sys.argv[1:]))
