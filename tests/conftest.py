"""Shared by all tests: GPU tests skip with the reason, seeds are fixed, processes share the cores."""

import faulthandler
import os
import sys
import tempfile
import traceback

import pytest
import torch
from _pytest.faulthandler import fault_handler_stderr_fd_key as _STDERR

from fastres.workers import gpu_answers

# Seconds that a test on a GPU may take before its process is ended, unless its marker names others.
GPU_TEST_S = 150.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--random", type=int, help="random problems of each kernel and type on a GPU, instead of a few"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite, or folders of it, runs in as many processes as there are cores, unless told otherwise (-n 0).

    Not if files are named, since starting processes takes seconds. With a GPU they share it: compiling kernels
    takes longer than running them. A process that a kernel takes down is replaced.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # a worker runs this hook too: it must not start workers of its own
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS or all(map(os.path.isdir, config.args))
    free = getattr(config.option, "numprocesses", 0) is None and not config.option.usepdb
    if whole and free:
        # A process holds half a gigabyte of the GPU beside its tensors.
        most = 16 if torch.cuda.is_available() else 8
        config.option.numprocesses = min(len(os.sched_getaffinity(0)), most)
        config.option.dist = "worksteal"


def pytest_configure(config: pytest.Config) -> None:
    # Tests hold every kernel to fp64 themselves; test_proof.py asks for proofs.
    os.environ.setdefault("FASTRES_PROVE", "0")
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that tests start
        torch.set_num_threads(1)
    elif "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        # Inductor's cache knows an operator by its name alone: another version's shapes would be taken for this one's.
        folder = tempfile.TemporaryDirectory(prefix="fastres-inductor-", ignore_cleanup_errors=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name
        config.add_cleanup(folder.cleanup)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    why = "needs a CUDA GPU: " + ("none is visible" if torch.version.cuda else "this PyTorch has no CUDA")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """A GPU test that does not end takes its process with it: a hung kernel cannot be stopped otherwise. So does one
    after which CUDA answers nothing any more: the tests after it would all fail for it."""
    marker = item.get_closest_marker("gpu")
    if marker is None or not torch.cuda.is_available():
        return (yield)
    seconds = marker.kwargs.get("seconds", GPU_TEST_S)
    faulthandler.dump_traceback_later(seconds, exit=True, file=item.config.stash.get(_STDERR, 2))
    try:
        return (yield)
    except Exception:
        if "PYTEST_XDIST_WORKER" in os.environ and not gpu_answers():
            traceback.print_exc(file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """`threads(n)` sets PyTorch's thread count for this test alone."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
