"""The loader: what it finds, what it builds, and that it always has a reason instead of an exception."""

import json
import multiprocessing
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fastres import env, native, toolchain

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")

# A small stand-in for the real sources: the loader does not care what it compiles, and this takes a second.
ANSWER = """
#include <torch/csrc/stable/library.h>
int64_t answer() { return 42; }
STABLE_TORCH_LIBRARY(fastres_stand_in, m) { m.def("answer() -> int"); }
STABLE_TORCH_LIBRARY_IMPL(fastres_stand_in, CompositeExplicitAutograd, m) {
  m.impl("answer", TORCH_BOX(&answer));
}
"""


@pytest.mark.parametrize("name", toolchain.TARGETS)
def test_sources_use_no_macro_that_only_newer_headers_have(name):
    """torch 2.11 has TORCH_ERROR_CODE_CHECK alone; the other one is there whatever version is asked for."""
    assert not [p.name for p in toolchain.sources(name) if "STABLE_TORCH_ERROR_CODE_CHECK" in p.read_text()]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package folder of its own with the stand-in as its CPU sources, and an empty cache."""
    folder = tmp_path / "package"
    (folder / "kernels" / "cpu").mkdir(parents=True)
    (folder / "kernels" / "cpu" / "answer.cpp").write_text(ANSWER)
    for module in (native, toolchain):
        monkeypatch.setattr(module, "PACKAGE", folder)
    monkeypatch.setattr(native, "_outcomes", {})
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.delenv("FASTRES_BUILD", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    return folder


def fake_compiler(folder: Path, body: str) -> str:
    """A program that answers --version as a compiler does and otherwise runs `body`."""
    path = folder / "fake-c++"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && {{ echo fake 1.0; exit 0; }}\n{body}\n')
    path.chmod(0o755)
    return str(path)


def in_tests(target, count):
    """Run `target` in fresh processes at the same time; what they return."""
    with multiprocessing.get_context("fork").Pool(count) as pool:
        return pool.map(target, range(count))


@needs_compiler
def test_builds_once_and_then_finds_it(package):
    first = native.build("cpu")
    stamp = first.stat().st_mtime_ns
    assert native.build("cpu") == first and first.stat().st_mtime_ns == stamp
    assert first.is_relative_to(env.cache_dir()) and (first.parent / "build.log").exists()
    assert not list(first.parent.glob("*.o"))


def test_key_changes_with_sources_flags_compiler_and_arch(package, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "true"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    shutil.copy(tmp_path / "fake-c++", tmp_path / "bin" / "nvcc")
    keys = [toolchain.Recipe("cpu", (), portable=False).key, toolchain.Recipe("cpu", (), portable=True).key]
    (package / "kernels" / "cpu" / "more.h").write_text("// a header counts")
    keys.append(toolchain.Recipe("cpu", (), portable=False).key)
    (tmp_path / "fake-c++").write_text((tmp_path / "fake-c++").read_text().replace("1.0", "1.1"))
    keys.append(toolchain.Recipe("cpu", (), portable=False).key)
    monkeypatch.setattr(toolchain, "cpu_flags", lambda: frozenset({"sse2"}))
    keys.append(toolchain.Recipe("cpu", (), portable=False).key)
    monkeypatch.setattr(toolchain.torch, "__version__", "2.99.0")
    keys.append(toolchain.Recipe("cpu", (), portable=False).key)
    shutil.copytree(package / "kernels" / "cpu", package / "kernels" / "cuda")
    keys.append(toolchain.Recipe("cuda", ("8.0",), portable=False).key)
    keys.append(toolchain.Recipe("cuda", ("9.0a",), portable=False).key)
    assert len(set(keys)) == len(keys) == 8
    assert toolchain.Recipe("cuda", ("9.0a",), portable=False).key == keys[-1]


@needs_compiler
def test_processes_that_come_at_once_share_one_build(package, tmp_path, monkeypatch):
    real = shutil.which("c++")
    calls = tmp_path / "calls"
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, f'echo x >> {calls}; sleep 0.3; exec {real} "$@"'))
    paths = in_tests(_build_path, 3)
    assert len(set(paths)) == 1 and Path(paths[0]).exists()
    assert calls.read_text().count("x") == 2, "one compile and one link"


def _build_path(_):
    return str(native.build("cpu"))


@needs_compiler
def test_a_build_that_was_killed_leaves_nothing_to_load_and_is_done_again(package, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "kill -9 $TEST_VICTIM; sleep 5"))
    pid = os.fork()
    if pid == 0:
        os.environ["TEST_VICTIM"] = str(os.getpid())
        native.build("cpu")
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    root = env.cache_dir() / "native"
    left = [p for p in root.iterdir() if p.is_dir()]
    assert len(left) == 1 and left[0].name.startswith("."), "only the temporary folder"
    # The same key, now with a compiler that works: the lock died with its owner.
    (tmp_path / "fake-c++").write_text(
        (tmp_path / "fake-c++")
        .read_text()
        .replace("kill -9 $TEST_VICTIM; sleep 5", f'exec {shutil.which("c++")} "$@"')
    )
    assert native.build("cpu").exists()
    assert [p for p in root.iterdir() if p.name.startswith(".")] == []


def test_missing_compiler_is_a_reason(package, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert native.available("cpu") == "no C++ compiler (c++, g++, clang++)"
    native._outcomes.clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native.available("cpu") == "no C++ compiler (CXX=no-such-compiler is not there)"


def test_broken_compiler_is_a_reason_with_its_first_complaint(package, tmp_path, monkeypatch):
    complaint = "echo 'answer.cpp:1: note: hm'; echo 'answer.cpp:2: fatal error: no torch'; exit 1"
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, complaint))
    assert re.search(r"fake-c\+\+ fails: answer.cpp:2: fatal error: no torch$", native.available("cpu"))
    native._outcomes.clear()
    (tmp_path / "fake-c++").write_text("#!/bin/sh\necho cannot load shared objects >&2\nexit 127\n")
    assert native.available("cpu").endswith("--version fails: cannot load shared objects")


def test_a_library_that_does_not_load_is_a_reason(package, tmp_path, monkeypatch):
    write_rubbish = 'while [ "$1" != -o ]; do shift; done; echo rubbish > "$2"'
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, write_rubbish))
    assert "fastres_cpu.so" in native.available("cpu")


def test_missing_nvcc_is_a_reason(package, tmp_path, monkeypatch):
    shutil.copytree(package / "kernels" / "cpu", package / "kernels" / "cuda")
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "true"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    with pytest.raises(native.BuildError, match=r"no nvcc in .*nowhere"):
        native.build("cuda", ("8.0",))


def test_cuda_without_gpu_or_arch_is_a_reason(package, tmp_path, monkeypatch):
    monkeypatch.setattr(native.torch.cuda, "is_available", lambda: False)
    assert native.available("cuda") == "no CUDA GPU is visible"
    shutil.copytree(package / "kernels" / "cpu", package / "kernels" / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "true"))
    monkeypatch.delenv("FASTRES_CUDA_ARCH", raising=False)
    (tmp_path / "bin").mkdir()
    shutil.copy(tmp_path / "fake-c++", tmp_path / "bin" / "nvcc")
    with pytest.raises(native.BuildError, match="no CUDA architecture given"):
        native.build("cuda")
    with pytest.raises(ValueError, match="arch is 'sm_90', it takes the form"):
        native.build("cuda", ("sm_90",))


def test_gencode_adds_ptx_of_the_lowest_plain_arch_and_sm90_sources_skip_the_others():
    assert toolchain._gencode(["8.0", "9.0a"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_80,code=compute_80",
    ]
    assert toolchain._arch_for(Path("sm90_conv.cu"), ("8.0", "9.0a")) == ["9.0a"]
    assert toolchain._arch_for(Path("any_add.cu"), ("8.0", "9.0a")) == ("8.0", "9.0a")


@needs_compiler
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only folders")
def test_read_only_cache_falls_back_to_the_temporary_folder(package, tmp_path):
    (tmp_path / "cache").mkdir(mode=0o500)
    assert native.build("cpu").is_relative_to(tmp_path / "tmp")


@needs_compiler
def test_a_cache_that_cannot_be_made_falls_back_to_a_temporary_folder_of_ours(package, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder should be")
    library = native.build("cpu")
    root = library.parent.parent
    assert root.parent == tmp_path / "tmp" and stat.S_IMODE(root.stat().st_mode) == 0o700
    assert native.build("cpu") == library
    # Somebody else could have put a library there: it is not loaded, and the reason says so.
    root.chmod(0o777)
    assert re.search("no folder to build in: .*cache.*; others may write to", native.available("cpu"))


def test_fastres_build_0_runs_no_compiler(package, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, f"touch {tmp_path}/ran; exit 1"))
    monkeypatch.setenv("FASTRES_BUILD", "0")
    assert native.available("cpu") == "not built yet, and FASTRES_BUILD=0 forbids to build it"
    assert not (tmp_path / "ran").exists() and not (tmp_path / "cache").exists()
    native._outcomes.clear()
    monkeypatch.setenv("FASTRES_BUILD", "never")
    assert native.available("cpu") == "FASTRES_BUILD is 'never', it takes 0 or 1"


@needs_compiler
def test_prebuilt_comes_first_unless_its_sources_or_cpu_differ(package, monkeypatch):
    out = native.build("cpu", out=package / "_native")
    assert out == package / "_native" / "fastres_cpu.so"
    assert native.find("cpu") == out
    about = json.loads(out.with_suffix(".json").read_text())
    assert {"avx2", "fma"} <= set(about["cpu_flags"]), "a library for other machines says what they need"
    monkeypatch.setattr(native, "cpu_flags", lambda: frozenset({"sse2"}))
    assert native._prebuilt("cpu") == (None, "this CPU lacks avx2 fma f16c bmi2")
    monkeypatch.undo()
    assert native._prebuilt("cpu") == (None, None), "the real package has none"


def test_a_prebuilt_library_that_cannot_be_loaded_is_built_anew(package, monkeypatch, caplog):
    prebuilt, built, loaded = package / "_native" / "fastres_cpu.so", package / "built.so", []

    def load(path):
        if path == str(prebuilt):
            raise OSError("GLIBC_9.9 not found")
        loaded.append(path)

    monkeypatch.setattr(native.torch.ops, "load_library", load)
    monkeypatch.setattr(native, "_prebuilt", lambda name: (prebuilt, None))
    monkeypatch.setattr(native, "build", lambda name: built)
    assert native.available("cpu") is None and loaded == [str(built)]
    assert "prebuilt cpu library passed over: GLIBC_9.9 not found" in caplog.text


@pytest.mark.parametrize(
    ("gpu", "arch", "runs"),
    [
        ((9, 0), ["8.0", "9.0a"], True),
        ((9, 0), ["8.0"], True),
        ((8, 6), ["8.0"], True),
        ((10, 0), ["8.0", "9.0a"], True),  # the PTX of 8.0
        ((7, 5), ["8.0", "9.0a"], False),
        ((8, 0), ["9.0a"], False),
        ((10, 0), ["9.0a"], False),
    ],
)
def test_a_prebuilt_cuda_library_needs_code_for_the_gpu(package, monkeypatch, gpu, arch, runs):
    shutil.copytree(package / "kernels" / "cpu", package / "kernels" / "cuda")
    library = package / "_native" / "fastres_cuda.so"
    library.parent.mkdir()
    library.touch()
    about = {"sources": toolchain.source_hash("cuda"), "arch": arch}
    library.with_suffix(".json").write_text(json.dumps(about))
    monkeypatch.setattr(native.torch.cuda, "get_device_capability", lambda: gpu)
    wanted = (library, None) if runs else (None, f"it was built for {' '.join(arch)}")
    assert native._prebuilt("cuda") == wanted


@needs_compiler
def test_prebuilt_of_other_sources_is_passed_over(package):
    native.build("cpu", out=package / "_native")
    (package / "kernels" / "cpu" / "more.h").write_text("// changed")
    assert native._prebuilt("cpu") == (None, "it was built from other sources")
    (package / "_native" / "fastres_cpu.json").unlink()
    assert "description cannot be read" in native._prebuilt("cpu")[1]


@needs_compiler
def test_threads_that_come_at_once_get_the_one_outcome_and_it_works(package):
    outcomes = []
    threads = [threading.Thread(target=lambda: outcomes.append(native.available("cpu"))) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert outcomes == [None] * 4
    assert native.torch.ops.fastres_stand_in.answer() == 42


def test_unknown_library_is_refused():
    for call in (native.available, native.build):
        with pytest.raises(ValueError, match="name is 'gpu', it takes one of cpu, cuda"):
            call("gpu")


@needs_compiler
def test_the_real_cpu_library_builds_where_a_compiler_is():
    """Without it PyTorch's own calls stand in, and every other test of it would be skipped, silently."""
    if os.environ.get("FASTRES_BUILD") == "0":
        pytest.skip("FASTRES_BUILD=0 forbids to build it")
    assert native.available("cpu") is None


