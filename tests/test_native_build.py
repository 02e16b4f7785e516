"""The binary: what it may need from torch, what its objects may export, and what happens where it is missing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastattn import backends

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(backends.__file__).parent


def nm(path: Path, *flags: str) -> list[list[str]]:
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    out = subprocess.run(["nm", *flags, str(path)], capture_output=True, text=True, check=True).stdout
    return [line.split() for line in out.splitlines()]


@pytest.mark.usefixtures("skip_without_native")
def test_torch_is_reached_through_its_stable_c_abi_only():
    library = Path(backends.native_module().__file__)
    undefined = [fields[-1].split("@")[0] for fields in nm(library, "-D", "--undefined-only")]
    from_torch = {name for name in undefined if re.search(r"torch|c10|aten", name, re.IGNORECASE)}
    assert from_torch, "the module calls nothing of torch: is this the right file?"
    mangled = sorted(name for name in from_torch if name.startswith("_Z"))
    assert not mangled, f"C++ symbols of torch, which change with every release: {mangled}"
    assert all(re.match(r"(aoti_torch|torch)_", name) for name in from_torch), sorted(from_torch)


def test_shapes_are_compared_by_name():
    """torch 2.10's headers, the oldest that must do, have no == for sizes (csrc/bindings/launch.h: same_shape)."""
    for path in sorted((ROOT / "csrc" / "bindings").glob("*.cpp")):
        assert not re.search(r"(sizes|strides)\(\) [!=]=", path.read_text()), path.name


@pytest.mark.usefixtures("skip_without_native")
def test_one_exported_symbol_for_each_op_and_instruction_set():
    objects = sorted((ROOT / "build").glob("**/fastattn_*.dir/csrc/*/cpu.cpp.o"))
    if not objects:
        pytest.skip("no build tree beside the tests")
    for path in objects:
        isa = re.search(r"fastattn_(\w+)\.dir", str(path)).group(1)
        # Capital letters are global symbols, V, W, v and w weak ones.
        exported = [f[-1] for f in nm(path, "--defined-only") if f[-2].isupper() or f[-2] in "vw"]
        assert exported == [f"fastattn_{path.parent.name}_{isa}"], path


def copy_of_the_package(folder: Path, *, note: str | None = None, broken: bool = False) -> Path:
    shutil.copytree(PACKAGE, folder / "fastattn", ignore=shutil.ignore_patterns("_C*.so", "__pycache__", "*.txt"))
    if note is not None:
        (folder / "fastattn" / "_native_build.txt").write_text(note)
    if broken:
        (folder / "fastattn" / "_C.so").write_bytes(b"this is no library")
    return folder


PROGRAM = """
import sys, torch
# An editable install would answer for fastattn._C wherever the package itself was found.
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
import fastattn
print(fastattn.explain(fastattn.softmax, torch.zeros(3), 0).reasons["cpu"])
fastattn.softmax(torch.zeros(3), 0)
print(fastattn.dispatch.served())
try:
    fastattn.softmax(torch.zeros(3), 0, backend="cpu")
except fastattn.BackendUnsupported as error:
    print(error)
"""


def lines_of(folder: Path) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FASTATTN_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_without_a_native_module_the_reference_serves(tmp_path):
    reason, served, *complaint = lines_of(copy_of_the_package(tmp_path))
    assert reason == "not built: there is no fastattn._C; install with a C++17 compiler at hand"
    assert served == "{'reference': 1}"
    assert f"  cpu: {reason}" in complaint


def test_a_failed_build_is_the_reason(tmp_path):
    reason, served, *_ = lines_of(copy_of_the_package(tmp_path, note="the native build failed (cmake returned 1)\n"))
    assert reason == "not built: the native build failed (cmake returned 1)"
    assert served == "{'reference': 1}"


def test_a_broken_module_says_so(tmp_path):
    reason, served, *_ = lines_of(copy_of_the_package(tmp_path, broken=True))
    assert reason.startswith("broken: ")
    assert served == "{'reference': 1}"


