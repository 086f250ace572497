"""Tests named test_triton_* run kernels in Triton's interpreter, on CPU tensors.

The interpreter is chosen when a kernel is decorated, so the variable must stand before Triton is imported:
tests/kernels/test_triton_interpreter.py runs this folder in a process that has it.
"""

import os
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if INTERPRETED:
        return
    why = "interprets kernels: test_triton_interpreter.py runs it with TRITON_INTERPRET=1"
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.name.startswith("test_triton_"):
            item.add_marker(pytest.mark.skip(reason=why))
