"""`fastattn tune --device cuda`, with a launcher that does nothing and a clock that is a formula."""

import argparse
import math

import pytest
import torch

from fastattn.bench import launch_cost, tune, tune_gpu
from fastattn.cases import Suite
from fastattn.gpu import devices, measured, tuning
from fastattn.ops.swiglu.cases import SUITES, workload


def test_neighbours_differ_in_one_thing():
    start = {"ROWS": 16, "COLUMNS": 1, "GROUP": 6, "SPLIT": True, "STAGES": 1, "num_warps": 4, "num_stages": 3}
    changed = [{k: v for k, v in options.items() if v != start[k]} for options in tune_gpu.neighbours(start)]
    assert changed == [
        {"ROWS": 8}, {"ROWS": 32}, {"COLUMNS": 2}, {"STAGES": 2}, {"num_warps": 2}, {"num_warps": 8},
        {"num_stages": 2}, {"num_stages": 4},
    ]  # fmt: skip


def by_formula(seconds):
    asked = []

    def timer(candidates):
        asked.extend(candidates)
        return [seconds(**options) for options in candidates]

    return timer, asked


def test_the_search_walks_to_what_is_fastest():
    timer, _ = by_formula(lambda ROWS, num_warps: 1.0 + abs(math.log2(ROWS) - 7) + 0.3 * abs(math.log2(num_warps) - 3))
    found = tune_gpu.search({"ROWS": 32, "num_warps": 8}, timer, rounds=9)
    assert (
        found.options == {"ROWS": 128, "num_warps": 8} and found.faster and (found.began, found.seconds) == (3.0, 1.0)
    )


def test_what_is_within_the_noise_stays():
    timer, _ = by_formula(lambda ROWS: 1.0 if ROWS == 32 else 0.98)
    found = tune_gpu.search({"ROWS": 32}, timer)
    assert found.options == {"ROWS": 32} and not found.faster and found.tried == 3


def test_what_does_not_run_is_never_chosen():
    timer, _ = by_formula(lambda ROWS: math.inf if ROWS != 32 else 1.0)
    assert tune_gpu.search({"ROWS": 32}, timer).options == {"ROWS": 32}


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTATTN_TUNE_FILE", str(tmp_path / "tune.json"))
    tuning.forget()
    yield tmp_path / "tune.gpu.json"
    tuning.forget()


@pytest.mark.compiled
def test_what_is_measured_is_what_is_looked_up(file, monkeypatch):
    """The whole path but the GPU."""
    from triton.runtime.jit import JITFunction

    device = devices.Target("sm_90", 232_448, device="NVIDIA Imaginary")
    small = Suite(**{**vars(SUITES[0]), "workloads": (workload(4, 4096),)})
    launched = []

    class Clock:
        def seconds(self, call):
            launched.clear()
            call()
            return sum(1.0 if options["num_warps"] == 8 else 2.0 for options in launched)

    monkeypatch.setattr(tune_gpu, "_close", lambda a, b: True)
    # Undone before the launcher is put back, or that one would be undone.
    with launch_cost.launching_nothing(), devices.assume(device), monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", lambda self, *args, grid, warmup, **named: launched.append(named))
        tables = tune_gpu.tune([(small, small.workloads[0], torch.bfloat16)], "cpu", Clock(), seconds=0.0)
        assert {name: len(entries) for name, entries in tables["swiglu"].items()} == {"forward": 1, "backward": 1}
        measured.write(file, device.device, tables)
        tuning.forget()
        assert tuning.options("swiglu", "forward", device, size=4096)["num_warps"] == 8
        assert tuning.options("swiglu", "forward", device, size=64)["num_warps"] == 4
    assert tuning.options("swiglu", "forward", devices.KNOWN["sm_90"], size=4096)["num_warps"] == 4


@pytest.mark.compiled
def test_a_forced_option_is_launched_with(monkeypatch):
    device = devices.Target("sm_90", 232_448)
    small = Suite(**{**vars(SUITES[0]), "workloads": (workload(4, 4096),)})
    with launch_cost.launching_nothing(), devices.assume(device):
        (_, forward), *_ = tune_gpu.trials(small, small.workloads[0], torch.bfloat16, "cpu")
        (look_up,) = forward.look_ups()
        with tuning.watched() as seen:
            forward.with_options(look_up, {**look_up.options, "num_warps": 16})()
    assert look_up.options["num_warps"] == 4 and seen[0].options["num_warps"] == 16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_why():
    with pytest.raises(ValueError, match="there is no GPU to tune for: "):
        tune.run(argparse.Namespace(device="cuda", op=None, quick=True, minutes=None, threads=None))
