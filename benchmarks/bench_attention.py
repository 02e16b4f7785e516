"""pytest-benchmark of attention: see conftest.py for how to run it and what the parameters are."""

OP = "attention"


def test_attention(benchmark, call):
    benchmark(call)
