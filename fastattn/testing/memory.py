"""Memory that bites: uninitialised memory full of NaN, and tensors that end where the address space does."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils.deterministic as deterministic
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn import backends

_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_PROT_NONE = 0


@contextlib.contextmanager
def _visible_allocations() -> Iterator[None]:
    """Within the block our C++ ops make their results through torch's dispatcher, at some cost."""
    if backends.probe("cpu") is not None:
        yield
        return
    from fastattn import _C

    before = _C.allocate_through_dispatcher(True)
    try:
        yield
    finally:
        _C.allocate_through_dispatcher(before)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within the block torch fills every uninitialised tensor with NaN (integers: the largest), C++ ops' outputs too.

    Turns on torch.use_deterministic_algorithms, which that filling depends on.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        with _visible_allocations():
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


class _Fenced:
    """Anonymous memory with an inaccessible page on either side."""

    def __init__(self, size: int) -> None:
        pages = max(-(-size // _PAGE), 1)
        self.length = pages * _PAGE
        self.map = mmap.mmap(-1, self.length + 2 * _PAGE)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.map)) + _PAGE
        for fence in (self.start - _PAGE, self.start + self.length):
            if _libc.mprotect(fence, _PAGE, _PROT_NONE) != 0:
                raise OSError(ctypes.get_errno(), "mprotect failed")


def _fenced_storage(elements: int, dtype: torch.dtype, at_end: bool) -> Tensor:
    """A 1-D tensor that ends right before an inaccessible page, or starts right behind one."""
    size = elements * dtype.itemsize
    fenced = _Fenced(size)

    class Buffer(ctypes.c_char * size):  # type: ignore[misc]  # torch keeps it alive, and it keeps the memory
        owner = fenced

    address = fenced.start + (fenced.length - size if at_end else 0)
    return torch.frombuffer(Buffer.from_address(address), dtype=dtype)


def guarded(tensor: Tensor, *, at_end: bool = True) -> Tensor:
    """A copy of a CPU tensor, strides kept, whose last byte (or first: at_end=False) touches an inaccessible page.

    A kernel that reads or writes one element too far is killed by the operating system.
    """
    if tensor.numel() == 0:
        return tensor.detach().clone()
    span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    storage = _fenced_storage(span, tensor.dtype, at_end)
    storage.copy_(tensor.detach().as_strided((span,), (1,)))
    return storage.as_strided(tensor.shape, tensor.stride())


class GuardedOutputs(TorchDispatchMode):
    """What CPU kernels allocate through torch's dispatcher ends at (or starts behind) an inaccessible page, too, and is
    full of NaN. `run` calls a kernel so."""

    def __init__(self, *, at_end: bool = True) -> None:
        super().__init__()
        self.at_end = at_end
        self.served = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.empty.memory_format:
            return self._empty(args[0], kwargs.get("dtype") or torch.get_default_dtype())
        if func is torch.ops.aten.new_empty.default:
            return self._empty(args[1], kwargs.get("dtype") or args[0].dtype)
        return func(*args, **kwargs)

    def _empty(self, shape: Any, dtype: torch.dtype) -> Tensor:
        elements = torch.Size(shape).numel()
        if elements == 0:
            return torch.zeros(shape, dtype=dtype)
        self.served += 1
        storage = _fenced_storage(elements, dtype, self.at_end)
        if dtype.is_floating_point:
            storage.fill_(torch.nan)
        return storage.view(shape)

    def run(self, overload: Any, *args: Any) -> Any:
        """The CPU kernel of a torch op: straight to the kernel, so that this mode sees its allocations alone."""
        with self, _visible_allocations():
            return overload.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args)
