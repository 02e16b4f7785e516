"""Contenders in turn."""

from fastattn.bench.gpu import timing


class Recorder:
    """A clock on which every call takes what it says."""

    def __init__(self):
        self.order = []

    def seconds(self, call):
        name, taken = call()
        self.order.append(name)
        return taken


def test_everybody_gets_enough_and_the_first_changes():
    clock = Recorder()
    times = timing.interleave({"a": lambda: ("a", 1.0), "b": lambda: ("b", 0.1)}, clock, 1.0)
    assert clock.order[:4] == ["a", "b", "b", "a"]
    assert len(times["a"].seconds) == timing.FEWEST and len(times["b"].seconds) in (10, 11)
    assert times["a"].summary() == {"median_s": 1.0, "p20_s": 1.0, "p80_s": 1.0, "min_s": 1.0, "n": timing.FEWEST}


def test_a_short_call_is_not_taken_forever():
    times = timing.interleave({"a": lambda: ("a", 1e-9)}, Recorder(), 1.0)
    assert len(times["a"].seconds) == timing.MOST
