"""Every environment variable that the library reads, parsed in one place.

| variable         | values                            | meaning                                                   |
|------------------|-----------------------------------|-----------------------------------------------------------|
| FASTATTN_BACKEND | a backend's name                  | every op is served by it, or raises; read at import       |
| FASTATTN_CPU_ISA | scalar, avx2, avx512, avx512_bf16 | the cpu backend's instruction set; read at its first call |
| FASTATTN_BUILD   | try, require, skip                | what setup.py does about the native build (try: if it can)|
"""

from __future__ import annotations

import os


def forced_backend() -> str | None:
    """FASTATTN_BACKEND, or None when it is not set; dispatch checks the name."""
    return os.environ.get("FASTATTN_BACKEND") or None
