"""The whole command at tiny sizes, kernels interpreted: everything but the times means what it says."""

import json
import subprocess
import sys

import pytest

from fastattn.bench.gpu import supervisor
from fastattn.bench.gpu.sections import SECTIONS

pytestmark = pytest.mark.interpreted


def test_everything_runs_and_is_right(tmp_path, capsys):
    code = supervisor.main(["--tiny", "--budget", "280", "--out", str(tmp_path), "--workers", "2"])
    document = json.loads((tmp_path / supervisor.FILE).read_text())
    assert code == 0, capsys.readouterr().out
    assert {s["state"] for s in document["sections"].values()} == {"done"}
    assert list(document["sections"]) == list(SECTIONS)
    by_section = {name: [r for r in document["rows"] if r["section"] == name] for name in SECTIONS}
    assert all(by_section.values())
    assert not any("skipped" in row for row in document["rows"])
    assert document["device"]["interpreted"]
    for row in by_section["attention"] + by_section["rows"]:
        ours = row["contenders"]["fastattn"]
        assert ours["errors"] and ours["forward"]["rate"] > 0 and ours["backward"]["rate"] > 0, row


def test_a_sweep_tries_options_around_the_committed_ones(tmp_path, capsys):
    code = supervisor.main(["--tiny", "--budget", "120", "--out", str(tmp_path), "--sweep", "swiglu/forward"])
    document = json.loads((tmp_path / supervisor.FILE).read_text())
    assert code == 0, capsys.readouterr().out
    (row,) = document["rows"]
    assert row["name"] == "sweep swiglu/forward: 4x32 forward" and len(row["tried"]) > 2
    assert row["best"] in [tried["options"] for tried in row["tried"]]


def test_nothing_but_torch_and_triton_is_needed():
    """A borrowed machine has no tokenizers, tqdm or safetensors."""
    program = (
        "import sys\n"
        "for name in ('tokenizers', 'tqdm', 'safetensors', 'matplotlib', 'pytest'): sys.modules[name] = None\n"
        "import fastattn.bench.gpu.sections, fastattn.bench.gpu.supervisor\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
