"""What a demo run found: report.json for machines, report.md and two pictures for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fastattn import machine
from fastattn.train.checkpoint import write_atomically
from fastattn.train.compare import StepTimes
from fastattn.train.config import TrainConfig

REPORT_JSON = "report.json"
REPORT_MD = "report.md"
LOSS_PNG = "loss.png"
STEPS_PNG = "steps.png"

OURS, THEIRS = "#1f6f8b", "#c9c9c9"


@dataclass(frozen=True)
class Findings:
    """Everything that a demo run measured. ``log`` is the training log, ``times[0]`` the step as trained."""

    config: TrainConfig
    corpus: str
    validation_bytes: int
    parameters: int
    log: list[dict[str, Any]]
    sample: str
    times: Sequence[StepTimes]
    loss_differences: Sequence[float]
    isa: str | None
    backends_served: dict[str, int]

    @property
    def val_bits_per_byte(self) -> float:
        return self.log[-1]["val_bits_per_byte"]

    @property
    def max_rel_loss_diff(self) -> float:
        return max(self.loss_differences)

    @property
    def step_speedup(self) -> float:
        """Of the step as trained."""
        return self.times[0].speedup

    @property
    def step_speedup_without_dropout(self) -> float:
        """Of the same step in the same dtype, where torch has its fused attention, too."""
        dtype = self.times[0].dtype
        return next(times.speedup for times in self.times if times.dtype == dtype and times.dropout == 0.0)


def to_json(findings: Findings) -> dict[str, Any]:
    """The contents of report.json."""
    return {
        "val_bits_per_byte": findings.val_bits_per_byte,
        "step_speedup": round(findings.step_speedup, 4),
        "step_speedup_without_dropout": round(findings.step_speedup_without_dropout, 4),
        "max_rel_loss_diff": findings.max_rel_loss_diff,
        "isa": findings.isa,
        "backends_served": findings.backends_served,
        "steps_timed": [
            {
                "dtype": times.dtype,
                "dropout": times.dropout,
                "rounds": len(times.torch),
                "speedup": round(times.speedup, 4),
                "fastattn": times.summary("fastattn"),
                "torch": times.summary("torch"),
            }
            for times in findings.times
        ],
        "train_seconds": findings.log[-1]["seconds"],
        "parameters": findings.parameters,
        "corpus": findings.corpus,
        "validation_bytes": findings.validation_bytes,
        "config": findings.config.to_dict(),
        "machine": machine.hardware(),
        "environment": machine.environment(),
        "commit": machine.commit(),
        "versions": machine.versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "sample": findings.sample,
    }


def write_report(out: Path, findings: Findings) -> dict[str, Any]:
    """Write the pictures, report.md and, last, report.json, whose presence says that the demo is finished."""
    facts = to_json(findings)
    _plot_losses(out / LOSS_PNG, findings.log)
    _plot_steps(out / STEPS_PNG, findings.times)
    write_atomically(out / REPORT_MD, _markdown(facts).encode("utf-8"))
    write_atomically(out / REPORT_JSON, (json.dumps(facts, indent=2) + "\n").encode("utf-8"))
    return facts


def _plot_losses(path: Path, log: list[dict[str, Any]]) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")  # without pyplot: no display, no global state
    left = figure.subplots()
    steps = [record["step"] for record in log]
    left.plot(steps, [record["loss"] for record in log], color=OURS, linewidth=0.8, label="training loss")
    left.set_xlabel("step")
    left.set_ylabel("training loss (nats per token)")
    validated = [record for record in log if "val_bits_per_byte" in record]
    right = left.twinx()
    right.plot(
        [record["step"] for record in validated],
        [record["val_bits_per_byte"] for record in validated],
        color="#b5432e",
        marker="o",
        label="validation",
    )
    right.set_ylabel("validation (bits per byte)")
    figure.legend(loc="upper right", bbox_to_anchor=(0.88, 0.97))
    figure.savefig(path, dpi=130)


def _plot_steps(path: Path, timed: Sequence[StepTimes]) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for offset, side, colour, label in (
        (-0.2, "torch", THEIRS, "torch's kernels"),
        (0.2, "fastattn", OURS, "fastattn"),
    ):
        summaries = [times.summary(side) for times in timed]
        medians = [summary["median_ms"] for summary in summaries]
        whiskers = [
            [summary["median_ms"] - summary["q1_ms"] for summary in summaries],
            [summary["q3_ms"] - summary["median_ms"] for summary in summaries],
        ]
        positions = [index + offset for index in range(len(timed))]
        bars = axes.bar(positions, medians, 0.38, yerr=whiskers, color=colour, label=label, capsize=3)
        axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set_xticks(
        range(len(timed)),
        [f"{times.dtype}, dropout {times.dropout:g}\n{times.speedup:.2f}x" for times in timed],
    )
    axes.set_ylabel("training step (ms, median, whiskers: quartiles)")
    axes.margins(y=0.12)
    axes.legend()
    figure.savefig(path, dpi=130)


def _markdown(facts: dict[str, Any]) -> str:
    config, computer, versions = facts["config"], facts["machine"], facts["versions"]
    rows = "\n".join(
        f"| {timed['dtype']} | {timed['dropout']:g} | {_cell(timed['fastattn'])} | {_cell(timed['torch'])} "
        f"| {timed['speedup']:.2f}x |"
        for timed in facts["steps_timed"]
    )
    served = ", ".join(f"{name} {count}" for name, count in sorted(facts["backends_served"].items())) or "none"
    sample = "\n".join(f"    {line}" for line in facts["sample"].splitlines())
    return f"""# fastattn demo

A GPT with {facts["parameters"]:,} parameters ({config["n_layer"]} layers, width {config["n_embd"]}, \
{config["n_head"]} heads, context {config["block_size"]} tokens) trained for {config["steps"]} steps \
({facts["train_seconds"]:.0f} s) on {facts["corpus"]}.

| | |
|---|---|
| validation | {facts["val_bits_per_byte"]:.4f} bits per byte, \
over all {facts["validation_bytes"]:,} bytes held out |
| training step against torch's kernels | {facts["step_speedup"]:.2f}x as trained, \
{facts["step_speedup_without_dropout"]:.2f}x without dropout ({config["dtype"]}) |
| largest relative loss difference to torch's kernels | {facts["max_rel_loss_diff"]:.2e} |
| instruction set | {facts["isa"]} |
| calls served, by backend | {served} |
| machine | {computer["cpu"]}, {computer["cores"]} cores, {computer["threads"]} threads, \
{computer["system"]} |
| load average before the report | {", ".join(map(str, computer["load_average"]))} |
| versions | fastattn {versions["fastattn"]}, torch {versions["torch"]}, Python {versions["python"]} |
| commit | {facts["commit"] or "unknown"} |
| date | {facts["date"]} |

![training and validation loss]({LOSS_PNG})

## The same step on both kernels

Forward, backward, gradient clipping and AdamW of the same model from the same weights on the same batches,
one step of each side in turn; milliseconds, median (quartiles). Only attention, LayerNorm and cross entropy
differ. With dropout torch's CPU attention has no fused kernel and builds the whole matrix of weights.

| dtype | dropout | fastattn | torch | speed-up |
|---|---|---|---|---|
{rows}

![step times]({STEPS_PNG})

## A sample

{sample}
"""


def _cell(summary: dict[str, float]) -> str:
    return f"{summary['median_ms']:.1f} ({summary['q1_ms']:.1f}-{summary['q3_ms']:.1f})"
