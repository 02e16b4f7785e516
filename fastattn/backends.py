"""Who could run an op on this machine: the backends, the devices they serve, and why one is not there.

A backend is a row in BACKENDS; which ops it serves is said by each op (fastattn/ops/<op>/<backend>.py).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastattn.gpu import devices


@dataclass(frozen=True)
class Backend:
    """name; devices: torch device types it serves (empty: all); probe: None when usable, else the reason."""

    name: str
    devices: tuple[str, ...]
    probe: Callable[[], str | None]

    def reason_against(self, device: str) -> str | None:
        """Why this backend cannot serve tensors on `device` at all; None when it can."""
        if self.devices and device not in self.devices:
            return f"serves {', '.join(self.devices)} tensors, not {device}"
        return probe(self.name)


def _load_native() -> str | None:
    """Loads fastattn._C, whose ops register themselves; says what is wrong when there is none."""
    try:
        importlib.import_module("fastattn._C")
    except ImportError as error:
        folder = Path(__file__).parent
        note = folder / "_native_build.txt"
        if note.exists():
            return f"not built: {note.read_text().strip()}"
        if not any(folder.glob("_C*.so")):
            return "not built: there is no fastattn._C; install with a C++17 compiler at hand"
        return f"broken: {error}"
    return None


# With the package, not with the first call: an exported program that is loaded and run needs the ops, too.
_native_reason = _load_native()


def _probe_cpu() -> str | None:
    if _native_reason is None:
        cpu_isa()  # a wrong FASTATTN_CPU_ISA is the user's mistake: it raises, it is no reason to fall back
    return _native_reason


def has_native_module() -> bool:
    """Whether fastattn._C is there."""
    return _native_reason is None


def native_module() -> Any:
    """fastattn._C; ImportError with the reason when it is not there."""
    if _native_reason is not None:
        raise ImportError(f"fastattn._C: {_native_reason}")
    return importlib.import_module("fastattn._C")


@functools.cache
def cpu_isa() -> str:
    """Name of the instruction set that the cpu backend runs: avx512_bf16, avx512, avx2 or scalar.

    Raises ValueError when FASTATTN_CPU_ISA names one that is unknown or that this machine does not have,
    ImportError when the native module is not there.
    """
    return str(native_module().cpu_isa())


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("cpu", ("cpu",), _probe_cpu),
        Backend("triton", devices.served(), devices.probe),
        Backend("reference", (), lambda: None),
    )
}


def probe(name: str) -> str | None:
    """None when the backend is usable on this machine, else the reason; asked once per backend and process.

    torch.compile runs it while tracing instead of looking inside.
    """
    if name not in _reasons:
        _reasons[name] = BACKENDS[name].probe()
    return _reasons[name]


# What torch.compiler.assume_constant_result does, but that imports the compiler: a second for everybody who imports us.
probe._dynamo_marked_constant = True  # type: ignore[attr-defined]


_reasons: dict[str, str | None] = {}

#: The automatic choice on each device type, best first.
PRIORITY: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}
DEFAULT_PRIORITY: tuple[str, ...] = ("reference",)


def check_name(name: str) -> str:
    """The name itself; ValueError when there is no such backend."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(BACKENDS)}")
    return name
