"""What modules on our kernels have in common: when a call is torch's after all, and who hears of it.

A module of ours is a class of torch's with a `forward` in front of it, which is a mixin of this package: in fastattn.nn
the two are one class, and fastattn.patch puts the mixin in front of whatever class a module has. Behind the mixin,
`super().forward` is the original: what our kernels do not serve goes there, with a reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from fastattn import backends, dispatch
from fastattn.norms import PLAIN
from fastattn.numerics import HALVES
from fastattn.ops.attention.op import OP as ATTENTION
from fastattn.ops.attention.op import AttentionProblem

if TYPE_CHECKING:  # a mixin stands in front of some module's class
    from torch.nn import Module as Base
else:
    Base = object

_TRACED = (*PLAIN, torch.nn.Buffer, FakeTensor, FunctionalTensor)
_EAGER = (*PLAIN, torch.nn.Buffer)
# Looked up once: every call asks.
_STRIDED = torch.strided
#: Device and dtype of what calls have found a kernel for: backends are probed once in a process, too.
_with_kernel: set[tuple[torch.device, torch.dtype]] = set()
#: What `no_attention` has said.
_attention_answers: dict[tuple[str, torch.dtype, int], str | None] = {}

Listener = Callable[[Any, str], None]
_listeners: list[Listener] = []


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within the block `listener(module, reason)` hears of every call, in eager code, that a module leaves to torch."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


class Served(Base):
    """Base of the mixins. fastattn_strict: what cannot be served raises, instead of being left to torch."""

    fastattn_strict = False

    def _left_to_torch(self, reason: str) -> None:
        """Says that this call is served by the original implementation; BackendUnsupported for strict modules."""
        if self.fastattn_strict:
            raise dispatch.BackendUnsupported(f"{type(self).__name__}: {reason} (strict: torch's is not used instead)")
        self._note(reason)

    def _note(self, reason: str) -> None:
        if _listeners and not torch.compiler.is_compiling():
            for listener in _listeners:
                listener(self, reason)


def refusal(*tensors: Tensor | None) -> str | None:
    """Why torch's kernel and none of ours should compute with these tensors, the input first; None: ours should.

    A forced backend is asked whatever the tensors are.
    """
    if dispatch.forced_backend() is not None:
        return None
    compiling = torch.compiler.is_compiling()
    types = _TRACED if compiling else _EAGER
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in types or tensor.layout is not _STRIDED or tensor.is_nested):
            return _not_plain(tensor, types)
    if forward_ad._current_level >= 0:
        return "derivatives in forward mode are torch's"
    if not compiling and torch._C._get_tracing_state() is not None:
        return "torch.jit traces torch's ops"
    first = tensors[0]
    assert first is not None
    if compiling:
        return no_kernel(first.device.type, first.dtype)
    kind = first.device, first.dtype
    if kind in _with_kernel:
        return None
    reason = no_kernel(first.device.type, first.dtype)
    if reason is None:
        _with_kernel.add(kind)
    return reason


def _not_plain(tensor: Tensor, types: tuple[type, ...]) -> str:
    if type(tensor) not in types:
        return f"a {type(tensor).__name__} is not a plain tensor"
    return "nested tensors are torch's" if tensor.is_nested else f"tensors of layout {tensor.layout} are torch's"


def no_kernel(device: str, dtype: torch.dtype) -> str | None:
    """Why there is no compiled kernel for tensors of this kind; None: there is one."""
    reason = dispatch.refused_dtype(dtype)
    if reason is not None:
        return reason
    reasons = []
    for name in backends.PRIORITY.get(device, ()):
        if name == "reference":
            continue
        reason = backends.BACKENDS[name].reason_against(device)
        if reason is None:
            return None
        reasons.append(f"{name}: {reason}")
    return "; ".join(reasons) or f"no kernels for {device} tensors"


def no_attention(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """`no_kernel` for attention, which also asks for the head dim; found once, for every call asks."""
    question = device, dtype, head_dim
    if question not in _attention_answers:
        _attention_answers[question] = _find_no_attention(*question)
    return _attention_answers[question]


def _find_no_attention(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    reason = no_kernel(device, dtype)
    if reason is not None:
        return reason
    problem = AttentionProblem(
        device=device, dtype=dtype, batch=1, heads=1, kv_heads=1, queries=1, keys=1, head_dim=head_dim,
        value_dim=head_dim, mask_dtype=None, mask_grad=False, is_causal=False, causal_alignment="none", dropout=False,
    )  # fmt: skip
    reasons = ATTENTION.reasons(problem)
    del reasons["reference"]
    return None if None in reasons.values() else ATTENTION.refusals(problem)


# What torch.compiler.assume_constant_result does, but that imports the compiler.
no_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]
no_attention._dynamo_marked_constant = True  # type: ignore[attr-defined]


def hooked(module: Any) -> bool:
    """Whether calling the module does more than its forward does, or another forward than its class's."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or "forward" in module.__dict__
    )  # fmt: skip


def widened(tensor: Tensor) -> Tensor:
    """As CUDA's autocast hands it to norms and softmax, in float32; on the CPU autocast leaves those alone."""
    if tensor.is_cuda and tensor.dtype in HALVES and torch.is_autocast_enabled("cuda"):
        return tensor.float()
    return tensor
