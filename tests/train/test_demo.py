"""The demo: what it writes, what it promises, and coming back to it."""

import json
import os
import signal
import struct

import pytest

from fastattn import backends
from fastattn.train import demo
from fastattn.train.checkpoint import CheckpointError
from fastattn.train.demo import demo_config, run_demo
from fastattn.train.trainer import Interrupted, Trainer, read_log


@pytest.fixture
def run(text_file, monkeypatch):
    """run_demo on the tiny text, its output collected; 'no promise on bits' unless a test asks for one."""
    monkeypatch.setattr(demo, "MAX_BITS_PER_BYTE", 100.0)
    said = []

    def call(out, config):
        return run_demo(out, config, [str(text_file)], say=said.append), "\n".join(said)

    return call


def png_size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


def test_report(run, tiny, tmp_path):
    out = tmp_path / "demo"
    failures, said = run(out, tiny())
    facts = json.loads((out / "report.json").read_text())
    assert facts["val_bits_per_byte"] == read_log(out)[-1]["val_bits_per_byte"]
    assert facts["step_speedup"] == facts["steps_timed"][0]["speedup"] > 0
    assert [(t["dtype"], t["dropout"]) for t in facts["steps_timed"]] == [
        ("fp32", 0.1),
        ("bf16", 0.1),
        ("fp32", 0.0),
        ("bf16", 0.0),
    ]
    assert facts["step_speedup_without_dropout"] == facts["steps_timed"][2]["speedup"]
    assert 0 <= facts["max_rel_loss_diff"] < 1e-5
    assert sum(facts["backends_served"].values()) > 0
    assert facts["machine"]["cores"] and facts["versions"]["torch"] and facts["date"]
    assert facts["config"] == tiny().to_dict()
    assert facts["sample"] in said
    for name in ("loss.png", "steps.png"):
        assert min(png_size(out / name)) > 300
        assert f"({name})" in (out / "report.md").read_text()
    if backends.probe("cpu") is None:
        assert not failures
        assert facts["isa"] == backends.cpu_isa() and facts["backends_served"]["cpu"] > 0


def test_broken_promises_are_named(run, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "MAX_BITS_PER_BYTE", 0.5)
    monkeypatch.setattr(demo, "compare_losses", lambda *args: [1e-7, 3e-4, 1e-7])
    monkeypatch.setattr(demo.dispatch, "served", lambda: {"reference": 7})
    failures, _ = run(tmp_path / "demo", tiny())
    bits, losses, backend = failures
    assert "bits per byte, above 0.5" in bits
    assert "3.00e-04, above 0.0001" in losses
    assert "cpu backend did not serve" in backend
    assert (tmp_path / "demo/report.json").exists(), "the report is written all the same"


def test_nan_is_a_broken_promise(run, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "compare_losses", lambda *args: [float("nan")])
    failures, _ = run(tmp_path / "demo", tiny())
    assert any("losses differ" in failure for failure in failures)


def test_an_interrupted_demo_continues_and_a_finished_one_starts_over(run, tiny, tmp_path, monkeypatch):
    out, config = tmp_path / "demo", tiny(steps=10, checkpoint_interval=2)
    save = Trainer.save

    def save_then_stop(self):
        save(self)
        if self.progress.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "save", save_then_stop)
    with pytest.raises(Interrupted):
        run(out, config)
    assert not (out / "report.json").exists()
    monkeypatch.setattr(Trainer, "save", save)
    with pytest.raises(CheckpointError, match=r"asked for steps=11 \(not 10\); choose another --out"):
        run(out, tiny(steps=11))
    _, said = run(out, config)
    assert "continuing the interrupted demo" in said
    first = read_log(out)
    assert [record["step"] for record in first] == list(range(1, 11))
    _, said = run(out, config)
    assert "starting over" in said
    assert [record["loss"] for record in read_log(out)] == [record["loss"] for record in first]


@pytest.mark.parametrize("steps", [1, 2, 9, 350, 10_000])
def test_settings_for_any_number_of_steps(steps):
    config = demo_config(steps)
    assert config.steps == steps and config.warmup < steps
