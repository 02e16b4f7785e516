"""What this machine can do at most: multiply-adds, bf16 dot products, reading and copying at each level of memory.

Speeds mean little without the speed of light beside them, and on a shared machine that changes from hour to hour: it
is measured in the run that uses it, by the loops of csrc/ceilings, as the best of many short windows (a window that a
neighbour disturbed is not a ceiling). Every ceiling is measured once per process and is None without the native
module; `fastattn.backends.probe("cpu")` says why that is not there.

Units: operations per second (a multiply-add is two) and bytes per second (a copy moves what it reads and what it
writes).
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from fastattn import machine

COMPUTE_SECONDS = 0.25
BANDWIDTH_SECONDS = 0.25
WINDOW_SECONDS = 5e-4
#: Buffers are whole numbers of these (csrc/ceilings/params.h: kCeilingStep floats).
STEP_BYTES = 1024
LINE_BYTES = 64
WAKE_SECONDS = 5e-4


@dataclass(frozen=True)
class KnownCpu:
    """What one core of a processor reaches when nothing disturbs it: operations per second, by instruction set.

    vendor, family, models: as in /proc/cpuinfo; a family has several designs, and a design several clocks.
    least: (multiply-adds, bf16 dot products or None); a run with less was throttled or disturbed.
    """

    name: str
    vendor: str
    family: int
    models: range
    least: Mapping[str, tuple[float, float | None]]


#: Measured on virtual machines in quiet hours, less five percent.
KNOWN_CPUS = (
    KnownCpu(
        "AMD Zen 5 EPYC",
        "AuthenticAMD",
        26,
        range(0x00, 0x20),
        {"avx512_bf16": (270e9, 545e9), "avx512": (270e9, None), "avx2": (135e9, None)},
    ),
    # AVX-512 in two halves: no more multiply-adds than AVX2.
    KnownCpu(
        "AMD Zen 4 EPYC",
        "AuthenticAMD",
        25,
        range(0x10, 0x20),
        {"avx512_bf16": (112e9, 224e9), "avx512": (112e9, None), "avx2": (112e9, None)},
    ),
)

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def _native() -> Any:
    """fastattn._C, or None: the package works without it, and backends.probe tells people why it is not there."""
    try:
        from fastattn import _C
    except ImportError:
        return None
    return _C


def _check(threads: int, size: int = STEP_BYTES) -> None:
    if threads < 1:
        raise ValueError(f"ceilings are of 1 thread or more, got {threads}")
    if size < 1:
        raise ValueError(f"a working set has 1 byte or more, got {size}")


def _together(threads: int, measure: Callable[[int, float], Any]) -> list[Any]:
    """measure(thread, start_at) on every thread, all of them starting at one moment."""
    if threads == 1:
        return [measure(0, 0.0)]
    ready = threading.Barrier(threads)
    start_at = time.monotonic() + WAKE_SECONDS

    def run(thread: int) -> Any:
        ready.wait()
        return measure(thread, start_at)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, range(threads)))


def fma(threads: int = 1, isa: str | None = None) -> float | None:
    """fp32 multiply-add operations per second of `threads` threads together.

    isa: an instruction set of this build; the one in use by default. ValueError when it cannot be had.
    """
    _check(threads)
    native = _native()
    return None if native is None else _rate("ceiling_fma", isa or native.cpu_isa(), threads)


def dot(threads: int = 1, isa: str | None = None) -> float | None:
    """bf16 dot-product operations per second; None also where the instruction set has no such instruction."""
    _check(threads)
    native = _native()
    return None if native is None else _rate("ceiling_dot", isa or native.cpu_isa(), threads)


@functools.cache
def _rate(loop: str, isa: str, threads: int) -> float | None:
    measure = getattr(_native(), loop)
    rates = _together(threads, lambda _, start_at: measure(isa, COMPUTE_SECONDS, start_at))
    return None if rates[0] is None else sum(rates)


def arithmetic(dtype: torch.dtype, threads: int = 1) -> float | None:
    """The fastest way to multiply and add this dtype into fp32: dot products for bf16 where there are, else fma."""
    if dtype == torch.bfloat16:
        return dot(threads) or fma(threads)
    return fma(threads)


def read_bandwidth(size: int, threads: int = 1) -> float | None:
    """Bytes per second read from a warm working set of `size` bytes, shared out among the threads."""
    _check(threads, size)
    native = _native()
    return None if native is None else _read(native.cpu_isa(), size, threads)


@functools.cache
def _read(isa: str, size: int, threads: int) -> float:
    loop = _native().ceiling_read
    sources = [_buffer(_share(size, threads)) for _ in range(threads)]

    def measure(passes: int) -> list[tuple[float, float]]:
        return _together(threads, lambda t, start_at: loop(isa, sources[t], passes, start_at))

    return sum(s.nbytes for s in sources) / _seconds_of_a_pass(measure)


def copy_bandwidth(size: int, threads: int = 1) -> float | None:
    """Bytes per second, read and written together, of a warm copy that moves `size` bytes (half of them read)."""
    _check(threads, size)
    native = _native()
    return None if native is None else _copy(native.cpu_isa(), size, threads)


@functools.cache
def _copy(isa: str, size: int, threads: int) -> float:
    loop = _native().ceiling_copy
    each = _share((size + 1) // 2, threads)
    pairs = [(_buffer(each), _buffer(each)) for _ in range(threads)]

    def measure(passes: int) -> list[tuple[float, float]]:
        return _together(threads, lambda t, start_at: loop(isa, *pairs[t], passes, start_at))

    return 2 * each * threads / _seconds_of_a_pass(measure)


def _share(size: int, threads: int) -> int:
    each = -(-size // threads)
    return -(-each // STEP_BYTES) * STEP_BYTES


def _buffer(size: int) -> numpy.ndarray:
    """Touched and aligned."""
    memory = numpy.ones(size + LINE_BYTES, numpy.uint8)
    begin = -memory.ctypes.data % LINE_BYTES
    return memory[begin : begin + size]


def _seconds_of_a_pass(measure: Callable[[int], list[tuple[float, float]]]) -> float:
    """The best window: from the first thread's beginning to the last one's end, over the passes in it."""

    def window(passes: int) -> float:
        spans = measure(passes)
        return max(end for _, end in spans) - min(begin for begin, _ in spans)

    passes, taken = 1, window(1)
    while taken < WINDOW_SECONDS:
        passes *= 2
        taken = window(passes)
    best, deadline = taken, time.monotonic() + BANDWIDTH_SECONDS
    while time.monotonic() < deadline:
        best = min(best, window(passes))
    return best / passes


@functools.cache
def cache_sizes() -> dict[int, int]:
    """Bytes of the caches that hold data by level, as the system tells: {1: ..., 2: ..., 3: ...}; {} if it does not."""
    sizes: dict[int, int] = {}
    for folder in sorted(CACHES.glob("index*")):
        if (folder / "type").read_text().strip() in ("Data", "Unified"):
            text = (folder / "size").read_text().strip()
            sizes[int((folder / "level").read_text())] = int(text.removesuffix("K")) * 1024
    return sizes


def working_sets(threads: int = 1) -> dict[str, int]:
    """A size in bytes, for all threads together, that fits well into each level of memory and not into the one before.

    The last level of cache is taken as shared, the others as each core's own.
    """
    caches = cache_sizes() or {2: 1 << 20, 3: 32 << 20}
    last = max(caches)
    sizes = {
        f"L{level}": size // 2 * (1 if level == last and level > 2 else threads)
        for level, size in caches.items()
        if level >= 2
    }
    return {**sizes, "DRAM": max(4 * caches[last], 64 << 20)}


def summary(threads: int = 1) -> dict[str, Any] | None:
    """All ceilings of the instruction set in use, for reports; None without the native module. About two seconds."""
    native = _native()
    if native is None:
        return None
    return {
        "isa": native.cpu_isa(),
        "threads": threads,
        "fma": fma(threads),
        "dot": dot(threads),
        "working_sets": working_sets(threads),
        "read": {level: read_bandwidth(size, threads) for level, size in working_sets(threads).items()},
        "copy": {level: copy_bandwidth(size, threads) for level, size in working_sets(threads).items()},
    }


@dataclass(frozen=True)
class Validity:
    """valid: whether arithmetic ran at the speed that this processor is known for; None: it is not in KNOWN_CPUS."""

    valid: bool | None
    remark: str


def known_cpu(vendor: str, family: int, model: int) -> KnownCpu | None:
    """The entry of KNOWN_CPUS that is this processor's."""
    return next(
        (cpu for cpu in KNOWN_CPUS if (cpu.vendor, cpu.family) == (vendor, family) and model in cpu.models), None
    )


def validity(threads: int = 1) -> Validity | None:
    """Whether times taken in this run mean anything beyond this run; None without the native module."""
    native = _native()
    if native is None:
        return None
    known = known_cpu(*machine.cpu_identity())
    least = None if known is None else known.least.get(native.cpu_isa())
    if known is None or least is None:
        return Validity(None, "the ceilings of this processor are not known: nothing to judge the run by")
    names, found = ("fp32 multiply-add", "bf16 dot"), (fma(threads), dot(threads))
    short = [
        f"{name} {rate / threads / 1e9:.0f} GF/s"
        for name, rate, wanted in zip(names, found, least, strict=True)
        if rate is not None and wanted is not None and rate / threads < wanted
    ]
    wanted = " and ".join(f"{rate / 1e9:.0f}" for rate in least if rate is not None)
    if short:
        return Validity(
            False,
            f"INVALID run, throttled or disturbed: {', '.join(short)} per core; {known.name} has {wanted} or more",
        )
    return Validity(True, f"ceilings as {known.name} has them: {wanted} GF/s per core or more")
