"""The command line. ``fastattn X`` and ``python -m fastattn X`` are the same.

Exit codes: 0 done; 1 the command ran and its result is not what it promises; 2 the request cannot be served,
one line on stderr says why; 130 (143) stopped by SIGINT (SIGTERM) with the work saved.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastattn.train.config import TrainConfig
from fastattn.version import __version__

# What each field of TrainConfig means; its type and default are read from there.
TRAIN_OPTIONS = {
    "model": {
        "vocab_size": "tokens of the byte-level BPE",
        "block_size": "context in tokens",
        "n_layer": "blocks",
        "n_head": "attention heads",
        "n_embd": "width",
        "dropout": "dropout probability",
        "bias": "biases in linear layers and LayerNorm",
        "kernels": "fastattn, or torch for torch.nn.functional's",
    },
    "training": {
        "steps": "optimizer steps",
        "batch_size": "sequences per forward pass",
        "grad_accum": "forward passes per step",
        "lr": "highest learning rate",
        "min_lr": "learning rate of the last step",
        "warmup": "steps of linear warm-up",
        "weight_decay": "AdamW's, on matrices only",
        "beta1": "AdamW's",
        "beta2": "AdamW's",
        "grad_clip": "largest gradient norm",
        "dtype": "fp32, or bf16 for autocast",
        "seed": "seed of weights, batches and dropout",
        "eval_interval": "steps between validations",
        "checkpoint_interval": "steps between checkpoints",
        "log_interval": "steps between lines of log.jsonl",
    },
}

TRAIN_PACKAGES = ("tokenizers", "tqdm", "matplotlib", "safetensors")


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, and no abbreviations that a later option would break."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fastattn: error: {message}\n")


def let_idle_threads_sleep() -> None:
    """Set OMP_WAIT_POLICY=PASSIVE for this process, unless the user has set it.

    libgomp's idle threads spin by default. On a shared machine they hold the core that the thread they wait for
    needs, and short kernels take a hundred times longer; sleeping costs microseconds. libgomp reads the variable
    when it is loaded, and ``import fastattn`` loads it with torch: then the process has to start again.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        if "torch" in sys.modules:
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="fastattn", description="Fused transformer kernels, and a GPT that trains on them.")
    parser.add_argument("--version", action="version", version=f"fastattn {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_generate(commands)
    _add_demo(commands)
    # The benchmark's options come from the cases beside each op, which need torch; main adds them when asked
    # for.
    commands.add_parser("bench", help="time the kernels beside torch's", add_help=False)
    commands.add_parser("tune", help="measure which backend is faster on this machine", add_help=False)
    return parser


def _add_allocator(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allocator",
        choices=("tuned", "default"),
        default="tuned",
        help="tuned: malloc keeps freed memory, see fastattn.tune_allocator; default: as the system has it (tuned)",
    )


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train a GPT on text",
        description="Train a GPT on text files or folders, by default on Python's own language reference. "
        "Ctrl-C saves and stops; --resume continues as if nothing had happened.",
        argument_default=argparse.SUPPRESS,  # so that --resume knows what was asked for
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the run: checkpoint and log")
    parser.add_argument("--data", nargs="+", metavar="PATH", help="UTF-8 text files, or folders of them")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out; needs no other option")
    _add_allocator(parser)
    for title, options in TRAIN_OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, meaning in options.items():
            default = getattr(TrainConfig, name)
            flag, meaning = f"--{name.replace('_', '-')}", f"{meaning} ({default})"
            if isinstance(default, bool):
                group.add_argument(flag, action=argparse.BooleanOptionalAction, help=meaning)
            else:
                metavar = {int: "N", float: "X", str: "NAME"}[type(default)]
                group.add_argument(flag, type=type(default), metavar=metavar, help=meaning)
    parser.set_defaults(run=_train)


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser("generate", help="sample text from a checkpoint")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="folder of a run")
    parser.add_argument("--prompt", default="\n", metavar="TEXT", help="text to continue (a line's end)")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="tokens to add (200)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0 takes the likeliest (0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample among the likeliest that reach P together")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed gives the same text (0)")
    _add_allocator(parser)
    parser.set_defaults(run=_generate)


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="train for two minutes, sample, compare with torch's kernels",
        description="Train a small GPT on Python's language reference, print a sample, and compare the "
        "training step and its losses with torch's kernels. Writes report.md and report.json.",
    )
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="folder of the run (runs/demo)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, metavar="M", help="train for about this long on two cores (2)")
    length.add_argument("--steps", type=int, metavar="N", help="train for this many steps")
    _add_allocator(parser)
    parser.set_defaults(run=_demo)


