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
