"""Checkpoint files: whole or not at all, verified on load."""

import json
import os

import pytest
import safetensors.torch
import torch

from fastattn.train import checkpoint as checkpoints
from fastattn.train.checkpoint import Checkpoint, CheckpointError, load, save, write_atomically


def example(value: float = 1.0) -> Checkpoint:
    tensors = {
        "model.w": torch.full((4, 5), value),
        "optimizer.w.step": torch.tensor(3.0),
        "optimizer.w.exp_avg": torch.full((4, 5), value, dtype=torch.bfloat16),
        "rng.torch": torch.arange(8, dtype=torch.uint8),
    }
    return Checkpoint(tensors, {"step": 3, "nested": {"lr": 0.1, "name": "日本"}})


def test_round_trip(tmp_path):
    save(tmp_path, example())
    loaded = load(tmp_path)
    assert loaded.state == example().state
    assert loaded.tensors.keys() == example().tensors.keys()
    for name, tensor in example().tensors.items():
        assert torch.equal(loaded.tensors[name], tensor) and loaded.tensors[name].dtype == tensor.dtype
    assert loaded.section("optimizer.w").keys() == {"step", "exp_avg"}
    assert torch.equal(load(checkpoints.checkpoint_path(tmp_path)).tensors["model.w"], torch.ones(4, 5))
    assert os.listdir(tmp_path) == [checkpoints.FILE_NAME]


def test_loaded_tensors_do_not_change_with_the_file(tmp_path):
    save(tmp_path, example(1.0))
    loaded = load(tmp_path)
    save(tmp_path, example(2.0))
    assert (loaded.tensors["model.w"] == 1.0).all()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_previous_checkpoint(tmp_path, monkeypatch, call):
    save(tmp_path, example(1.0))

    def fail(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, example(2.0))
    assert (load(tmp_path).tensors["model.w"] == 1.0).all()
    assert os.listdir(tmp_path) == [checkpoints.FILE_NAME]


def test_what_a_kill_left_behind_is_taken_over(tmp_path):
    (tmp_path / f".{checkpoints.FILE_NAME}.tmp").write_bytes(b"half of a chec")
    save(tmp_path, example())
    assert os.listdir(tmp_path) == [checkpoints.FILE_NAME]


def test_the_new_content_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    calls = []
    real = {"fsync": os.fsync, "replace": os.replace}
    for name in real:
        monkeypatch.setattr(os, name, lambda *a, name=name: (calls.append(name), real[name](*a))[1])
    write_atomically(tmp_path / "file", b"content")
    assert calls == ["fsync", "replace", "fsync"]


def test_cut_short(tmp_path):
    save(tmp_path, example())
    path = checkpoints.checkpoint_path(tmp_path)
    whole = path.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="cut short, damaged"):
            load(tmp_path)


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    save(tmp_path, example())
    path = checkpoints.checkpoint_path(tmp_path)
    whole = path.read_bytes()
    for position in range(0, len(whole), 13):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.raises(CheckpointError):
            load(tmp_path)


def test_foreign_files(tmp_path):
    path = checkpoints.checkpoint_path(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load(tmp_path / "missing")
    safetensors.torch.save_file({"w": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="not a fastattn checkpoint"):
        load(tmp_path)
    torch.save({"w": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="no checkpoint at all"):
        load(tmp_path)


def test_forged_state_is_noticed(tmp_path):
    save(tmp_path, example())
    path = checkpoints.checkpoint_path(tmp_path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata["state"] = json.dumps({"step": 4})
    safetensors.torch.save_file(example().tensors, path, metadata)
    with pytest.raises(CheckpointError, match="checksum"):
        load(tmp_path)
