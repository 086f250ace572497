"""Runs tests/kernels/triton with TRITON_INTERPRET=1, in two processes' worth of files."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton", reason="Triton cannot be imported")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


if _numbers(triton.__version__) < (3, 7) and _numbers(numpy.__version__) >= (2, 5):
    reason = "Triton 3.6's interpreter takes arrays of one element for numbers, which NumPy 2.5 refuses"
    pytest.skip(reason, allow_module_level=True)

FOLDER = Path(__file__).parent / "triton"
FILES = sorted(path.name for path in FOLDER.glob("test_triton_*.py"))


@pytest.mark.parametrize("share", [0, 1])
def test_portable_kernels_in_the_interpreter(share):
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env.update(TRITON_INTERPRET="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run([*command, *FILES[share::2]], cwd=FOLDER, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]
