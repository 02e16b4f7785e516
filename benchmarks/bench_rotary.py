"""pytest-benchmark of rotary: see conftest.py for how to run it and what the parameters are."""

OP = "rotary"


def test_rotary(benchmark, call):
    benchmark(call)
