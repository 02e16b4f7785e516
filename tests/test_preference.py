"""What was measured decides between backends, explain() says so, and a file that is no such file is not swallowed."""

import json
import warnings
from dataclasses import replace

import pytest
import torch

import fastattn
from fastattn import preference
from fastattn.backends import cpu_isa
from fastattn.dispatch import explain
from fastattn.ops.linear import OP

pytestmark = pytest.mark.usefixtures("skip_without_native")

X, W = torch.randn(4, 8), torch.randn(5, 8)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """No file, and nothing remembered before or after."""
    monkeypatch.delenv("FASTATTN_TUNE_FILE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with fastattn.use_backend(None):
        for forget in (preference.forget, OP._chosen.clear):
            forget()
        yield
    for forget in (preference.forget, OP._chosen.clear):
        forget()


def entry(backend):
    return {"linear": {"float32": {"backend": backend, "seconds": {"cpu": 2e-6, "reference": 1e-6}}}}


def test_the_table_is_of_backends_with_reasons():
    for machine in preference.TABLE.values():
        for classes in machine.values():
            assert all(backend in ("cpu", "reference") and why for backend, why in classes.values())


def test_an_unknown_machine_gets_torchs_kernels(monkeypatch):
    monkeypatch.setattr(preference, "TABLE", {})
    told = explain(fastattn.linear, X, W)
    assert told.backend == "reference"
    assert f"preferred: reference (no entry for {preference.platform_name()}, float32: `fastattn tune`" in str(told)
    assert explain(fastattn.linear, X, W, backend="cpu").backend == "cpu"


def test_the_table_decides(monkeypatch):
    table = {preference.platform_name(): {"linear": {"float32": ("cpu", "it is faster")}}}
    monkeypatch.setattr(preference, "TABLE", table)
    told = explain(fastattn.linear, X, W)
    assert told.backend == "cpu" and str(told.preference) in str(told)
    assert str(told.preference).endswith(f"{cpu_isa()}, float32: it is faster)")
    assert explain(fastattn.linear, X, W, backend="reference").preference is None
    assert explain(fastattn.softmax, X, -1).preference is None


def test_on_gpus_the_vendors_products_are_preferred():
    problem = replace(explain(fastattn.linear, X, W).problem, device="cuda")
    assert str(OP.preference(problem)).startswith("preferred: reference (on GPUs: torch's products")
    assert OP.resolve(problem).backend == "reference"
    assert OP.preference(replace(problem, device="meta")) is None


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_file_decides_before_the_table(backend, monkeypatch, tmp_path):
    path = tmp_path / "deep" / "tune.json"
    monkeypatch.setenv("FASTATTN_TUNE_FILE", str(path))
    preference.write(path, entry(backend))
    told = explain(fastattn.linear, X, W)
    assert told.backend == backend
    assert f"preferred: {backend} (tuned, {path}: cpu 2 us, reference 1 us)" in str(told)


def test_other_machines_entries_stay(monkeypatch, tmp_path):
    path = tmp_path / "tune.json"
    path.write_text(json.dumps({"schema": preference.SCHEMA, "machines": {"another": entry("cpu")}}))
    preference.write(path, entry("reference"))
    machines = preference.read(path)["machines"]
    assert machines == {"another": entry("cpu"), preference.machine_key(): entry("reference")}
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["tune.json"]


BROKEN = {
    "no JSON": "{",
    "another document": '{"schema": "x"}',
    "no objects": json.dumps({"schema": preference.SCHEMA, "machines": {"a": {"linear": 3}}}),
    "an unknown backend": json.dumps({"schema": preference.SCHEMA, "machines": {"a": entry("gpu")}}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file(name, monkeypatch, tmp_path):
    """An error where the variable names it; in the cache a warning, once, and the table decides."""
    path = tmp_path / "cache" / "fastattn" / "tune.json"
    path.parent.mkdir(parents=True)
    path.write_text(BROKEN[name])
    with pytest.warns(RuntimeWarning, match=r"tune.json is ignored: .*; `fastattn tune` writes a new one"):
        explain(fastattn.linear, X, W)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explain(fastattn.linear, X, W)
    preference.forget()
    monkeypatch.setenv("FASTATTN_TUNE_FILE", str(path))
    with pytest.raises(ValueError, match=r"tune.json cannot be used: "):
        fastattn.linear(X, W)
    with pytest.raises(ValueError):
        preference.write(path, entry("cpu"))
    assert path.read_text() == BROKEN[name]


def test_a_named_file_that_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTATTN_TUNE_FILE", str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"FASTATTN_TUNE_FILE=.*none.json cannot be used"):
        fastattn.linear(X, W)
