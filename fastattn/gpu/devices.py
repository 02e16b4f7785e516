"""The GPUs that kernels are written for: what one is, and why the triton backend cannot use this machine's.

`TRITON_INTERPRET=1`, set before the process starts, runs the same kernels on CPU tensors in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastattn import env

OLDEST_TRITON, FIRST_UNKNOWN_TRITON = (3, 6), (3, 10)
OLDEST_NVIDIA = (8, 0)
#: AMD's architectures that the kernels are compiled for in the gate; others of CDNA are tried as they are.
AMD = ("gfx942", "gfx950")


@dataclass(frozen=True, eq=False)
class Target:
    """What kernels depend on. name: sm_90, gfx942, ... or interpreter; shared_memory: bytes that one block can have.
    device: what its maker calls it, "" where there is none. forced: options of kernels, by (op, kernel), that are not
    looked up.

    There is one for a device, compared by identity: every launch looks something up by it.
    """

    name: str
    shared_memory: int
    warp: int = 32
    device: str = ""
    forced: Mapping[tuple[str, str], Mapping[str, int]] = field(default_factory=dict)

    @property
    def interpreted(self) -> bool:
        """Whether host code may look at values, and does, as on a CPU; a GPU is not waited for."""
        return self.name == "interpreter"


#: For compiling without a device, and as what an unknown member of a family is taken for.
KNOWN = {
    target.name: target
    for target in (
        Target("sm_80", 166_912),
        Target("sm_89", 101_376),
        Target("sm_90", 232_448),
        Target("sm_100", 232_448),
        Target("sm_120", 101_376),
        Target("gfx942", 65_536, 64),
        Target("gfx950", 163_840, 64),
        Target("interpreter", 232_448),
    )
}

_assumed: list[Target] = []


@contextlib.contextmanager
def assume(target: str | Target) -> Iterator[Target]:
    """Within the block every device is this one: for compiling kernels and counting launches without a GPU, and for
    trying other options on one. By name it is a new one, of which nothing has been looked up."""
    _assumed.append(replace(KNOWN[target]) if isinstance(target, str) else target)
    try:
        yield _assumed[-1]
    finally:
        _assumed.pop()


def target_of(device: torch.device) -> Target:
    """The target of a tensor's device."""
    if _assumed:
        return _assumed[-1]
    return _target_of(device)


@functools.cache
def _target_of(device: torch.device) -> Target:
    return KNOWN["interpreter"] if device.type == "cpu" else _target(device.index or 0)


@functools.cache
def _target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name, warp = properties.gcnArchName.split(":")[0], 64
    else:
        name, warp = f"sm_{properties.major}{properties.minor}", 32
    memory = getattr(properties, "shared_memory_per_block_optin", 0) or getattr(
        KNOWN.get(name), "shared_memory", 65_536
    )
    return Target(name, memory, warp, properties.name)


def assertions(target: Target) -> dict[str, bool]:
    """Launch options of a kernel that asserts on values: Triton leaves assertions away unless it is told not to."""
    return {"debug": True} if env.debugging() and not target.interpreted else {}


def on(tensor: torch.Tensor) -> Any:
    """A context in which launches go to the tensor's device: Triton launches on the current one."""
    if not tensor.is_cuda or _only_one() or tensor.get_device() == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(tensor.device)


@functools.cache
def _only_one() -> bool:
    return torch.cuda.device_count() == 1


_NOTHING = contextlib.nullcontext()


def _release(version: str) -> tuple[int, ...]:
    """The numbers at the beginning of a version."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def triton_reason() -> str | None:
    """None when the Triton that is installed will do, else what is wrong with it."""
    try:
        triton = importlib.import_module("triton")
        version = str(getattr(triton, "__version__", "of no version"))
        release = _release(version)[:2]
        if release < OLDEST_TRITON:
            return f"triton {version} is too old: {_written(OLDEST_TRITON)} or newer"
        if release >= FIRST_UNKNOWN_TRITON:
            return f"triton {version} is too new: this release knows those before {_written(FIRST_UNKNOWN_TRITON)}"
        importlib.import_module("triton.language")
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return "triton is not installed"
        return f"triton is broken: {error}"
    except Exception as error:  # whatever a broken installation raises is the reason
        return f"triton is broken: {type(error).__name__}: {error}"
    return None


def _written(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _device_reason() -> str | None:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return "torch sees no GPU" if built else "torch is a build without GPUs"
    if torch.version.hip:
        name = _target(torch.cuda.current_device()).name
        return None if name.startswith("gfx9") else f"{name} is none of {', '.join(AMD)}"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_NVIDIA:
        return f"the GPU is of compute capability {_written(capability)}: {_written(OLDEST_NVIDIA)} or newer"
    return None


def probe() -> str | None:
    """None when Triton kernels can run here, else the reason."""
    if env.interpreting():
        # `import triton` reads the variable; and bfloat16 products are wrong in the interpreter as it comes.
        reason = triton_reason()
        if reason is None:
            importlib.import_module("fastattn.testing.interpreter").repair()
        return reason
    return _device_reason() or triton_reason()


def served() -> tuple[str, ...]:
    """torch's device types that Triton kernels serve in this process."""
    return ("cuda", "cpu") if env.interpreting() else ("cuda",)
