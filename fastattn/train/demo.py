"""The main job in minutes: train a GPT on real text, sample from it, compare our kernels with torch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fastattn import backends, dispatch
from fastattn.generate import generate
from fastattn.train import checkpoint as checkpoints
from fastattn.train.checkpoint import CheckpointError
from fastattn.train.compare import compare_losses, time_steps
from fastattn.train.config import DTYPES, TrainConfig
from fastattn.train.report import REPORT_JSON, REPORT_MD, Findings, write_report
from fastattn.train.trainer import Trainer, read_log

# What two cores of a 2024 server do. Steps, not minutes, end the training: the same result everywhere, sooner
# or later.
STEPS_PER_MINUTE = 180
DEFAULT_STEPS = 2 * STEPS_PER_MINUTE

MAX_BITS_PER_BYTE = 2.0
MAX_REL_LOSS_DIFF = 1e-4

PROMPT = 'The "with" statement'


def demo_config(steps: int = DEFAULT_STEPS) -> TrainConfig:
    """The demo's settings; warm-up and validation follow the number of steps."""
    return TrainConfig(
        vocab_size=4096,
        block_size=256,
        n_layer=4,
        n_head=4,
        n_embd=192,
        dropout=0.1,
        steps=steps,
        batch_size=8,
        lr=2e-3,
        min_lr=2e-4,
        warmup=min(30, steps // 10),
        eval_interval=max(1, steps // 6),
        checkpoint_interval=max(1, steps // 6),
    )


def prepare(out: Path, config: TrainConfig, data: Sequence[str], say: Callable[[str], None]) -> Trainer:
    """A new run, or the interrupted one that ``out`` holds.

    A finished demo (its report is there) is started over.

    Raises:
        ValueError: ``out`` holds a run that is not this demo, or is no folder.
    """
    if (out / REPORT_JSON).exists():
        say(f"{out} holds a finished demo: starting over")
        trainer = Trainer.start(config, data, out, overwrite=True)
        (out / REPORT_JSON).unlink()
        (out / REPORT_MD).unlink(missing_ok=True)
        return trainer
    if not checkpoints.checkpoint_path(out).exists():
        return Trainer.start(config, data, out)
    try:
        trainer = Trainer.resume(out, data, config.to_dict())
    except CheckpointError as error:
        raise CheckpointError(f"{error}; choose another --out, or remove that folder to start over") from None
    say(f"continuing the interrupted demo in {out} after step {trainer.progress.step}")
    return trainer


def run_demo(
    out: Path,
    config: TrainConfig,
    data: Sequence[str] = (),
    *,
    say: Callable[[str], None] = print,
    tune_allocator: bool = True,
) -> list[str]:
    """Train, sample, compare, report; without data on the default corpus. tune_allocator: as in Trainer.run.

    Returns what the demo promises and this run did not keep, one line each; empty when all is well.

    Raises:
        Interrupted: on SIGINT while training; the same call continues later.
    """
    dispatch.reset_served()
    trainer = prepare(out, config, data, say)
    for note in trainer.notes:
        say(f"note: {note}")
    say(
        f"training {trainer.model.num_parameters():,} parameters for {config.steps} steps "
        f"on {trainer.corpus.name}, {torch.get_num_threads()} threads"
    )
    progress = trainer.run(tune_allocator=tune_allocator)
    say(f"validation: {progress.val_bits_per_byte:.4f} bits per byte after {progress.seconds:.0f} s of steps")

    model = trainer.model.eval()
    sample = generate(
        model, trainer.tokenizer, PROMPT, max_new_tokens=160, temperature=0.8, top_p=0.95, seed=config.seed
    )
    say(f"\n{sample}\n")

    say("timing the same step on fastattn's kernels and on torch's")
    # As trained first: that is the number reported as the step's speed-up. Then what dropout does to it,
    # since torch's CPU attention has a fused kernel only without.
    times = [
        time_steps(model, trainer.dataset, config, dtype=dtype, dropout=dropout)
        for dropout in dict.fromkeys((config.dropout, 0.0))
        for dtype in DTYPES
    ]
    for timed in times:
        ours, theirs = timed.summary("fastattn"), timed.summary("torch")
        say(
            f"  {timed.dtype} dropout {timed.dropout:g}: fastattn {ours['median_ms']:.1f} ms, "
            f"torch {theirs['median_ms']:.1f} ms, {timed.speedup:.2f}x"
        )
    differences = compare_losses(model.config, trainer.dataset, config)
    say(f"largest relative loss difference over {len(differences)} fp32 steps: {max(differences):.2e}")

    served = dispatch.served()
    missing = backends.probe("cpu")
    findings = Findings(
        config=config,
        corpus=trainer.corpus.name,
        validation_bytes=trainer.dataset.validation_bytes,
        parameters=model.num_parameters(),
        log=read_log(out),
        sample=sample,
        times=times,
        loss_differences=differences,
        isa=backends.cpu_isa() if missing is None else None,
        backends_served=served,
    )
    write_report(out, findings)
    say(f"backends that served: {served}, instruction set {findings.isa}\nreport: {out / REPORT_MD}")

    failures = []
    if not findings.val_bits_per_byte <= MAX_BITS_PER_BYTE:
        failures.append(f"validation: {findings.val_bits_per_byte:.4f} bits per byte, above {MAX_BITS_PER_BYTE}")
    if not findings.max_rel_loss_diff <= MAX_REL_LOSS_DIFF:
        failures.append(
            f"losses differ from torch's by up to {findings.max_rel_loss_diff:.2e}, above {MAX_REL_LOSS_DIFF}"
        )
    if not served.get("cpu"):
        failures.append(f"the cpu backend did not serve: {missing or 'another backend was chosen'}")
    return failures
