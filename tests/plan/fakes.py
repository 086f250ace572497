"""Candidates for tests: reference arithmetic that writes into buffers, fails, or takes its time."""

import contextlib
import time
from typing import ClassVar

import fastres.backends
from fastres.backends.reference import Reference
from fastres.plan.candidate import REGISTRY, Candidate
from fastres.plan.pattern import PATTERNS

FAST, SLOW = 1e-9, 1e9


@contextlib.contextmanager
def registered(*candidates: Candidate):
    """Inside, the planner knows these candidates too."""
    fastres.backends.load()
    for candidate in candidates:
        REGISTRY.register(candidate)
    try:
        yield candidates
    finally:
        for candidate in candidates:
            del REGISTRY.candidates[candidate.name]


class Fake(Candidate):
    """Reference arithmetic under a name of its own; takes everything, for next to nothing."""

    backend = "fake"
    source = "tests"
    allocates = True

    def __init__(self, pattern, name: str = "fake", ms: float = FAST):
        self.pattern, self.name, self.ms = pattern, f"{name}.{pattern.name}", ms
        self.reference = Reference(pattern)
        self.bound = 0

    def accepts(self, problem, target):
        return None

    def estimate_ms(self, problem, target):
        return self.ms

    def prepare(self, problem, config, parameters):
        return self.reference.prepare(problem, config, parameters)

    def bind(self, problem, config, buffers, constants):
        self.bound += 1
        return self.reference.bind(problem, config, buffers, constants)


class Failing(Fake):
    """Raises `error` when it is bound, or when it is launched."""

    def __init__(self, pattern, when: str, error: Exception | None = None, **more):
        super().__init__(pattern, "failing", **more)
        self.when, self.error = when, error or RuntimeError(f"no engine for this ({when})")
        self.tried = 0

    def bind(self, problem, config, buffers, constants):
        self.tried += 1
        if self.when == "bind":
            raise self.error
        return self._raise

    def _raise(self, *inputs):
        raise self.error


class Sleeping(Fake):
    """Takes `seconds` longer."""

    def __init__(self, pattern, name: str, seconds: float):
        super().__init__(pattern, name)
        self.seconds = seconds

    def bind(self, problem, config, buffers, constants):
        launch = super().bind(problem, config, buffers, constants)

        def slept(*inputs):
            time.sleep(self.seconds)
            return launch(*inputs)

        return slept


class Writing(Fake):
    """Writes into given buffers as a GPU kernel does: through a workspace, with counters that must be zero when it
    starts and are not when it ends, and over every input that was donated."""

    allocates = False
    joins: ClassVar[list[int]] = []

    def __init__(self, pattern, join: bool = False):
        super().__init__(pattern, "writing")
        self.joins_launches = join

    def counters(self, problem, config):
        return 3

    def workspace(self, problem, config):
        return 16 + max(_bytes(problem, role) for role in problem.outputs)

    def bind(self, problem, config, buffers, constants):
        self.bound += 1
        inner = self.reference.bind(problem, config, buffers, constants)
        inputs = [buffers[name] for name in problem.inputs]
        outputs = [buffers[role] for role in problem.outputs]
        counters, workspace = buffers.counters, buffers.workspace
        written = {t.data_ptr() for t in outputs}
        assert workspace.data_ptr() % 256 == 0
        assert workspace.numel() == self.workspace(problem, config), "as many bytes as were asked for"
        assert all(t.data_ptr() % 16 == 0 for t in (*inputs, *outputs))
        assert not written & {t.data_ptr() for t in inputs}

        def launch():
            assert counters.tolist() == [0, 0, 0], "counters are zero at the start of every run"
            counters.fill_(7)
            made = inner(*inputs)
            for tensor, out in zip(made if isinstance(made, tuple) else (made,), outputs, strict=True):
                workspace.fill_(0xFF)
                scratch = workspace[: out.numel() * out.element_size()].view(out.dtype)
                scratch.copy_(
                    tensor.permute(0, 2, 3, 1).reshape(-1) if tensor.dim() == 4 else tensor.reshape(-1)
                )
                n, c, *hw = tensor.shape
                out.copy_(scratch.view(n, *hw, c).permute(0, 3, 1, 2) if hw else scratch.view(n, c))
            for name in buffers.donated:
                if buffers[name].is_floating_point():
                    buffers[name].fill_(float("nan"))

        if self.joins_launches:
            launch.join = _join
        return launch


def _join(launches):
    Writing.joins.append(len(launches))

    def run():
        for launch in launches:
            launch()

    return run


def _bytes(problem, role) -> int:
    size = problem.dtype.itemsize
    for extent in problem.output_shape(role):
        size *= extent
    return size


def writing_set(**options) -> list[Writing]:
    return [Writing(pattern, **options) for pattern in PATTERNS]
