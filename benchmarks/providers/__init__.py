"""The peers. One file a family; a provider turns a subject into a call, or says why it cannot.

To add one: subclass `Provider` in a new file, add an instance to its `PROVIDERS`, add the file to `_FILES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from fnmatch import fnmatch

from benchmarks.providers.base import Provider

# The order of tables. The first is what speed-ups refer to.
_FILES = (
    "eager",
    "compiled",
    "cudnn_fused",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "apex",
    "ours",
)
BASELINE = "eager channels_last"


def providers(select: Sequence[str] = ()) -> list[Provider]:
    """All providers, or those whose name matches one of the patterns in `select` ("fastres*", "eager NCHW").

    Raises:
        ValueError: for a pattern that matches none.
    """
    known = [
        provider
        for name in _FILES
        for provider in importlib.import_module(f"benchmarks.providers.{name}").PROVIDERS
    ]
    if not select:
        return known
    for pattern in select:
        if not any(fnmatch(provider.name, pattern) for provider in known):
            names = ", ".join(provider.name for provider in known)
            raise ValueError(f"providers: {pattern!r} matches none of: {names}")
    return [p for p in known if p.name == BASELINE or any(fnmatch(p.name, s) for s in select)]
