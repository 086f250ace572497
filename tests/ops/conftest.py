"""Every op is tested on every backend of primitives that can run here."""

import pytest

from fastres import native
from fastres.ops import primitives


@pytest.fixture(params=["cpu", "torch"])
def backend(request):
    if request.param == "cpu" and (reason := native.available("cpu")):
        pytest.skip(f"no C++ kernels: {reason}")
    with primitives.pinned(request.param):
        yield request.param
