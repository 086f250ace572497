"""Runs every CUDA kernel under compute-sanitizer: memcheck, racecheck, synccheck, initcheck.

    python tests/kernels/cuda/sanitize.py [tool …] [-- pytest arguments]

Needs a GPU and compute-sanitizer (of a CUDA toolkit) on PATH or in $CUDA_HOME/bin. The tests are those with
small problems; the build has FASTRES_CUDA_DEBUG, which bounds every wait. Exit status: the worst tool's.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
# One process: a test per process would spend its time on the start of CUDA under the tool.
SELECTION = ["-m", "gpu", "-k", "cuda and not on_a_gpu", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]


def main(arguments: list[str]) -> int:
    rest = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    tools = [a for a in arguments[: arguments.index("--")] if a] if "--" in arguments else arguments
    unknown = set(tools) - set(TOOLS)
    if unknown:
        print(f"unknown tool {', '.join(sorted(unknown))}; takes {', '.join(TOOLS)}", file=sys.stderr)
        return 2
    home = os.environ.get("CUDA_HOME", "")
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.path.join(home, "bin")
    )
    if sanitizer is None:
        print("no compute-sanitizer: it comes with a CUDA toolkit (set CUDA_HOME)", file=sys.stderr)
        return 2
    worst = 0
    for tool in tools or TOOLS:
        command = [sanitizer, f"--tool={tool}", "--error-exitcode=99", "--target-processes=all"]
        # PyTorch leaves allocations uninitialised on purpose; only what kernels of ours read counts.
        command += ["--kernel-regex", "kns=fastres"]
        command += [sys.executable, "-m", "pytest", str(FOLDER), *SELECTION, *rest]
        print(f"== {tool}", flush=True)
        done = subprocess.run(
            command, cwd=FOLDER.parents[2], env={**os.environ, "FASTRES_CUDA_DEBUG": "1"}
        ).returncode
        print(f"== {tool}: {'clean' if done == 0 else f'exit status {done}'}", flush=True)
        worst = max(worst, done)
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
