"""The console script. Beside the package because importing anything of the package imports torch, which takes seconds:
the version does not need it."""

from __future__ import annotations

import sys


def main() -> int:
    """Runs the command line of this process; returns its exit code."""
    if sys.argv[1:] == ["--version"]:
        from importlib.metadata import version

        print(f"fastattn {version('fastattn')}")
        return 0
    from fastattn.cli import main as run

    return run()
