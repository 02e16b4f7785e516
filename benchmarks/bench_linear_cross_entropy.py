"""pytest-benchmark of linear_cross_entropy: see conftest.py for how to run it and what the parameters are."""

OP = "linear_cross_entropy"


def test_linear_cross_entropy(benchmark, call):
    benchmark(call)
