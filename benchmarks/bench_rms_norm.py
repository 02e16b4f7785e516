"""pytest-benchmark of rms_norm: see conftest.py for how to run it and what the parameters are."""

OP = "rms_norm"


def test_rms_norm(benchmark, call):
    benchmark(call)
