"""The supervisor with workers that do as they are told: crash, hang, lose their device, talk nonsense."""

import json
import subprocess
import sys

import pytest

from fastattn.bench.gpu import supervisor

WORKER = """
import json, os, sys, time
section, *rest = sys.argv[1:]
shard, shards = map(int, rest[rest.index("--shard") + 1].split("/"))
done = open(rest[rest.index("--done") + 1]).read().splitlines()
def say(**message): print(json.dumps(message), flush=True)
if shard == 0: say(device={"name": "none"})
for number, what in enumerate(PLAN[section]):
    name = f"{section} {number}"
    if number % shards != shard or name in done: continue
    say(start=name)
    if what == "row": say(name=name, text="fine")
    if what == "wrong": say(name=name, violations=["too far off"])
    if what == "chatter": print("a library's warning", flush=True); say(name=name)
    if what == "crash": os.abort()
    if what == "hang": time.sleep(600)
    if what == "lost": say(name=name, error="illegal memory access"); sys.exit(75)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(plan, *options): the exit code and the document, for section -> what its jobs do."""

    def start(plan, *options):
        script = tmp_path / "worker.py"
        script.write_text(f"PLAN = {plan!r}\n{WORKER}")
        monkeypatch.setattr(supervisor, "WORKER", (str(script),))
        code = supervisor.main(["--out", str(tmp_path), "--only", ",".join(plan), "--workers", "2", *options])
        return code, json.loads((tmp_path / supervisor.FILE).read_text())

    return start


def names(document):
    return sorted(row["name"] for row in document["rows"])


def states(document):
    return {name: section["state"] for name, section in document["sections"].items()}


def test_rows_of_all_sections_in_one_document(run, tmp_path):
    code, document = run({"ceilings": ["row", "chatter"], "correctness": ["row"] * 5})
    assert code == 0 and document["schema"] == supervisor.SCHEMA and document["device"] == {"name": "none"}
    assert names(document) == ["ceilings 0", "ceilings 1", *(f"correctness {i}" for i in range(5))]
    assert states(document) == {"ceilings": "done", "correctness": "done"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpu.json", "worker.py"]


def test_a_crash_costs_one_row(run, capsys):
    code, document = run({"rows": ["row", "crash", "row"], "decode": ["row"]})
    assert code == 1 and states(document) == {"rows": "done", "decode": "done"}
    assert names(document) == ["decode 0", "rows 0", "rows 1", "rows 2"]
    assert [r["error"] for r in document["rows"] if "error" in r] == ["its process ended with code -6"]
    assert "rows 1: its process ended with code -6" in capsys.readouterr().out


def test_a_lost_device_is_its_rows_error_and_no_other(run):
    code, document = run({"rows": ["lost", "row"]})
    assert code == 1 and names(document) == ["rows 0", "rows 1"]


def test_what_does_not_fit_the_budget_is_cut_off(run):
    code, document = run({"rows": ["row", "hang"], "decode": ["row"]}, "--budget", str(supervisor.RESERVE + 2))
    assert code == 0 and names(document) == ["rows 0"]
    assert states(document) == {"rows": "cut off", "decode": "cut off"}


def test_silence_is_a_hang(run, monkeypatch):
    monkeypatch.setattr(supervisor, "SILENCE", 2.0)
    code, document = run({"rows": ["hang", "row"]})
    assert code == 1 and names(document) == ["rows 0", "rows 1"]


def test_continuing_adds_what_is_missing(run):
    _, before = run({"rows": ["row", "row"]})
    code, document = run({"rows": ["row", "row", "row"]}, "--skip-done")
    assert code == 0 and names(document) == ["rows 0", "rows 1", "rows 2"]
    assert document["date"] == before["date"]


def test_wrong_results_are_listed_and_are_the_exit_code(run, capsys):
    code, _ = run({"rows": ["wrong", "row"]})
    assert code == 1
    assert "rows 0: too far off" in capsys.readouterr().out.splitlines()


def test_the_mean_error_of_an_op_counts():
    rows = [{"name": str(i), "suite": "softmax", "dtype": "float32", "mean_ratio": r} for i, r in enumerate((1.0, 2.0))]
    assert supervisor.failures({"rows": rows, "sections": {}}) == [
        "softmax float32: errors are 1.41 times torch's in the mean, more than 1.1"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "speed"], "--only speed: there are ceilings, correctness"),
        (["--out", "/nonexistent"], "--out /nonexistent: a folder that exists is needed"),
    ],
)
def test_what_cannot_be_done_is_one_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert supervisor.main(options) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_another_file_is_not_continued(tmp_path, capsys):
    (tmp_path / supervisor.FILE).write_text("[]")
    assert supervisor.main(["--out", str(tmp_path), "--skip-done"]) == 2
    assert "cannot be continued" in capsys.readouterr().err
    assert (tmp_path / supervisor.FILE).read_text() == "[]"


def test_the_module_is_a_command():
    told = subprocess.run([sys.executable, "-m", "fastattn.bench.gpu", "--help"], capture_output=True, text=True)
    assert told.returncode == 0 and "--budget" in told.stdout