@needs_compiler
def test_library_uses_the_stable_abi_alone():
    """One build must serve every torch from 2.10 on: LibTorch's C symbols, nothing of at:: or c10::."""
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", native.find("cpu")], capture_output=True, text=True
    )
    symbols = [line.split()[-1].split("@")[0] for line in listing.stdout.splitlines()]
    torchs = [s for s in symbols if "torch" in s]
    assert "aoti_torch_library_init_impl" in torchs and "torch_parallel_for" in torchs
    assert all(re.match(r"(aoti_)?torch_", s) for s in torchs)
    assert not [s for s in symbols if re.match(r"_ZN?K?\d*(2at|3c10)", s)]


def test_ptxas_report_reads_registers_and_spills():
    text = """
ptxas info    : Compiling entry function '_Z4killPf' for 'sm_90a'
ptxas info    : Function properties for _Z4killPf
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers, 8 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compiling entry function 'plain' for 'sm_80'
ptxas info    : Function properties for plain
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 0 barriers, 400 bytes cmem[0]
"""
    (first, second) = toolchain.ptxas_report(text)
    assert first[0] in ("_Z4killPf", "kill(float*)") and first[1:] == ("sm_90a", 168, 28, "1024")
    assert second == ("plain", "sm_80", 24, 0, "0")


