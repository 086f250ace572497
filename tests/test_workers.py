"""Work in processes of their own: whatever becomes of a piece, every piece gets its answer."""

import subprocess
import sys
import time

import pytest
from pieces import do

from fastres import workers


@pytest.fixture
def quick(monkeypatch):
    """A process may take 20 s to start here, and need not be waited for when it ends."""
    monkeypatch.setattr(workers, "_START_S", 20.0)


def test_pieces_that_raise_crash_or_hang_have_reasons_and_the_others_their_values(quick):
    pieces = ["a", "raise", "b", "exit", "c", "hang", "d", "device", "e"]
    answers = dict(workers.ask(pieces, do, ("hello",), jobs=1, patience_s=0.5))
    assert list(answers) == pieces
    for name in "abcde":
        assert answers[name] == workers.Answer(f"hello {name}")
    assert answers["raise"].reason == "RuntimeError: no such luck"
    assert answers["exit"].reason == "its process died: exit code 3"
    assert "did not end within" in answers["hang"].reason
    assert "illegal memory access" in answers["device"].reason


def test_pieces_may_depend_on_answers_and_none_is_begun_after_the_time_is_up(quick):
    answers = []

    def pieces():
        yield "first"
        assert answers == ["hello first"]
        yield "second"
        yield "third"

    for piece, answer in workers.ask(pieces(), do, ("hello",), jobs=1, patience_s=10):
        answers.append(answer.value)
        assert piece != "third"
        if piece == "second":
            break
    begun = workers.ask(iter(["late"]), do, ("hello",), jobs=1, patience_s=10, until=time.monotonic() - 1)
    assert list(begun) == []


def test_any_program_may_have_them_and_they_end_with_it(tmp_path):
    """No guard around its main code, which a process that multiprocessing starts would run again."""
    script = tmp_path / "program.py"
    script.write_text(
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "from fastres import workers; from pieces import identify\n"
        "print('begun', flush=True)\n"
        "list(workers.ask(['come', 'stay'], identify, (), jobs=1, patience_s=60))\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as program:
        begun, pid, again = (program.stdout.readline() for _ in range(3))
        program.kill()
        killed = time.monotonic()
        # The pipe is held open by whoever is left.
        assert (begun, program.stdout.read()) == ("begun\n", "") and pid == again
    assert time.monotonic() - killed < 10


def test_what_only_the_main_program_has_is_refused(monkeypatch):
    monkeypatch.setattr(do, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "do", do, raising=False)
    with pytest.raises(ValueError, match="of the main program"):
        next(workers.ask(["a"], do, (), jobs=1, patience_s=1))


def test_where_no_python_can_be_started_it_says_so(monkeypatch):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(OSError, match="no Python to start"):
        workers.Worker(do)
