"""Why an optional peer cannot take part."""

import importlib.util


def missing(package: str) -> str:
    """The reason if `package` (dots allowed) is not installed, else empty; imports its parents only."""
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        found = None
    return "" if found else f"{package} is not installed"
