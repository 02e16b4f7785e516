"""The file of what was measured on this machine's GPUs."""

import json
import warnings

import pytest

from fastattn.gpu import measured

ENTRY = {"dtype": "bfloat16", "dim": 128, "kind": "", "size": 4096, "options": {"ROWS": 64}, "seconds": 1e-3}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(measured.importlib.metadata, "version", lambda name: "3.7.1")
    measured.forget()
    yield
    measured.forget()


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTATTN_TUNE_FILE", str(tmp_path / "deep" / "tune.json"))
    return tmp_path / "deep" / "tune.gpu.json"


def test_what_is_written_is_read(file):
    assert measured.path() == file
    measured.write(file, "GPU", {"attention": {"forward": [ENTRY]}})
    assert measured.entries("GPU", "attention", "forward") == [ENTRY]
    assert measured.entries("another GPU", "attention", "forward") == [] == measured.entries("GPU", "softmax", "rows")


def test_the_same_problems_are_replaced_and_others_stay(file):
    other = {**ENTRY, "size": 64}
    measured.write(file, "GPU", {"attention": {"forward": [ENTRY, other]}})
    measured.write(file, "GPU", {"attention": {"forward": [{**ENTRY, "options": {"ROWS": 128}}]}})
    measured.write(file, "another GPU", {"attention": {"forward": [ENTRY]}})
    assert measured.entries("GPU", "attention", "forward") == [other, {**ENTRY, "options": {"ROWS": 128}}]


def test_another_compiler_has_measurements_of_its_own(file, monkeypatch):
    measured.write(file, "GPU", {"attention": {"forward": [ENTRY]}})
    monkeypatch.setattr(measured.importlib.metadata, "version", lambda name: "3.8.0")
    assert measured.entries("GPU", "attention", "forward") == []


WRONG = {
    "not JSON": "{",
    "not a document of schema": '{"schema": "x"}',
    "must be objects": json.dumps({"schema": measured.SCHEMA, "devices": []}),
    "not a list of entries": json.dumps({"schema": measured.SCHEMA, "devices": {"GPU": {"op": {"kernel": 3}}}}),
    "not an entry": json.dumps({"schema": measured.SCHEMA, "devices": {"GPU": {"op": {"kernel": [{"dim": 3}]}}}}),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_file_that_is_something_else_is_named_and_left_alone(file, message):
    file.parent.mkdir()
    file.write_text(WRONG[message])
    with pytest.raises(ValueError, match=message):
        measured.write(file, "GPU", {})
    with pytest.raises(ValueError, match=f"FASTATTN_TUNE_FILE.*{message}"):
        measured.entries("GPU", "op", "kernel")
    assert file.read_text() == WRONG[message]


def test_without_the_variable_it_is_a_warning(file, monkeypatch, tmp_path):
    monkeypatch.delenv("FASTATTN_TUNE_FILE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "fastattn").mkdir()
    (tmp_path / "fastattn" / "tune.gpu.json").write_text("{")
    with pytest.warns(RuntimeWarning, match="is ignored: not JSON"):
        assert measured.entries("GPU", "op", "kernel") == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measured.entries("GPU", "op", "kernel") == []
