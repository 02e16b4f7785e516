"""tune_allocator: what it changes, what it leaves alone, what it says. In processes of their own: it is for good."""

import json
import os
import platform
import shutil
import subprocess
import sys

import pytest

import fastattn
from fastattn import allocator

GLIBC = platform.libc_ver()[0] == "glibc"
FAULTS = """
import json, resource, torch, fastattn

def faults():
    x = torch.ones(12_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        del x
        x = torch.ones(12_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

untouched = faults()
tunings = [fastattn.tune_allocator() for _ in range(2)]
after = [faults() for _ in range(4)][-1]  # the heap has grown to what the program needs
print(json.dumps({"before": untouched, "after": after, "tuned": list(map(bool, tunings)), "what": str(tunings[1])}))
"""


def run(code, **environment):
    process = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return json.loads(process.stdout)


@pytest.mark.skipif(not GLIBC, reason="only glibc's malloc can be tuned")
def test_large_tensors_stop_faulting(skip_without_native):
    found = run(FAULTS)
    assert found["tuned"] == [True, True]
    assert found["before"] > 5 * 10_000  # importing and computing have left malloc as it was
    assert found["after"] < 1_000
    assert found["what"].startswith("glibc: blocks below 1 GiB")


@pytest.mark.skipif(not GLIBC or shutil.which("cc") is None, reason="needs glibc and a C compiler")
def test_another_malloc_is_left_alone(tmp_path, skip_without_native):
    source, library = tmp_path / "other.c", tmp_path / "libothermalloc.so"
    source.write_text(
        "#include <stddef.h>\nvoid* __libc_malloc(size_t);\nvoid* malloc(size_t n) { return __libc_malloc(n); }\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-fno-builtin", source, "-o", library], check=True)
    found = run(FAULTS, LD_PRELOAD=str(library))
    assert found["tuned"] == [False, False]
    assert found["what"] == "malloc is libothermalloc.so's and not glibc's: nothing was set"
    assert found["after"] > 5 * 10_000


def test_the_answer_reads_as_a_truth_value_and_as_text():
    assert allocator.AllocatorTuning(True, "done")
    assert not allocator.AllocatorTuning(False, "why not")
    assert str(fastattn.AllocatorTuning(False, "why not")) == "why not"


@pytest.mark.parametrize("chosen", ["tuned", "default"])
def test_commands_tune_unless_told_not_to(monkeypatch, chosen, capsys, tmp_path):
    from fastattn.cli import main

    calls = []
    monkeypatch.setattr(allocator, "tune_allocator", lambda: calls.append("tuned"))
    assert main(["generate", "--checkpoint", str(tmp_path), "--allocator", chosen]) == 2
    assert calls == ([chosen] if chosen == "tuned" else [])
