"""Processes that do one piece of work after another on a GPU, so that a kernel that hangs or crashes ends one of
them and not the program that asked."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

# What ending a process may take; a hung kernel goes when the driver tears its context down.
_END_S = 15.0
# Starting one imports PyTorch and makes a CUDA context: this much comes on top of the first answer's patience.
_START_S = 60.0


@dataclass(frozen=True)
class Answer:
    """What came of a piece of work: its value, or the reason why there is none."""

    value: Any = None
    reason: str = ""


def ask(
    pieces: Iterable[Any],
    work: Callable[..., Any],
    context: tuple,
    *,
    jobs: int,
    patience_s: float,
    until: float = float("inf"),
) -> Iterator[tuple[Any, Answer]]:
    """`work(piece, *context)` of every piece, in `jobs` processes, as (piece, Answer) in order of completion.

    Pieces are drawn from the iterable one by one, when a process is free for them: it may depend on the answers
    so far. A piece without an answer after `patience_s` seconds loses its process. After `until`
    (time.monotonic) no piece is drawn any more. `work` and `context` must pickle.
    """
    source, busy = iter(pieces), {}
    try:
        # Processes start when there is a piece for them.
        while True:
            while len(busy) < jobs and (piece := _draw(source, until)) is not None:
                process = _Process(work, context)
                process.give(piece, patience_s + _START_S)
                busy[process.connection] = process
            if not busy:
                return
            for connection in wait(list(busy), timeout=0.5):
                process = busy[connection]
                done, answer = process.piece, process.answer()
                yield done, answer
                # Drawn only now: it may depend on what was just told.
                following = _draw(source, until) if process.alive else None
                if following is None:
                    del busy[connection]
                    process.end()
                else:
                    process.give(following, patience_s)
            for process in [p for p in busy.values() if time.monotonic() > p.limit]:
                del busy[process.connection]
                process.end(kill=True)
                yield process.piece, Answer(reason=f"it did not end within {patience_s:.0f} s")
    finally:
        for process in busy.values():
            process.end(kill=True)


def _draw(source: Iterator[Any], until: float) -> Any:
    return next(source, None) if time.monotonic() < until else None


class _Process:
    def __init__(self, work: Callable[..., Any], context: tuple):
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(theirs, work, context), daemon=True)
        self.process.start()
        theirs.close()
        self.alive = True

    def give(self, piece: Any, patience_s: float) -> None:
        self.piece, self.limit = piece, time.monotonic() + patience_s
        # One that has died meanwhile is found out when its answer is read.
        with contextlib.suppress(BrokenPipeError):
            self.connection.send(piece)

    def answer(self) -> Answer:
        try:
            answer, self.alive = self.connection.recv()
        except EOFError:
            self.process.join(_END_S)
            self.alive = False
            answer = Answer(reason=f"its process ended with exit code {self.process.exitcode}")
        return answer

    def end(self, kill: bool = False) -> None:
        if kill:
            self.process.kill()
        self.connection.close()
        self.process.join(_END_S)


def _serve(connection: Connection, work: Callable[..., Any], context: tuple) -> None:
    """Answers every piece with (Answer, whether this process can go on)."""
    alive = True
    while alive:
        try:
            piece = connection.recv()
        except EOFError:  # nobody asks any more
            return
        try:
            answer = Answer(work(piece, *context))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            answer = Answer(reason=reason)
            # An error of the device takes the process's CUDA context with it.
            alive = "CUDA error" not in reason and "Triton Error [CUDA]" not in reason
        connection.send((answer, alive))
