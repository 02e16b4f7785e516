"""`fastattn tune` measures what has preferences and writes what dispatch then reads."""

import argparse

import pytest
import torch

import fastattn
from fastattn import preference
from fastattn.bench import tune
from fastattn.cases import Suite
from fastattn.dispatch import explain
from fastattn.ops.linear.cases import SUITES, workload

pytestmark = pytest.mark.usefixtures("skip_without_native")


def test_what_is_measured_is_what_decides(monkeypatch, tmp_path, capsys):
    small = Suite(**{**vars(SUITES[0]), "workloads": (workload(1, 8, 8), workload(9, 8, 8))})
    monkeypatch.setattr(tune, "suites", lambda: {"linear": small})
    path = tmp_path / "tune.json"
    monkeypatch.setenv("FASTATTN_TUNE_FILE", str(path))
    try:
        assert tune.run(argparse.Namespace(device="cpu", quick=False, threads=None)) == 0
        preference.forget()
        entries = preference.read(path)["machines"][preference.machine_key()]["linear"]
        assert set(entries) == {f"{t}{r}" for t in ("float32", "bfloat16", "float16") for r in ("", ", one row")}
        arguments = small.arguments(small.workloads[1], "cpu", torch.float32)
        with fastattn.use_backend(None):
            assert explain(fastattn.linear, **arguments).backend == entries["float32"]["backend"]
    finally:
        preference.forget()
    assert f"written to {path}" in capsys.readouterr().out


def test_threads_must_be_a_number_of_threads():
    with pytest.raises(ValueError, match="--threads must be 1 to 1024, got 0"):
        tune.run(argparse.Namespace(device="cpu", quick=True, threads=0))
