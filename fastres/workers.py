"""Processes that work for this one: what crashes, hangs or loses its GPU ends one of them, and it is replaced.

They are started by executing Python anew, not by multiprocessing: the program's main module is not imported again, so
that any program may have them at any time, with CUDA initialised, with threads, and without a guard around its main
code. They end with the process that started them, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.spawn import get_executable
from typing import Any

# What ending a process may take; a hung kernel goes when the driver tears its context down.
_END_S = 15.0
# What starting one may take, which imports PyTorch; the patience for its answers counts from then on.
_START_S = 60.0

_BOOT = (
    "import sys; from multiprocessing.connection import Connection; c = Connection({}); "
    "sys.path[:] = c.recv(); from fastres.workers import _main; _main(c)"
)


class Worker:
    """A process that runs `serve(connection, *arguments)`; both must pickle, and be importable there by name.

    Attributes:
        connection: the other end of the one that `serve` is given; EOFError or OSError when the process has died.
    """

    def __init__(self, serve: Callable[..., None], *arguments: Any):
        what = pickle.dumps((os.getpid(), serve, arguments))
        if b"__main__" in what:
            raise ValueError(
                f"serve: {arguments or serve} is of the main program, which is not run again there"
            )
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [_python(), "-c", _BOOT.format(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # its compilers, children of its own, are ended with it
            )
        self.connection = Connection(ours.detach())
        # One that has died meanwhile is found out when its answer is read.
        with contextlib.suppress(OSError):
            self.connection.send(sys.path)
            self.connection.send_bytes(what)

    def end(self, grace_s: float = 0.0) -> None:
        """Ends it, after `grace_s` seconds in which it may end by itself because its connection is closed."""
        self.connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)

    def how_it_died(self) -> str:
        """What became of one whose connection broke: "SIGSEGV", "exit code 3"."""
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return "it closed its connection"
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _python() -> str:
    """The interpreter; raises OSError where this process is none (a program that embeds or freezes Python)."""
    found = os.fsdecode(get_executable() or "")
    if getattr(sys, "frozen", False) or not os.path.basename(found).startswith(("python", "pypy")):
        raise OSError(f"no Python to start: sys.executable is {found!r}")
    return found


def _main(connection: Connection) -> None:
    parent, serve, arguments = pickle.loads(connection.recv_bytes())
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    serve(connection, *arguments)


def _end_with(parent: int) -> None:
    """A process that hangs does not outlive the one that watches it."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def gpu_answers(device: Any = None) -> bool:
    """Whether CUDA does, in this process: an illegal access or a failed assertion in a kernel ends it for good."""
    import torch

    try:
        torch.cuda.synchronize(device)
    except Exception:
        return False
    return True


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
    so far. A piece without an answer after `patience_s` seconds loses its process, and so does one whose error leaves
    the process without its GPU. After `until` (time.monotonic) no piece is drawn any more. `work`, `context`, pieces
    and values must pickle.
    """
    source, busy = iter(pieces), {}
    try:
        # Processes start when there is a piece for them.
        while True:
            while len(busy) < jobs and (piece := _draw(source, until)) is not None:
                worker = _Asked(work, context, patience_s)
                worker.give(piece)
                busy[worker.connection] = worker
            if not busy:
                return
            for connection in wait(list(busy), timeout=0.5):
                worker = busy[connection]
                done, answer = worker.piece, worker.answer()
                if answer is None:
                    continue
                yield done, answer
                # Drawn only now: it may depend on what was just told.
                following = _draw(source, until) if worker.alive else None
                if following is None:
                    del busy[connection]
                    worker.end()
                else:
                    worker.give(following)
            for worker in [w for w in busy.values() if time.monotonic() > w.limit]:
                del busy[worker.connection]
                worker.end()
                what = f"end within {patience_s:.0f}" if worker.started else f"start within {_START_S:.0f}"
                yield worker.piece, Answer(reason=f"it did not {what} s")
    finally:
        for worker in busy.values():
            worker.end()


def _draw(source: Iterator[Any], until: float) -> Any:
    return next(source, None) if time.monotonic() < until else None


class _Asked(Worker):
    """A worker with at most one piece of work."""

    def __init__(self, work: Callable[..., Any], context: tuple, patience_s: float):
        super().__init__(_answer, work, context)
        self.alive, self.started, self.patience_s = True, False, patience_s

    def give(self, piece: Any) -> None:
        self.piece = piece
        self.limit = time.monotonic() + (self.patience_s if self.started else _START_S)
        with contextlib.suppress(OSError):
            self.connection.send(piece)

    def answer(self) -> Answer | None:
        """None where it only said that it has started."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            self.alive = False
            return Answer(reason=f"its process died: {self.how_it_died()}")
        if message is None:
            self.started, self.limit = True, time.monotonic() + self.patience_s
            return None
        answer, self.alive = message
        return answer


def _answer(connection: Connection, work: Callable[..., Any], context: tuple) -> None:
    """Answers every piece with (Answer, whether this process can go on); None first, when it has started."""
    connection.send(None)
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
            alive = not _of_the_device(reason)
        connection.send((answer, alive))


def _of_the_device(reason: str) -> bool:
    import torch

    if "CUDA error" in reason or "Triton Error [CUDA]" in reason:
        return True
    return torch.cuda.is_initialized() and not gpu_answers()
