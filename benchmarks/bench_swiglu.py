"""pytest-benchmark of swiglu: see conftest.py for how to run it and what the parameters are."""

OP = "swiglu"


def test_swiglu(benchmark, call):
    benchmark(call)
