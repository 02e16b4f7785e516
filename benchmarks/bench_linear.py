"""pytest-benchmark of linear: see conftest.py for how to run it and what the parameters are."""

OP = "linear"


def test_linear(benchmark, call):
    benchmark(call)
