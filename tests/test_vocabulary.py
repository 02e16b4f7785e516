"""The words that kernels are written in mean the same on every instruction set: tests/native/words.cpp, run on each."""

import shutil
import subprocess
from pathlib import Path

import pytest

from fastattn import backends

ROOT = Path(__file__).resolve().parents[1]


def names():
    if backends.probe("cpu") is not None:
        return []
    return [name for name, supported, _ in backends.native_module().cpu_isas() if supported]


@pytest.mark.parametrize("name", names())
def test_every_word(name):
    trees = sorted(path.parent for path in (ROOT / "build").glob("temp*/CMakeCache.txt"))
    if not trees or shutil.which("cmake") is None:
        pytest.skip("no build tree beside the tests, or no cmake")
    subprocess.run(["cmake", "--build", trees[0], "--target", f"words_{name}"], check=True, capture_output=True)
    done = subprocess.run([trees[0] / f"words_{name}"], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("", 0), f"words that differ:\n{done.stdout}"