def _train(arguments: dict[str, Any]) -> int:
    from fastattn.train.trainer import Interrupted, Trainer

    out = Path(arguments.pop("out"))
    tune_allocator = arguments.pop("allocator") == "tuned"
    data = arguments.pop("data", None)
    if arguments.pop("resume", False):
        trainer = Trainer.resume(out, data, arguments)
        if trainer.progress.step == trainer.config.steps:
            print(f"the run in {out} is finished: {trainer.progress.step} steps")
            return 0
        print(f"continuing after step {trainer.progress.step} of {trainer.config.steps}", file=sys.stderr)
    else:
        trainer = Trainer.start(TrainConfig(**arguments), data or [], out)
    for note in trainer.notes:
        print(f"note: {note}", file=sys.stderr)
    print(
        f"{trainer.model.num_parameters():,} parameters, {len(trainer.dataset.train):,} training tokens, "
        f"{trainer.dataset.validation_bytes:,} validation bytes from {trainer.corpus.name}",
        file=sys.stderr,
    )
    try:
        progress = trainer.run(tune_allocator=tune_allocator)
    except Interrupted as stop:
        return _stopped(stop, f"fastattn train --resume --out {shlex.quote(str(out))}")
    print(
        f"{progress.step} steps in {progress.seconds:.0f} s, validation {progress.val_bits_per_byte:.4f} bits per byte"
    )
    print(f"sample from it: fastattn generate --checkpoint {shlex.quote(str(out))}")
    return 0


def _generate(arguments: dict[str, Any]) -> int:
    from fastattn.allocator import tune_allocator
    from fastattn.generate import generate, load

    if arguments.pop("allocator") == "tuned":
        tune_allocator()
    model, tokenizer = load(Path(arguments.pop("checkpoint")))
    print(generate(model, tokenizer, arguments.pop("prompt"), **arguments))
    return 0


def _demo(arguments: dict[str, Any]) -> int:
    from fastattn.train.demo import DEFAULT_STEPS, STEPS_PER_MINUTE, demo_config, run_demo
    from fastattn.train.trainer import Interrupted

    minutes, steps = arguments["minutes"], arguments["steps"]
    if minutes is not None and not 0 < minutes <= 1e6:
        raise ValueError(f"minutes must be positive and at most 1e6, got {minutes}")
    if steps is None:
        steps = DEFAULT_STEPS if minutes is None else max(1, round(minutes * STEPS_PER_MINUTE))
    out = Path(arguments["out"])
    try:
        failures = run_demo(out, demo_config(steps), tune_allocator=arguments["allocator"] == "tuned")
    except Interrupted as stop:
        length = "" if steps == DEFAULT_STEPS else f" --steps {steps}"
        length += "" if arguments["allocator"] == "tuned" else f" --allocator {arguments['allocator']}"
        return _stopped(stop, f"fastattn demo --out {shlex.quote(str(out))}{length}")
    for failure in failures:
        print(f"fastattn: demo failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _bench(argv: Sequence[str]) -> int:
    from fastattn import bench

    parser = Parser(prog="fastattn bench", description="Time the kernels beside torch's.")
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(argv))


def _tune(argv: Sequence[str]) -> int:
    from fastattn.bench import tune

    parser = Parser(prog="fastattn tune", description="Measure which backend is faster here, and remember it.")
    tune.add_arguments(parser)
    return tune.run(parser.parse_args(argv))


def _stopped(stop: Any, command: str) -> int:
    print(f"\n{stop}; everything is saved. Continue with: {command}", file=sys.stderr)
    return 128 + stop.signum


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, by default the one that this process was started with; returns its exit code."""
    if argv is None:
        argv = sys.argv[1:]
        if argv and argv[0] in ("train", "generate", "demo", "bench", "tune"):
            let_idle_threads_sleep()
    try:
        if argv and argv[0] == "bench":
            return _bench(argv[1:])
        if argv and argv[0] == "tune":
            return _tune(argv[1:])
        arguments = vars(build_parser().parse_args(argv))
        del arguments["command"]
        return arguments.pop("run")(arguments)
    except KeyboardInterrupt:
        print("fastattn: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name not in TRAIN_PACKAGES:
            raise
        return _error(f"this command needs the package {error.name}: pip install 'fastattn[train]'")
    except (ValueError, OSError) as error:
        return _error(str(error))
    except RuntimeError as error:
        return _runtime_error(error)


def _runtime_error(error: RuntimeError) -> int:
    """Errors of ours that people can act on become a line; anything else keeps its traceback."""
    from fastattn.dispatch import BackendUnsupported
    from fastattn.train.trainer import TrainingDiverged

    if isinstance(error, BackendUnsupported):
        return _error(str(error))
    if isinstance(error, TrainingDiverged):
        print(f"fastattn: error: {error}", file=sys.stderr)
        return 1
    raise error


def _error(message: str) -> int:
    print(f"fastattn: error: {message}", file=sys.stderr)
    return 2
