"""benchmarks/ is not installed, it stands in the checkout.

One thread, because nothing here measures speed, and on busy cores two threads wait for each other.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)
