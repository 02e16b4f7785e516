"""Which instruction set runs, and who decides: every one that the machine has, each in a process of its own."""

import os
import subprocess
import sys

import pytest

from fastattn import backends

pytestmark = pytest.mark.usefixtures("skip_without_native")

PROGRAM = """
import torch, fastattn
q, k, v = (torch.randn(2, 3, 37, 24, generator=torch.Generator().manual_seed(i)) for i in range(3))
out = fastattn.scaled_dot_product_attention(q, k, v, is_causal=True, backend="cpu")
error = (out - torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)).abs().max()
assert error < 1e-5, error
print(fastattn.backends.cpu_isa(), fastattn.dispatch.served())
"""


def run(isa: str | None) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "FASTATTN_CPU_ISA"}
    if isa is not None:
        environment["FASTATTN_CPU_ISA"] = isa
    return subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120)


def isas() -> list[tuple[str, bool, str]]:
    return backends.native_module().cpu_isas() if backends.probe("cpu") is None else []


@pytest.mark.parametrize("name", [name for name, supported, _ in isas() if supported])
def test_forced(name):
    done = run(name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == name


def test_the_best_one_is_the_default():
    done = run(None)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == next(name for name, supported, _ in isas() if supported)


def test_an_empty_variable_is_no_choice():
    assert run("").stdout == run(None).stdout


def test_unknown_names_are_refused():
    done = run("avx1024")
    assert done.returncode != 0
    known = ", ".join(name for name, _, _ in isas())
    assert done.stderr.rstrip().endswith(f"ValueError: FASTATTN_CPU_ISA=avx1024 is unknown; this build has {known}")


@pytest.mark.parametrize("name, needs", [(name, needs) for name, supported, needs in isas() if not supported])
def test_unsupported_names_are_refused(name, needs):
    done = run(name)
    assert done.returncode != 0
    assert done.stderr.rstrip().endswith(
        f"ValueError: FASTATTN_CPU_ISA={name} needs {needs}, which this machine does not have"
    )


def test_scalar_is_always_there():
    assert ("scalar", True) in {(name, supported) for name, supported, _ in isas()}
