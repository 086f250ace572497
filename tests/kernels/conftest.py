"""Makes `problems` and `compile_only` importable from every folder of kernel tests."""

import sys
from pathlib import Path

if str(Path(__file__).parent) not in sys.path:
    sys.path.append(str(Path(__file__).parent))
