"""Builds fastattn._C: CMake and ninja compile csrc/ once for every instruction set.

torch is not a build requirement (an isolated build would download gigabytes of it): its headers are taken from the
environment that the package is being installed into. The binary uses torch's stable C ABI only and loads into every
torch >= 2.10. Without a compiler, or when the build fails, the package installs all the same and its cpu backend says
why it is not there; set FASTATTN_BUILD=require to make a failed build an error, FASTATTN_BUILD=skip to build nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
REASON = "_native_build.txt"  # beside the package's modules: why there is no _C


class BuildError(Exception):
    """One line for people."""


def find_torch() -> tuple[Path, str]:
    """The torch of the target environment: (its folder, its version).

    An isolated build runs the target environment's interpreter with another sys.path, so torch cannot be imported
    there; sysconfig still names the target's site-packages.
    """
    scheme = sysconfig.get_paths()
    for folder in dict.fromkeys([scheme["purelib"], scheme["platlib"], *sys.path]):
        torch = Path(folder or ".") / "torch"
        version_file = torch / "version.py"
        if not (torch / "include" / "torch" / "csrc" / "stable" / "library.h").exists() or not version_file.exists():
            continue
        found = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", version_file.read_text())
        version = found.group(1) if found else "0"
        numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
        if numbers < (2, 10):
            raise BuildError(f"torch {version} in {torch} is too old: fastattn needs torch >= 2.10")
        return torch, version
    raise BuildError(
        f"no torch >= 2.10 in {scheme['purelib']}: run `pip install torch` there first, then install fastattn again"
    )


class CMakeExtension(Extension):
    def __init__(self, name: str) -> None:
        # optional: setuptools then accepts that a failed build leaves no file behind
        super().__init__(name, sources=[], optional=True)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        note = target.parent / REASON
        policy = os.environ.get("FASTATTN_BUILD", "try")
        if policy not in ("try", "require", "skip"):
            raise SystemExit(f"FASTATTN_BUILD={policy} is unknown: use try, require or skip")
        try:
            if policy == "skip":
                raise BuildError("the native build was skipped (FASTATTN_BUILD=skip)")
            self.compile(target)
        except (BuildError, OSError, subprocess.CalledProcessError) as error:
            reason = str(error)
            if isinstance(error, subprocess.CalledProcessError):
                reason = f"the native build failed ({Path(error.cmd[0]).name} returned {error.returncode})"
            if policy == "require":
                raise SystemExit(f"fastattn: {reason}") from error
            target.unlink(missing_ok=True)
            note.write_text(reason + "\n")
            print(f"fastattn: no cpu kernels in this build: {reason}", file=sys.stderr)
        else:
            note.unlink(missing_ok=True)

    def compile(self, target: Path) -> None:
        import pybind11

        torch, version = find_torch()
        cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
        if cmake is None or ninja is None:
            raise BuildError("cmake and ninja are needed to compile the cpu kernels: pip install cmake ninja")
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        cache = build / "CMakeCache.txt"
        fresh = cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text()
        # ninja, pybind11 and python are named on every configure: an isolated build's are gone by the next one.
        subprocess.run(
            [
                cmake, *(["--fresh"] if fresh else []), "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
                f"-DCMAKE_MAKE_PROGRAM={ninja}",
                f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-DFASTATTN_TORCH_INCLUDE={torch / 'include'}",
                f"-DFASTATTN_TORCH_LIB={torch / 'lib'}",
                f"-DFASTATTN_TORCH_VERSION={version}",
            ],
            check=True,
        )  # fmt: skip
        jobs = os.environ.get("MAX_JOBS") or str(self.parallel or os.cpu_count() or 1)
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)
        built = sorted(build.glob("_C*" + sysconfig.get_config_var("EXT_SUFFIX").rpartition(".")[2]))
        shutil.copyfile(built[0], target)

    def copy_extensions_to_source(self) -> None:
        """An in-place build puts the result, or the reason why there is none, beside the sources."""
        source = ROOT / "fastattn"
        if os.environ.get("FASTATTN_BUILD") == "skip" and any(source.glob("_C*.so")):
            return  # what was built before is not this build's to take away
        for stale in (source / REASON, *source.glob("_C*.so")):
            stale.unlink(missing_ok=True)
        super().copy_extensions_to_source()
        note = Path(self.build_lib) / "fastattn" / REASON
        if note.exists():
            shutil.copyfile(note, source / REASON)

    def get_outputs(self) -> list[str]:
        outputs = [Path(path) for path in super().get_outputs()]
        notes = {path.parent / REASON for path in outputs}
        return [str(path) for path in [*outputs, *notes] if path.exists()]


setup(ext_modules=[CMakeExtension("fastattn._C")], cmdclass={"build_ext": CMakeBuild})
