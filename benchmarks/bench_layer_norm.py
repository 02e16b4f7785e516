"""pytest-benchmark of layer_norm: see conftest.py for how to run it and what the parameters are."""

OP = "layer_norm"


def test_layer_norm(benchmark, call):
    benchmark(call)
