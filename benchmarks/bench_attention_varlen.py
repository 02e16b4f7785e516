"""pytest-benchmark of attention_varlen: see conftest.py for how to run it and what the parameters are."""

OP = "attention_varlen"


def test_attention_varlen(benchmark, call):
    benchmark(call)
