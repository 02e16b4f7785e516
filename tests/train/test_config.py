"""Settings: the schedule, ranges, and which may change on resume."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from fastattn.train.config import TrainConfig


def test_schedule_warms_up_then_follows_half_a_cosine():
    config = TrainConfig(steps=111, warmup=10, lr=1.0, min_lr=0.1)
    rates = [config.learning_rate(step) for step in range(config.steps)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[10:]))


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 5), (2, 1), (5, 5), (5, 100)])
def test_schedule_of_short_runs_stays_in_range(steps, warmup):
    config = TrainConfig(steps=steps, warmup=warmup, lr=1.0, min_lr=0.0)
    assert all(0.0 <= config.learning_rate(step) <= 1.0 for step in range(steps))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 255),
        ("block_size", 0),
        ("steps", 0),
        ("steps", 2.5),
        ("batch_size", -1),
        ("warmup", -1),
        ("seed", -1),
        ("seed", 2**63),
        ("n_head", 3),
        ("dropout", 1.0),
        ("beta2", 1.0),
        ("lr", 0.0),
        ("lr", math.nan),
        ("lr", math.inf),
        ("min_lr", 1.0),
        ("weight_decay", -0.1),
        ("grad_clip", 0.0),
        ("dtype", "fp64"),
        ("kernels", "numpy"),
    ],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=rf"{field}.*{value}"):
        TrainConfig(**{field: value})


def test_dict_round_trip_and_foreign_fields():
    config = TrainConfig(steps=7)
    assert TrainConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="n_experts"):
        TrainConfig.from_dict({**config.to_dict(), "n_experts": 8})


def test_differences_name_only_what_would_change_the_weights():
    config = TrainConfig()
    assert not config.differences(replace(config, log_interval=50, eval_interval=3, checkpoint_interval=9))
    assert replace(config, n_layer=9).differences(config) == ["n_layer=9 (not 4)"]
