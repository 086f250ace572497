"""Installed as a wheel, editable, or straight from a checkout: one package, whose import does little."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What must hold in every form of installation. argv: folder that fastres must come from.
IMPORTS = """
import sys
from pathlib import Path
import fastres
assert not [m for m in sys.modules if m.startswith(("fastres.backends", "fastres.graph", "fastres.plan"))]
assert not sys.modules["torch"].cuda.is_initialized(), "importing fastres starts CUDA"
assert sys.modules["torch"].ops.fastres.bn_act.default, "importing fastres registers its operators"
assert Path(fastres.__file__).resolve().parent.parent == Path(sys.argv[1]).resolve(), fastres.__file__
import fastres.backends.cpu_ops, fastres.kernels.cpu, fastres.kernels.cuda, fastres.kernels.triton
from fastres import toolchain
assert [p.name for p in toolchain.sources("cpu")], "no C++ sources"
assert (Path(next(iter(fastres.kernels.cpu.__path__))) / "vec.h").exists()
assert (Path(fastres.__file__).parent / "py.typed").exists()
assert "triton" not in sys.modules and "kernels" not in sys.modules
"""

# A fastres in a world without: imports of argv[1:] fail as if nothing were installed.
WITHOUT = """
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Nothing())
"""


def python(code: str, *args: object, cwd: Path, **environment: str) -> str:
    """Run code in a fresh interpreter outside of the checkout; what it printed."""
    env = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTEST_XDIST_WORKER")
    } | environment
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a copy of the checkout: building in the checkout would leave folders there."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "checkout"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*", "build", "_native", "*.so")
    copy.mkdir()
    for name in ("fastres", "kernels"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        folder,
        copy,
    ]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_is_pure_python_and_holds_every_kernel(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {"fastres/py.typed"}
    for top in ("fastres", "kernels"):
        for file in (ROOT / top).rglob("*"):
            if file.suffix in {".py", ".cu", ".cuh", ".cpp", ".h"} or (
                file.suffix == ".json" and "tables" in file.parts
            ):
                name = file.relative_to(ROOT).as_posix()
                wanted.add(name if top == "fastres" else f"fastres/{name}")
    wanted = {name for name in wanted if "/_native/" not in name}
    assert wanted - held == set()
    assert not [name for name in held if name.startswith(("kernels/", "tests/", "benchmarks/"))]
    assert not [name for name in held if name.endswith((".so", ".o", ".pyc"))]


def test_wheel_imports(wheel, tmp_path):
    installed = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(installed)  # what pip does with a pure wheel
    python(IMPORTS, installed, cwd=tmp_path, PYTHONPATH=str(installed))


def test_checkout_imports_uninstalled_from_its_root_and_from_elsewhere(tmp_path):
    python(IMPORTS, ROOT, cwd=ROOT)
    python(IMPORTS, ROOT, cwd=tmp_path, PYTHONPATH=str(ROOT))


def test_editable_installation_imports(tmp_path):
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("fastres", "kernels"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    site = tmp_path / "site"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-t",
        site,
        "-e",
        copy,
    ]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    # -t makes no site folder: .pth files are run by hand.
    code = f"import site; site.addsitedir({str(site)!r})\n" + IMPORTS
    python(code, copy, cwd=tmp_path, PYTHONPATH=str(site))


def test_import_makes_no_folder_starts_no_compiler_and_touches_no_gpu(tmp_path):
    code = """
import os, subprocess
import torch  # which starts processes of its own
def forbidden(*args, **kwargs):
    raise AssertionError(f"a process was started, or the GPU: {args}")
subprocess.Popen = os.system = torch.cuda._lazy_init = forbidden
import fastres
for name in dir(fastres):
    getattr(fastres, name)
import fastres.native, fastres.backends.cpu_ops
assert not torch.cuda.is_initialized()
"""
    (tmp_path / "home").mkdir()
    cache = tmp_path / "cache"
    python(code, cwd=tmp_path, HOME=str(tmp_path / "home"), XDG_CACHE_HOME=str(cache), PYTHONPATH=str(ROOT))
    assert not cache.exists() and not list((tmp_path / "home").iterdir())


@pytest.mark.parametrize(
    "missing", [["triton"], ["triton", "torchvision", "timm", "matplotlib", "ninja"]], ids=str
)
def test_import_and_every_public_name_without_optional_packages(missing, tmp_path):
    code = WITHOUT + "import fastres\nfor name in dir(fastres): getattr(fastres, name)\n"
    python(code, *missing, cwd=tmp_path, PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")


def test_without_a_compiler_there_is_a_reason(tmp_path):
    code = "from fastres import native; print(native.available('cpu'))"
    out = python(code, cwd=tmp_path, PYTHONPATH=str(ROOT), FASTRES_CACHE=str(tmp_path), PATH="/nonexistent")
    assert out.strip().startswith("no C++ compiler")
