"""`device`: where a kernel test runs: "cpu", in the emulator, and "cuda" where there is a GPU."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import emulated

_SCHEDULES = [pytest.param(value, id=f"emulated, {name}") for name, value in emulated.SCHEDULES.items()]


def _device(param) -> str:
    if param == "cuda":
        from fastres import native

        reason = native.available("cuda")
        assert reason is None, f"there is a GPU, but no CUDA library: {reason}"
        return "cuda"
    emulated.schedule(*param)
    return "cpu"


_CUDA = pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=[_SCHEDULES[-1], _CUDA])
def device(request: pytest.FixtureRequest) -> str:
    return _device(request.param)


@pytest.fixture(params=[*_SCHEDULES, _CUDA])
def every_schedule(request: pytest.FixtureRequest) -> str:
    """As `device`, and in the emulator once for every order of threads and time of asynchronous copies."""
    return _device(request.param)
