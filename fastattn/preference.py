"""Which backend is the faster one, where an op's capabilities leave a choice: measured before, never inside a call.

An op that has preferences sorts its problems into classes (`Op(preference_class=...)`); for a class there is an entry
in the file that `fastattn tune` wrote on this machine, or else in TABLE, which is part of the library. Where there is
neither, torch's own kernels are preferred: an op never makes an unknown machine slower. On GPUs they are preferred
always: the vendor's library of products is what a portable kernel would have to beat.

The file is FASTATTN_TUNE_FILE, or fastattn/tune.json in $XDG_CACHE_HOME (~/.cache). It may hold the measurements of
several machines; those of others are left alone. A file that cannot be read is an error if FASTATTN_TUNE_FILE names it,
and otherwise a warning, once; TABLE is used then.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastattn import backends, documents, env, machine

SCHEMA = "fastattn-tune-1"

#: (vendor/instruction set) -> op -> class -> (backend, why), measured on one core of a Zen 5; the smaller sets with
#: FASTATTN_CPU_ISA, where torch still uses all that the machine has. A Zen 4, whose AVX-512 multiplies no faster than
#: AVX2, agrees on avx512_bf16: float32 1.06 to 1.18 times, bfloat16 1.01 to 1.10 times as fast as torch's.
TABLE: dict[str, dict[str, dict[str, tuple[str, str]]]] = {
    "amd/avx512_bf16": {
        "linear": {
            "float32": ("cpu", "2.0 to 2.2 times as fast as torch's matmul on Zen 5, 1.1 times on Zen 4"),
            "float32, one row": ("reference", "torch's matrix-vector product is 1.1 to 2 times as fast"),
            "bfloat16": ("cpu", "as fast as torch's matmul, and float32 weights need no cast"),
            "bfloat16, one row": ("cpu", "1.3 times as fast as torch's matmul"),
        },
    },
    "amd/avx512": {
        "linear": {
            "float32": ("cpu", "2.0 to 2.2 times as fast as torch's matmul"),
            "float32, one row": ("reference", "torch's matrix-vector product is 1.2 to 1.3 times as fast"),
            "bfloat16": ("reference", "torch's matmul with bf16 dot products is 1.6 times as fast"),
            "bfloat16, one row": ("reference", "torch's matmul with bf16 dot products is 1.1 to 1.6 times as fast"),
        },
    },
    "amd/avx2": {
        "linear": {
            "float32": ("cpu", "1.2 times as fast as torch's matmul"),
            "float32, one row": ("reference", "torch's matrix-vector product is 1.4 to 1.7 times as fast"),
            "bfloat16": ("reference", "torch's matmul with bf16 dot products is 2 to 3 times as fast"),
            "bfloat16, one row": ("reference", "torch's matmul with bf16 dot products is 2 times as fast"),
        },
    },
}

#: Whoever could call torch's bare function instead does, for a float32 product of fewer multiplications: the way to our
#: kernel costs more than it saves. On a Zen 4 ours is 0.5 to 0.9 times as fast below, from 0.9 to 1.6 times above. In
#: bfloat16 it is torch's call that is long (ours is 1.2 to 1.8 times as fast below), and an activation is a call more.
SHORT_PRODUCT = 2**21


@dataclass(frozen=True)
class Preference:
    """backend; source: where that was measured; why: in words for people."""

    backend: str
    source: str
    why: str

    def __str__(self) -> str:
        return f"preferred: {self.backend} ({self.source}: {self.why})"


def platform_name() -> str:
    """Vendor of the processor and the instruction set in use: what TABLE is keyed by."""
    return f"{machine.cpu_vendor()}/{backends.cpu_isa()}"


def machine_key() -> str:
    """What the file is keyed by: a measurement says nothing about another processor or another torch."""
    release = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    return f"{platform_name()}/{machine.cpu_name()}/torch {release}"


def preferred(op: str, problem_class: str) -> Preference:
    """The preference for a class of an op's problems on this machine's CPU; torch.compile takes it for a constant."""
    measured = _tuned().get(op, {}).get(problem_class)
    if measured is not None:
        return Preference(measured["backend"], f"tuned, {env.tune_file()}", _times(measured))
    name = platform_name()
    known = TABLE.get(name, {}).get(op, {}).get(problem_class)
    if known is not None:
        return Preference(known[0], f"table {name}, {problem_class}", known[1])
    return Preference("reference", f"no entry for {name}, {problem_class}", "`fastattn tune` measures it")


def preferred_on_gpus() -> Preference:
    """The preference for every problem of an op that has preferences; torch.compile takes it for a constant."""
    return Preference("reference", "on GPUs", "torch's products are the vendor's own (cuBLAS, rocBLAS)")


# What torch.compiler.assume_constant_result does, but that imports the compiler.
preferred._dynamo_marked_constant = True  # type: ignore[attr-defined]
preferred_on_gpus._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _times(entry: dict[str, Any]) -> str:
    return ", ".join(f"{name} {seconds * 1e6:.0f} us" for name, seconds in entry["seconds"].items())


@functools.cache
def _tuned() -> dict[str, Any]:
    """op -> class -> entry, of this machine, from the file."""
    document = documents.tuned(env.tune_file(), read, named=True)
    ours: dict[str, Any] = {} if document is None else document["machines"].get(machine_key(), {})
    return ours


def forget() -> None:
    """The file is read again when it is next asked for."""
    _tuned.cache_clear()


def read(path: Path) -> documents.Document:
    """The document in the file; ValueError when it is not one that `write` made."""
    document = documents.read(path, SCHEMA)
    for entry in documents.third_layer(document, "machines", "machines, ops and classes"):
        seconds = entry.get("seconds") if isinstance(entry, dict) else None
        numbers = isinstance(seconds, dict) and all(isinstance(s, int | float) for s in seconds.values())
        if not numbers or entry.get("backend") not in backends.BACKENDS:
            raise ValueError(f"not an entry with a backend and seconds: {entry!r:.80}")
    return document


def write(path: Path, measured: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Puts this machine's entries (op -> class -> {"backend", "seconds"}) into the file, whole or not at all.

    Other machines' entries stay; a file that is something else is an error (ValueError) and is not touched.
    """
    document: documents.Document = read(path) if path.exists() else {"schema": SCHEMA, "machines": {}}
    document["machines"].setdefault(machine_key(), {}).update(measured)
    documents.write(path, document)
