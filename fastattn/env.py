"""Every environment variable that the library reads, parsed in one place.

| variable           | values                            | meaning                                                   |
|--------------------|-----------------------------------|-----------------------------------------------------------|
| FASTATTN_BACKEND   | a backend's name                  | every op is served by it, or raises; read at import       |
| FASTATTN_CPU_ISA   | scalar, avx2, avx512, avx512_bf16 | the cpu backend's instruction set; read at its first call |
| FASTATTN_TUNE_FILE | a path                            | what `fastattn tune` writes and dispatch reads, instead of|
|                    |                                   | $XDG_CACHE_HOME/fastattn/tune.json (~/.cache)             |
| FASTATTN_DEBUG     | 1                                 | GPU kernels assert that values in tensors are in range;   |
|                    |                                   | read at the first launch                                  |
| FASTATTN_BUILD     | try, require, skip                | what setup.py does about the native build (try: if it can)|

TRITON_INTERPRET=1, Triton's own, runs the triton backend on CPU tensors; read at import, like Triton does.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path


def forced_backend() -> str | None:
    """FASTATTN_BACKEND, or None when it is not set; dispatch checks the name."""
    return os.environ.get("FASTATTN_BACKEND") or None


def interpreting() -> bool:
    """TRITON_INTERPRET: Triton kernels are interpreted, on CPU tensors; in the words that Triton takes for yes."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def debugging() -> bool:
    """FASTATTN_DEBUG: whether kernels for GPUs assert on the values that they are given. Every launch asks."""
    return os.environ.get("FASTATTN_DEBUG", "0") not in ("", "0")


def tune_file_is_set() -> bool:
    """Whether FASTATTN_TUNE_FILE names the file."""
    return bool(os.environ.get("FASTATTN_TUNE_FILE"))


def tune_file() -> Path:
    """Where `fastattn tune` writes and dispatch reads what is faster on this machine."""
    if tune_file_is_set():
        return Path(os.environ["FASTATTN_TUNE_FILE"])
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "fastattn" / "tune.json"
