"""The command line: what people type, what they get wrong, and what they read then."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastattn.cli import TRAIN_OPTIONS, main
from fastattn.train.config import TrainConfig
from fastattn.version import __version__

TINY = [
    *("--vocab-size=270", "--block-size=16", "--n-layer=1", "--n-head=2", "--n-embd=16", "--batch-size=2"),
    *("--warmup=2", "--eval-interval=4", "--checkpoint-interval=3"),
]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} little ducks went swimming one day, over the hills.\n" for i in range(99)))
    return path


def fastattn(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "fastattn", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def error_line(capsys, *arguments, code=2):
    """Run a command that must fail with one line on stderr; returns the line."""
    try:
        result = main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        result = exit_.code
    captured = capsys.readouterr()
    assert result == code, captured.err
    assert captured.out == ""
    assert re.fullmatch(r"fastattn: error: [^\n]+\n", captured.err), captured.err
    return captured.err


def test_version_and_help_in_a_process():
    result = fastattn("--version")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"fastattn {__version__}\n", "")
    result = fastattn("--help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in ("train", "generate", "demo", "bench"))


def test_the_console_script_tells_its_version_without_torch():
    code = "import sys, fastattn_cli; code = fastattn_cli.main(); sys.exit(code or 3 * ('torch' in sys.modules))"
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", code, "--version"], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, f"fastattn {__version__}\n", "")


def test_every_setting_has_its_option(capsys):
    assert [name for group in TRAIN_OPTIONS.values() for name in group] == list(TrainConfig().to_dict())
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--help"])
    assert exit_.value.code == 0
    help_text = capsys.readouterr().out
    for name in TrainConfig().to_dict():
        assert f"--{name.replace('_', '-')}" in help_text


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_idle_threads_sleep_unless_the_user_says_otherwise(tmp_path, given, expected):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if given:
        environment["OMP_WAIT_POLICY"] = given
    environment["OMP_DISPLAY_ENV"] = "TRUE"  # libgomp then prints what it has read
    arguments = [sys.executable, "-m", "fastattn", "generate", "--checkpoint", tmp_path]
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    policies = re.findall(r"OMP_WAIT_POLICY = '(\w+)'", result.stderr)
    assert policies[-1] == expected, "of the process that does the work"


def test_train_resume_generate(capsys, text_file, tmp_path):
    out = str(tmp_path / "run")
    assert main(["train", "--data", str(text_file), "--out", out, "--steps", "6", *TINY]) == 0
    captured = capsys.readouterr()
    assert "6 steps" in captured.out and "bits per byte" in captured.out
    assert "loss=" in captured.err and "tokens/s" in captured.err, "the progress bar"
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 6

    assert main(["train", "--resume", "--out", out]) == 0
    assert "is finished" in capsys.readouterr().out

    texts = []
    for seed in ("3", "3", "4"):
        arguments = ["generate", "--checkpoint", out, "--prompt", "5 little", "--max-new-tokens", "20"]
        assert main([*arguments, "--top-k", "50", "--top-p", "0.99", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("5 little")


def test_ctrl_c_saves_exits_with_130_and_says_how_to_go_on(text_file, tmp_path):
    out = tmp_path / "a run"
    arguments = [sys.executable, "-m", "fastattn", "train", "--data", text_file, "--out", out, *TINY]
    process = subprocess.Popen([*arguments, "--steps", "100000"], stderr=subprocess.PIPE, text=True)
    log = out / "log.jsonl"
    deadline = time.monotonic() + 100
    while not (log.exists() and log.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert f"stopped after step {steps[-1]} by SIGINT" in errors
    assert f"fastattn train --resume --out '{out}'" in errors
    assert "Traceback" not in errors


def test_bad_data(capsys, text_file, tmp_path):
    (tmp_path / "latin1.txt").write_bytes(b"\xe9" * 100)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "folder").mkdir()
    out = tmp_path / "run"
    for name, message in (
        ("missing.txt", "no such file or folder"),
        ("latin1.txt", "not UTF-8"),
        ("empty.txt", "no text in"),
        ("short.txt", "the corpus is too short"),
        ("folder", "no files in"),
    ):
        assert message in error_line(capsys, "train", "--data", tmp_path / name, "--out", out)
    assert "too short" in error_line(capsys, "train", "--data", text_file, "--out", out, *TINY, "--block-size", "9999")
    assert not out.exists()
    assert "not a folder" in error_line(capsys, "train", "--data", text_file, "--out", text_file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "steps must be an integer of at least 1, got 0"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--lr", "nan"], "lr must be positive and finite, got nan"),
        (["--n-head", "7"], "n_embd must be a multiple of n_head"),
        (["--dropout", "1"], "dropout must be in [0, 1), got 1.0"),
        (["--dtype", "fp8"], "dtype must be one of fp32, bf16, got 'fp8'"),
        (["--kernels", "tpu"], "kernels must be one of fastattn, torch, got 'tpu'"),
        (["--vocab-size", "100"], "vocab_size must be an integer of at least 256"),
        (["--layers", "3"], "unrecognized arguments: --layers 3"),
    ],
)
def test_bad_values(capsys, text_file, tmp_path, options, message):
    out = tmp_path / "run"
    assert message in error_line(capsys, "train", "--data", text_file, "--out", out, *options)
    assert not out.exists()


def test_bad_commands(capsys):
    assert "required: COMMAND" in error_line(capsys)
    assert "invalid choice: 'trian'" in error_line(capsys, "trian")
    assert "required: --out" in error_line(capsys, "train")
    assert "required: --checkpoint" in error_line(capsys, "generate")
    assert "not allowed with" in error_line(capsys, "demo", "--steps", "3", "--minutes", "1")


@pytest.mark.parametrize("options", [["--minutes", "0"], ["--minutes", "nan"], ["--steps", "0"]])
def test_bad_demo_lengths(capsys, tmp_path, options):
    error_line(capsys, "demo", "--out", tmp_path / "demo", *options)
    assert not (tmp_path / "demo").exists()


def test_bad_checkpoints(capsys, text_file, tmp_path):
    out = tmp_path / "run"
    assert "no checkpoint in" in error_line(capsys, "train", "--resume", "--out", out)
    assert "no checkpoint in" in error_line(capsys, "generate", "--checkpoint", out)
    assert main(["train", "--data", str(text_file), "--out", str(out), "--steps", "2", *TINY]) == 0
    capsys.readouterr()
    assert "already holds a run" in error_line(capsys, "train", "--data", text_file, "--out", out)
    assert "n_embd=32 (not 16)" in error_line(capsys, "train", "--resume", "--out", out, "--n-embd", "32")
    assert "temperature must be" in error_line(capsys, "generate", "--checkpoint", out, "--temperature", "-1")
    assert "prompt must have" in error_line(capsys, "generate", "--checkpoint", out, "--prompt", "")
    checkpoint = out / "checkpoint.safetensors"
    whole = checkpoint.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-100] + bytes(100), b""):
        checkpoint.write_bytes(content)
        assert "damaged" in error_line(capsys, "train", "--resume", "--out", out)
        assert "damaged" in error_line(capsys, "generate", "--checkpoint", out)


def test_a_missing_package_is_named():
    code = "import sys; sys.modules['tokenizers'] = None; from fastattn.cli import main; sys.exit(main())"
    result = subprocess.run([sys.executable, "-c", code, "train", "--out=x"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == (
        "fastattn: error: this command needs the package tokenizers: pip install 'fastattn[train]'\n"
    )


def test_keyboard_interrupt_outside_training(capsys, monkeypatch):
    from fastattn.train import trainer

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "load_corpus", interrupt)
    assert main(["train", "--out", "anywhere"]) == 130
    assert capsys.readouterr().err == "fastattn: interrupted\n"


def test_divergence_is_one_line_and_exit_code_1(capsys, text_file, tmp_path, monkeypatch):
    from fastattn.train import trainer

    monkeypatch.setattr(trainer, "training_step", lambda *args: (float("nan"), 1.0))
    arguments = ["train", "--data", str(text_file), "--out", str(tmp_path / "run"), "--steps", "3", *TINY]
    assert main(arguments) == 1
    assert "fastattn: error: step 1: loss nan" in capsys.readouterr().err
