"""pytest-benchmark of softmax: see conftest.py for how to run it and what the parameters are."""

OP = "softmax"


def test_softmax(benchmark, call):
    benchmark(call)
