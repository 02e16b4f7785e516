"""pytest-benchmark of decode: see conftest.py for how to run it and what the parameters are."""

OP = "decode"


def test_decode(benchmark, call):
    benchmark(call)
