"""`fastattn bench transformers`: models with sdpa and on our kernels, the same losses and embeddings."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install fastattn[test]")

from fastattn.bench import transformers
from fastattn.bench.contenders import OURS, TORCH
from fastattn.cli import main

TINY = (
    transformers.Workload("gpt training 2x16", "training", 2, 2, 16, 64, 2, 16),
    transformers.Workload("bert encoding 4 sentences", "encoding", 2, 2, 16, 64, 4, 24),
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(transformers, "WORKLOADS", TINY)


def test_both_kinds_in_both_dtypes(bench_briefly):
    code, lines, found = bench_briefly("transformers")
    assert code == 0
    assert [(row["workload"], row["dtype"]) for row in found["rows"]] == [
        (workload.name, dtype) for workload in TINY for dtype in ("fp32", "bf16")
    ]
    for row in found["rows"]:
        contenders = row["contenders"]
        training = "training" in row["workload"]
        assert list(contenders) == [OURS, TORCH, *([] if training else [transformers.SKIPPING])]
        for contender in contenders.values():
            assert contender["gain"] == pytest.approx(contenders[TORCH]["median_s"] / contender["median_s"], rel=1e-4)
        assert row["tokens"] == (32 if training else int(transformers._lengths(TINY[1]).sum()))
        assert bool(contenders[OURS]["losses"]) == training
    assert "4 of 4 rows within the law" in lines[-1]


@pytest.mark.parametrize("workload", TINY, ids=lambda workload: workload.kind)
def test_the_gate(workload):
    entries = {name: transformers.Entry(losses=[2.0], norms=[1.0]) for name in (OURS, TORCH)}
    for entry in entries.values():
        entry.embeddings = torch.eye(4)
    assert transformers.differences(entries, workload, "fp32") == ()
    entries[OURS].losses = [2.01]
    entries[OURS].embeddings = torch.eye(4).flip(0)
    assert len(transformers.differences(entries, workload, "fp32")) == 1


def test_refused(capsys):
    assert main(["bench", "transformers", "--workload", "llama"]) == 2
    assert "bert encoding 4 sentences" in capsys.readouterr().err
