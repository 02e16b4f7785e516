"""pytest-benchmark of silu: see conftest.py for how to run it and what the parameters are."""

OP = "silu"


def test_silu(benchmark, call):
    benchmark(call)
