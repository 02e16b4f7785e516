"""Tile sizes that `fastattn tune` measured on this machine's GPUs: the file, read once and written whole or not at all.

It lies beside the file of fastattn/preference.py: tune.json there is tune.gpu.json here. It may hold the measurements
of several devices and releases of Triton; those of others are left alone:

    {"schema": ..., "devices": {"<device>/triton 3.7": {"<op>": {"<kernel>": [{"dtype": "bfloat16", "dim": 128,
     "kind": "", "size": 4096, "options": {...}, "seconds": 1e-3, "committed_seconds": 1.2e-3}]}}}}

A file that cannot be used is an error if FASTATTN_TUNE_FILE says where it is, and otherwise a warning, once.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastattn import documents, env

SCHEMA = "fastattn-gpu-tune-1"

Entry = dict[str, Any]
#: op -> kernel -> entries.
Tables = Mapping[str, Mapping[str, list[Entry]]]


def path() -> Path:
    """Where the file is."""
    return env.tune_file().with_suffix(".gpu.json")


def device_key(device: str) -> str:
    """What measurements are kept under: they say nothing about another device or another compiler."""
    release = ".".join(importlib.metadata.version("triton").split("+")[0].split(".")[:2])
    return f"{device}/triton {release}"


def entries(device: str, op: str, kernel: str) -> list[Entry]:
    """What was measured for a kernel on a device of this name."""
    return _all().get(device_key(device), {}).get(op, {}).get(kernel, [])


@functools.cache
def _all() -> dict[str, Any]:
    document = documents.tuned(path(), read, named=False)
    devices: dict[str, Any] = {} if document is None else document["devices"]
    return devices


def forget() -> None:
    """The file is read again when it is next asked for."""
    _all.cache_clear()


def read(file: Path) -> documents.Document:
    """The document in a file; ValueError when it is not one that `write` made."""
    document = documents.read(file, SCHEMA)
    for found in documents.third_layer(document, "devices", "devices, ops and kernels"):
        if not isinstance(found, list):
            raise ValueError(f"not a list of entries: {found!r:.80}")
        for entry in found:
            if not _is_entry(entry):
                raise ValueError(f"not an entry: {entry!r:.80}")
    return document


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    options, numbers = entry.get("options"), [entry.get("dim"), entry.get("size"), entry.get("seconds")]
    return (
        isinstance(options, dict)
        and all(isinstance(value, int) for value in options.values())
        and all(isinstance(number, int | float) for number in numbers)
        and isinstance(entry.get("kind"), str)
        and isinstance(entry.get("dtype"), str | None)
    )


def write(file: Path, device: str, measured: Tables) -> None:
    """Puts a device's entries into the file, in place of those for the same problems. What is there of others stays; a
    file that is something else is an error (ValueError) and is not touched."""
    document: documents.Document = read(file) if file.exists() else {"schema": SCHEMA, "devices": {}}
    ours = document["devices"].setdefault(device_key(device), {})
    for op, kernels in measured.items():
        for kernel, found in kernels.items():
            kept = ours.setdefault(op, {}).setdefault(kernel, [])
            ours[op][kernel] = [old for old in kept if all(_problem(old) != _problem(new) for new in found)] + found
    documents.write(file, document)


def _problem(entry: Entry) -> tuple[Any, ...]:
    return tuple(entry[name] for name in ("dtype", "dim", "kind", "size"))
