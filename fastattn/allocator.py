"""Fresh pages: why large results cost more than computing them, and the one call that changes it.

glibc takes every block of 32 MiB and more from the system anew and gives it back when it is freed. The system fills
new pages with zeros, one fault for every 4 KiB: writing a fresh tensor takes four to five times as long as writing one
that was there before. With larger thresholds freed memory is kept and used again.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AllocatorTuning:
    """tuned: whether malloc now keeps large blocks. what: was done, or why nothing was; also the text of `str`."""

    tuned: bool
    what: str

    def __bool__(self) -> bool:
        return self.tuned

    def __str__(self) -> str:
        return self.what


_last: dict[str, AllocatorTuning | None] = {"tuning": None}


def tune_allocator() -> AllocatorTuning:
    """Lets malloc keep the memory of freed tensors, for the whole process and for good; may be called again.

    Only glibc's malloc is changed (M_MMAP_THRESHOLD 1 GiB, M_TRIM_THRESHOLD unlimited, M_TOP_PAD 64 MiB); where another
    library serves malloc (jemalloc, tcmalloc, mimalloc; musl, macOS) nothing is done and the answer says so. The
    price: the process keeps its peak memory until it ends. Never called by `import fastattn`: a library does not
    change its host's memory. The command line and the Trainer do call it.

    Tensors of 1 GiB and more, and those of threads other than the main one beyond 64 MiB, still get fresh pages.
    """
    try:
        from fastattn import _C
    except ImportError as error:
        tuning = AllocatorTuning(False, f"needs fastattn._C, which is not there ({error}): nothing was set")
    else:
        tuning = AllocatorTuning(*_C.tune_allocator())
    _last["tuning"] = tuning
    return tuning


def is_tuned() -> bool:
    """Whether `tune_allocator` has changed this process."""
    return bool(_last["tuning"])
