"""Times and memory: who is called when, what counts, and what a call really takes."""

import time
import weakref

import pytest
import torch

from fastattn.bench import measure


class Clock:
    """A clock that the calls themselves advance."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def call(self, name, seconds, log):
        def run():
            log.append(name)
            self.now += seconds

        return run


def test_contenders_take_turns_and_the_first_one_changes():
    clock, log = Clock(), []
    calls = {name: clock.call(name, 1.0, log) for name in "abc"}
    times = measure.interleave(calls, clock, min_seconds=0.0, min_samples=3)
    assert "".join(log) == "abc" + "bca" + "cab"
    assert all(t.seconds == [1.0] * 3 for t in times.values())


def test_who_has_enough_drops_out_but_the_first_stays():
    clock, log = Clock(), []
    calls = {
        "ours": clock.call("ours", 0.5, log),
        "slow": clock.call("slow", 3.0, log),
        "mid": clock.call("mid", 1.0, log),
    }
    times = measure.interleave(calls, clock, min_seconds=4.0, min_samples=1)
    assert {name: len(t.seconds) for name, t in times.items()} == {"ours": 8, "slow": 2, "mid": 4}
    assert log[-1] == "ours"


def test_who_is_far_behind_needs_fewer_samples():
    clock, log = Clock(), []
    calls = {name: clock.call(name, seconds, log) for name, seconds in {"a": 1.0, "b": 1.9, "c": 2.1}.items()}
    times = measure.interleave(calls, clock, min_seconds=0.0, min_samples=4)
    assert {name: len(t.seconds) for name, t in times.items()} == {"a": 4, "b": 4, "c": 2}


def test_short_calls_begin_with_one_that_does_not_count():
    clock, log = Clock(), []
    times = measure.Times()
    measure._turn(clock.call("a", measure.COLD_SECONDS / 2, log), clock, times)
    assert len(times.seconds) == len(log) - 1 >= 1

    times, log = measure.Times(), []
    measure._turn(clock.call("a", measure.COLD_SECONDS * 2, log), clock, times)
    assert len(times.seconds) == len(log) == 1


def test_samples_are_limited():
    calls = {"a": lambda: None}
    times = measure.interleave(calls, time.perf_counter, min_seconds=3600.0, min_samples=1)
    assert measure.MOST_SAMPLES <= len(times["a"].seconds) < 100 * measure.MOST_SAMPLES


def test_results_are_gone_before_the_next_call():
    class Result:
        pass

    alive = []

    def call():
        assert all(ref() is None for ref in alive)
        result = Result()
        alive.append(weakref.ref(result))
        return result

    measure.interleave({"a": call}, time.perf_counter, min_seconds=0.0, min_samples=3)
    assert len(alive) > 3


def test_summary():
    times = measure.Times([4.0, 1.0, 2.0, 3.0, 5.0], wall=10.0, cpu=15.0, faults=10)
    assert times.summary() == {
        "median_s": 3.0,
        "p20_s": pytest.approx(1.8),
        "p80_s": pytest.approx(4.2),
        "min_s": 1.0,
        "n": 5,
        "cores_busy": 1.5,
        "page_faults": 2.0,
    }


@pytest.mark.parametrize("q, expected", [(0.0, 1.0), (0.5, 2.5), (1.0, 4.0), (0.25, 1.75)])
def test_quantile(q, expected):
    assert measure.quantile([4.0, 2.0, 1.0, 3.0], q) == expected


def test_one_thread_is_timed_by_its_own_cpu_time():
    name, clock = measure.clock_for(1)
    assert name == "thread_cpu"
    began = clock()
    time.sleep(0.05)
    assert clock() - began < 0.04
    assert measure.clock_for(2)[0] == "wall"


@pytest.mark.skipif(not measure.CLEAR_REFS.exists(), reason="needs Linux's /proc")
def test_peak_memory_counts_what_is_freed_within_the_call():
    def call():
        large = torch.ones(24 << 20, dtype=torch.uint8)
        small = large[: 8 << 20].clone()
        return small

    result, extra = measure.peak_memory(call)
    assert result.shape == (8 << 20,)
    assert extra == pytest.approx(32 << 20, rel=0.15)
    assert measure.peak_memory(lambda: None)[1] < 1 << 20


def test_peak_memory_is_none_where_the_system_cannot_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    assert measure.peak_memory(lambda: "result") == ("result", None)