@needs_compiler
def test_command_line_builds_ahead_of_time(package, tmp_path, capsys):
    assert native.main(["--target", "cpu", "--out", str(tmp_path / "out")]) == 0
    assert re.search(r"cpu: .*out/fastres_cpu.so \(\d+\.\d s; compiling took", capsys.readouterr().out)
    assert (tmp_path / "out" / "fastres_cpu.so").exists()
    (package / "kernels" / "cpu" / "answer.cpp").unlink()
    assert native.main(["--target", "cpu"]) == 1
    assert "no sources" in capsys.readouterr().err


def test_environment_variables_are_read_late_and_refused_by_name(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTRES_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert env.cache_dir() == tmp_path / "fastres"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert env.cache_dir() == Path("~/.cache/fastres").expanduser()
    monkeypatch.setenv("FASTRES_CACHE", "~/elsewhere")
    assert env.cache_dir() == Path("~/elsewhere").expanduser()
    monkeypatch.setenv("FASTRES_BACKENDS", " onednn, reference ,")
    assert env.backends() == ("onednn", "reference")
    monkeypatch.setenv("FASTRES_CUDA_ARCH", "8.0;9.0a")
    assert env.cuda_arch() == ("8.0", "9.0a")
    monkeypatch.setenv("FASTRES_LOG", "loud")
    with pytest.raises(ValueError, match="FASTRES_LOG is 'loud', it takes one of debug, info"):
        env.start_log()


def test_the_log_is_as_loud_as_the_environment_says():
    script = "import logging, fastres; [logging.getLogger('fastres.native').log(n, 'said %s', n) for n in (10, 20, 30)]"
    for level, loudest in (("Info", ("20", "30")), ("error", ()), ("", ("30",))):
        env_ = os.environ | {"FASTRES_LOG": level}
        done = subprocess.run(
            [sys.executable, "-c", script], env=env_, capture_output=True, text=True, check=True
        )
        said = [line.rsplit(" ", 1)[1] for line in done.stderr.splitlines() if "said" in line]
        assert said == list(loudest), (level, done.stderr)


def test_every_variable_that_the_code_reads_is_listed():
    root = Path(env.__file__).resolve().parent
    used = set()
    for file in root.rglob("*.py"):
        used |= set(re.findall(r"\bFASTRES_[A-Z0-9_]+", file.read_text()))
    assert used == set(env.VARIABLES), "fastres/env.py lists what is read"
