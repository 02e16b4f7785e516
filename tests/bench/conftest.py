"""`fastattn bench` as it is called."""

import json

import pytest

from fastattn.cli import main


@pytest.fixture
def bench(capsys):
    """Call with arguments of `fastattn bench`: (exit code, lines on stdout, document on the last one)."""

    def run(*arguments):
        code = main(["bench", *arguments])
        lines = capsys.readouterr().out.splitlines()
        return code, lines[:-1], json.loads(lines[-1])

    return run


@pytest.fixture
def bench_briefly(bench):
    """The same, of as few calls as there can be."""
    return lambda op, *arguments: bench(op, "--threads", "1", "--min-time", "0", "--allocator", "tuned", *arguments)
