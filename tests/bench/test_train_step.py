"""`fastattn bench train-step`: one model, two namespaces, the same losses."""

import pytest
import torch

from fastattn.bench import train_step
from fastattn.bench.contenders import OURS, TORCH
from fastattn.cli import main
from fastattn.models.gpt import GPTConfig

TINY = train_step.Workload("tiny 2x16", GPTConfig(64, 16, 2, 2, 16), 2, 16)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(train_step, "WORKLOADS", (TINY,))


def test_both_dtypes(bench_briefly):
    code, lines, found = bench_briefly("train-step")
    assert code == 0
    assert found["op"] == "train-step"
    assert [(row["workload"], row["dtype"]) for row in found["rows"]] == [("tiny 2x16", "fp32"), ("tiny 2x16", "bf16")]
    for row in found["rows"]:
        ours, theirs = row["contenders"][OURS], row["contenders"][TORCH]
        assert row["speedup"] == pytest.approx(theirs["median_s"] / ours["median_s"], rel=1e-4)
        assert ours["tokens_per_s"] == pytest.approx(32 / ours["median_s"], rel=1e-4)
        assert len(ours["losses"]) == row["steps_compared"] >= 3
        assert row["largest_loss_difference"] <= train_step.LIMITS[row["dtype"]]
    assert sum(line.startswith("train-step tiny 2x16") for line in lines) == 2
    assert "2 of 2 rows within the law" in lines[-1]


def test_flops_are_those_of_the_matrix_products():
    """Counted on the model itself; torch counts every query with every key, we only those that the mask leaves."""
    from torch.utils.flop_counter import FlopCounterMode

    from fastattn.models.gpt import GPT

    idx = torch.zeros(2, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        loss = GPT(TINY.model)(idx, idx)[1]
        loss.backward()
    full_scores = 2 * 2 * 2 * 2 * 16 * 16 * 8 * (2 + 5)  # two flops, layers, batch, heads, S x S, D; 2 + 5 products
    scores = TINY.flops - 6 * 32 * (2 * 12 * 16**2 + 64 * 16)
    assert counter.get_total_flops() - full_scores == TINY.flops - scores
    assert scores == full_scores * 6 / 7 * 17 / 32  # recomputed products are not counted


def test_other_losses_fail_and_are_not_timed(bench_briefly, monkeypatch):
    def wrong(model, *arguments):
        loss, norm = training_step(model, *arguments)
        return loss * (1.001 if model.config.kernels == "fastattn" else 1.0), norm

    training_step = train_step.training_step
    monkeypatch.setattr(train_step, "training_step", wrong)
    code, lines, found = bench_briefly("train-step", "--dtype", "fp32")
    assert code == 1
    (row,) = found["rows"]
    assert "losses of step 1" in row["violations"][0]
    assert row["speedup"] is None and not row["ahead"]
    assert any("FAILED losses of step 1" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shape", "1,2"), "--workload chooses a model"),
        (("--workload", "llama"), "--workload: train-step has tiny 2x16"),
        (("--dtype", "fp16"), "--dtype fp16: train-step has fp32, bf16"),
    ],
)
def test_mistakes(capsys, arguments, message):
    assert main(["bench", "train-step", *arguments]) == 2
    assert message in capsys.readouterr().err
