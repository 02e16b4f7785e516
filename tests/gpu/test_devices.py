"""What a GPU is, and why the triton backend cannot use this machine's: reasons, never import errors."""

import os
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch

import fastattn
from fastattn import backends, env
from fastattn.dispatch import explain
from fastattn.gpu import devices


@pytest.fixture
def triton_is(monkeypatch):
    """Replaces what `import triton` gives: a version, or an exception."""

    def replaced(found):
        def load(name):
            if name not in ("triton", "triton.language"):
                return __import__(name)
            if isinstance(found, Exception):
                raise found
            return types.SimpleNamespace(**({} if found is None else {"__version__": found}))

        monkeypatch.setattr(devices.importlib, "import_module", load)

    return replaced


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (ModuleNotFoundError("No module named 'triton'", name="triton"), "triton is not installed"),
        (
            ModuleNotFoundError("No module named 'filelock'", name="filelock"),
            "triton is broken: No module named 'filelock'",
        ),
        (ImportError("libtriton.so: no"), "triton is broken: ImportError: libtriton.so: no"),
        (RuntimeError("bad\nwheel"), "triton is broken: RuntimeError: bad\nwheel"),
        (None, "triton of no version is too old: 3.6 or newer"),
        ("3.5.1", "triton 3.5.1 is too old: 3.6 or newer"),
        ("2.3.0+git1234", "triton 2.3.0+git1234 is too old: 3.6 or newer"),
        ("3.10.0", "triton 3.10.0 is too new: this release knows those before 3.10"),
        ("4.0.0", "triton 4.0.0 is too new: this release knows those before 3.10"),
        ("3.6.0", None),
        ("3.9.2+git1234", None),
        ("3.9.0rc1", None),
    ],
)
def test_what_is_wrong_with_triton_is_a_reason(triton_is, found, reason):
    triton_is(found)
    assert devices.triton_reason() == reason


@pytest.fixture
def gpu_is(monkeypatch):
    """Replaces what torch tells of this machine's GPU."""

    def replaced(*, available=True, cuda=None, hip=None, capability=(9, 0), arch=""):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        properties = types.SimpleNamespace(
            gcnArchName=arch, major=capability[0], minor=capability[1], name="Imaginary",
            shared_memory_per_block_optin=0 if hip else 232_448,
        )  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)

    devices._target.cache_clear()
    devices._target_of.cache_clear()
    yield replaced
    devices._target.cache_clear()
    devices._target_of.cache_clear()


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ({"available": False}, "torch is a build without GPUs"),
        ({"available": False, "cuda": "13.0"}, "torch sees no GPU"),
        ({"available": False, "hip": "7.0"}, "torch sees no GPU"),
        ({"cuda": "13.0", "capability": (7, 5)}, "the GPU is of compute capability 7.5: 8.0 or newer"),
        ({"cuda": "13.0", "capability": (8, 0)}, None),
        ({"cuda": "13.0", "capability": (12, 1)}, None),
        ({"hip": "7.0", "arch": "gfx1100"}, "gfx1100 is none of gfx942, gfx950"),
        ({"hip": "7.0", "arch": "gfx942:sramecc+:xnack-"}, None),
    ],
)
def test_what_is_wrong_with_the_gpu_is_a_reason(gpu_is, machine, reason):
    gpu_is(**machine)
    assert devices._device_reason() == reason


@pytest.mark.compiled
def test_the_gpu_comes_before_triton(gpu_is, triton_is):
    gpu_is(available=False)
    triton_is("3.5.1")
    assert devices.probe() == "torch is a build without GPUs"
    gpu_is(cuda="13.0")
    assert devices.probe() == "triton 3.5.1 is too old: 3.6 or newer"
    triton_is("3.7.1")
    assert devices.probe() is None


def test_targets(gpu_is):
    device = torch.device("cuda", 0)
    gpu_is(cuda="13.0", capability=(9, 0))
    target = devices.target_of(device)
    assert (target.name, target.warp, target.shared_memory) == ("sm_90", 32, 232_448)
    assert devices.target_of(device) is target and target.device == "Imaginary"
    devices._target.cache_clear()
    devices._target_of.cache_clear()
    gpu_is(hip="7.0", arch="gfx950:sramecc+")
    target = devices.target_of(device)
    assert (target.name, target.warp, target.shared_memory) == ("gfx950", 64, 163_840)


def test_assumed_targets_are_new_and_forgotten():
    cpu = torch.device("cpu")
    with devices.assume("sm_80") as outer, devices.assume("gfx942") as inner:
        assert devices.target_of(cpu) is inner and inner is not devices.KNOWN["gfx942"] and outer.name == "sm_80"
    assert devices.target_of(cpu) is devices.KNOWN["interpreter"]


def test_launches_from_cpu_tensors_need_no_device():
    with devices.on(torch.zeros(3)):
        pass


@pytest.mark.skipif(env.interpreting() or torch.cuda.is_available(), reason="triton can run here")
def test_explain_tells_the_reason():
    found = explain(fastattn.swiglu, torch.zeros(2, 4), torch.zeros(2, 4))
    assert found.reasons["triton"] == "serves cuda tensors, not cpu"
    op, problem = fastattn.swiglu.prepare(torch.zeros(2, 4), torch.zeros(2, 4))
    reasons = op.reasons(replace(problem, device="cuda"))
    assert reasons["triton"] == backends.probe("triton") == devices.probe()
    assert reasons["triton"] in ("torch is a build without GPUs", "torch sees no GPU")


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_fastattn_imports_and_serves_without_triton(interpret):
    program = """
import sys
sys.modules["triton"] = None
import torch, fastattn
from fastattn import backends
from fastattn.dispatch import explain
x = torch.ones(2, 4)
assert fastattn.swiglu(x, x).shape == (2, 4)
print(backends.probe("triton"))
print(explain(fastattn.swiglu, x, x).reasons["triton"])
try:
    fastattn.swiglu(x, x, backend="triton")
except fastattn.BackendUnsupported as error:
    print("refused")
"""
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[2] == "refused"
    if interpret == "1":
        assert lines[0] == lines[1] == "triton is not installed"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ImportError('libtriton.so: no')", "triton is broken: ImportError: libtriton.so: no"),
        ("raise OSError('bad wheel')", "triton is broken: OSError: bad wheel"),
        ("__version__ = '3.5.0'", "triton 3.5.0 is too old: 3.6 or newer"),
        ("__version__ = '3.7.1'", "triton is broken: No module named 'triton.language'"),
    ],
)
def test_a_broken_triton_breaks_no_import(tmp_path, source, reason):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(source)
    program = "import torch, fastattn; from fastattn import backends; print(backends.probe('triton'))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == reason


@pytest.mark.compiled
def test_kernels_are_not_loaded_before_a_launch():
    program = "import sys, fastattn; print([m for m in sys.modules if m.startswith('fastattn') and 'kernels' in m])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stderr
