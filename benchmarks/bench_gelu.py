"""pytest-benchmark of gelu: see conftest.py for how to run it and what the parameters are."""

OP = "gelu"


def test_gelu(benchmark, call):
    benchmark(call)