def setup_py(program: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs code that sees setup.py's names, with setuptools' own setup() out of the way."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("no setup.py beside the tests")
    prelude = "import setuptools; setuptools.setup = lambda **_: None\nexec(open('setup.py').read())\n"
    return subprocess.run(
        [sys.executable, "-c", prelude.replace("exec(", "__file__ = 'setup.py'; exec(") + program],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_headers_come_from_the_target_environments_torch():
    done = setup_py("print(*find_torch())")
    assert done.stdout.split() == [str(Path(torch.__file__).parent), torch.__version__], done.stderr


def test_no_torch_is_one_clear_line():
    done = setup_py(
        "sysconfig.get_paths = lambda: {'purelib': '/nowhere', 'platlib': '/nowhere'}; sys.path = []\n"
        "try: find_torch()\nexcept BuildError as error: print(error)"
    )
    assert done.stdout.strip() == (
        "no torch >= 2.10 in /nowhere: run `pip install torch` there first, then install fastattn again"
    )


def test_an_old_torch_is_one_clear_line(tmp_path):
    header = tmp_path / "torch" / "include" / "torch" / "csrc" / "stable" / "library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    done = setup_py(
        f"sysconfig.get_paths = lambda: {{'purelib': {str(tmp_path)!r}, 'platlib': ''}}\n"
        "try: find_torch()\nexcept BuildError as error: print(error)"
    )
    assert done.stdout.strip() == f"torch 2.9.1+cpu in {tmp_path / 'torch'} is too old: fastattn needs torch >= 2.10"


def test_unknown_build_policies_are_refused():
    done = setup_py(
        "from setuptools import Distribution\n"
        "command = CMakeBuild(Distribution({'ext_modules': [CMakeExtension('fastattn._C')]}))\n"
        "command.ensure_finalized(); command.build_extension(command.extensions[0])",
        FASTATTN_BUILD="maybe",
    )
    assert "FASTATTN_BUILD=maybe is unknown: use try, require or skip" in done.stderr
    assert done.returncode != 0


@pytest.mark.parametrize("before", [True, False])
def test_a_skipped_build_leaves_what_was_built(tmp_path, before):
    """As when something is installed into an environment that has the kernels: pip install -e ".[extra]"."""
    module, note = tmp_path / "fastattn" / "_C.any.so", tmp_path / "fastattn" / "_native_build.txt"
    module.parent.mkdir()
    if before:
        module.touch()
    done = setup_py(
        f"ROOT = Path({str(tmp_path)!r}); os.chdir(ROOT)\n"
        "from setuptools import Distribution\n"
        "command = CMakeBuild(Distribution({'ext_modules': [CMakeExtension('fastattn._C')]}))\n"
        "command.inplace, command.build_lib, command.build_temp = True, 'lib', 'temp'\n"
        "command.ensure_finalized(); command.run()",
        FASTATTN_BUILD="skip",
    )
    assert done.returncode == 0, done.stderr
    assert module.exists() == before and note.exists() != before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_way_to_install(tmp_path):
    """pip install, a second pip install, and an editable one, isolated as people run them."""
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in tracked.stdout.splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    purelib = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    ).stdout.strip()
    # This environment's torch, linked and not copied: it is gigabytes.
    for package in Path(torch.__file__).parents[1].iterdir():
        if not re.match(r"(fastattn|__editable__|pip|setuptools|_distutils|pkg_resources|distutils)", package.name):
            (Path(purelib) / package.name).symlink_to(package)

    def isa() -> str:
        program = "import fastattn; print(fastattn.backends.cpu_isa())"
        return subprocess.run(
            [str(python), "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()

    for arguments in ([], ["--force-reinstall"], ["-e"]):
        subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", *arguments, str(source)], check=True)
        assert isa() == backends.cpu_isa(), arguments
