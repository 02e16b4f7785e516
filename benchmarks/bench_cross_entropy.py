"""pytest-benchmark of cross_entropy: see conftest.py for how to run it and what the parameters are."""

OP = "cross_entropy"


def test_cross_entropy(benchmark, call):
    benchmark(call)
