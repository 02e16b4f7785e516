"""What a measurement was made on: processor, system, memory allocator, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastattn import allocator as allocator_settings
from fastattn.version import __version__

#: Settings that change what a call costs.
ENVIRONMENT = (
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_CPU_AFFINITY", "KMP_BLOCKTIME", "KMP_AFFINITY"),
    *("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"),
    *("MALLOC_CONF", "THP_MEM_ALLOC_ENABLE", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"),
    *("FASTATTN_BACKEND", "FASTATTN_CPU_ISA", "FASTATTN_TUNE_FILE"),
)


#: (vendor, family) -> design -> models, as /proc/cpuinfo has them (and as Linux tells AMD's designs apart).
DESIGNS: dict[tuple[str, int], dict[str, tuple[range, ...]]] = {
    ("AuthenticAMD", 25): {
        "Zen 3": (range(0x00, 0x10), range(0x20, 0x60)),
        "Zen 4": (range(0x10, 0x20), range(0x60, 0xB0)),
    },
    ("AuthenticAMD", 26): {"Zen 5": (range(0x00, 0x30), range(0x40, 0x50), range(0x60, 0x80))},
}


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def cpu_identity() -> tuple[str, int, int]:
    """(vendor, family, model) as /proc/cpuinfo has them; ("", 0, 0) where there is none."""
    cpuinfo = Path("/proc/cpuinfo")
    found: dict[str, str] = {}
    if cpuinfo.exists():
        for line in cpuinfo.read_text().partition("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            found[name.strip()] = value.strip()
    return found.get("vendor_id", ""), int(found.get("cpu family", 0)), int(found.get("model", 0))


def cpu_design(vendor: str, family: int, model: int) -> str | None:
    """The design behind the numbers of cpu_identity(): virtual machines seldom name it. None: not in DESIGNS."""
    designs = DESIGNS.get((vendor, family), {})
    return next((name for name, models in designs.items() if any(model in part for part in models)), None)


def cpu_vendor() -> str:
    """amd, intel, arm, apple; or what the system calls it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "vendor_id":
                known = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}
                return known.get(value.strip(), value.strip().lower())
            if name.strip() == "CPU implementer":
                return "arm" if value.strip() == "0x41" else value.strip()
    return "apple" if platform.system() == "Darwin" and platform.machine() == "arm64" else platform.machine().lower()


def hardware() -> dict[str, Any]:
    """The processor, the system and how busy it is, the threads that torch would use."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def allocator() -> dict[str, Any]:
    """Which malloc serves the tensors, and its huge-page setting: they decide what fresh outputs cost."""
    libc, version = platform.libc_ver()
    preloaded = [Path(entry).name for entry in os.environ.get("LD_PRELOAD", "").replace(":", " ").split()]
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "libc": f"{libc} {version}".strip(),
        "preloaded": preloaded,
        "tuned": allocator_settings.is_tuned(),
        "transparent_hugepage": pages.read_text().partition("[")[2].partition("]")[0] if pages.exists() else None,
    }


def environment() -> dict[str, str]:
    """The environment variables that bear on speed, those that are set."""
    return {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}


def versions() -> dict[str, str]:
    return {"fastattn": __version__, "torch": torch.__version__, "python": platform.python_version()}


def commit() -> str | None:
    """The commit of the source tree in use, with "+" when tracked files differ from it; None outside a checkout."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None  # no git program, no commit yet, or somebody else's checkout
