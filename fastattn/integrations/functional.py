"""accelerate(): torch.nn.functional's functions served by our kernels, for whoever looks them up there when calling.

Within the block F.scaled_dot_product_attention, F.layer_norm, F.rms_norm, F.softmax, F.log_softmax, F.cross_entropy,
F.gelu, F.silu and F.linear are the functions of this module, in all threads of the process. That reaches nearly all of
torch.nn and of what is built on it. It does not reach code that bound a function before (`from torch.nn.functional
import gelu`, an activation that a module was given), nor what torch computes without these functions (the fused
inference path of nn.TransformerEncoderLayer and nn.MultiheadAttention: fastattn.patch serves those).

A call that our kernels do not serve is torch's, and the reason is counted.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import dispatch, ops
from fastattn.integrations import left_to_torch
from fastattn.integrations.left_to_torch import Counts
from fastattn.nn.served import no_attention, refusal, widened
from fastattn.ops.linear.op import prefers_torch

_transforms_active = torch._C._are_functorch_transforms_active
# A plain dict is what torch.compile can guard on.
_state = {"active": False}


def _reason(*tensors: Tensor | None) -> str | None:
    """Why a call is torch's, whatever the function; None: it may be ours."""
    if not _state["active"]:
        return "accelerate() is over"
    reason = refusal(*tensors)
    if reason is None and not torch.compiler.is_compiling() and _transforms_active():
        return "inside of a transform of torch.func, whose rules for torch's functions are the faster ones"
    return reason


def _served(name: str, why: str | None, ours: Callable[[], Any], native: Callable[[Any], Any]) -> Any:
    """ours(), or, where there is a reason why not or ours refuses the values, native(torch's function), counted."""
    if _state["active"]:
        if why is None:
            try:
                output = ours()
            except ValueError as error:
                why = str(error)
            else:
                left_to_torch.note_served(name)
                return output
        left_to_torch.note_left(name, why)
    return native(_TORCHS[name])


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """torch.nn.functional.scaled_dot_product_attention."""
    arguments = (query, key, value, attn_mask, dropout_p, is_causal)
    why = None
    if not query.is_nested:
        why = _reason(query, key, value, attn_mask)
        if why is None and dispatch.forced_backend() is None:
            why = no_attention(query.device.type, query.dtype, max(query.shape[-1], value.shape[-1]))
    return _served(
        "scaled_dot_product_attention",
        why,
        lambda: ops.scaled_dot_product_attention(*arguments, scale, enable_gqa),
        lambda native: native(*arguments, scale=scale, enable_gqa=enable_gqa),
    )


def layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Any:
    """torch.nn.functional.layer_norm."""
    return _served(
        "layer_norm",
        _reason(input, weight, bias),
        lambda: ops.layer_norm(widened(input), normalized_shape, weight, bias, eps),
        lambda native: native(input, normalized_shape, weight, bias, eps),
    )


def rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Any:
    """torch.nn.functional.rms_norm."""
    why = _reason(input, weight)
    if why is None and weight is not None and weight.dtype != input.dtype:
        why = f"the result of {input.dtype} with a weight of {weight.dtype} is torch's to choose"
    return _served(
        "rms_norm",
        why,
        lambda: ops.rms_norm(widened(input), normalized_shape, weight, eps),
        lambda native: native(input, normalized_shape, weight, eps),
    )


def softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Any:
    """torch.nn.functional.softmax."""
    return _softmax("softmax", ops.softmax, input, dim, _stacklevel, dtype)


def log_softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Any:
    """torch.nn.functional.log_softmax."""
    return _softmax("log_softmax", ops.log_softmax, input, dim, _stacklevel, dtype)


def _softmax(name: str, ours: Any, input: Tensor, dim: int | None, stacklevel: int, dtype: torch.dtype | None) -> Any:
    return _served(
        name,
        _reason(input) if dim is not None else "without a dim: torch chooses one",
        lambda: ours(widened(input), dim, dtype=dtype),
        # Torch's warning is of the caller's line: four calls stand between.
        lambda native: native(input, dim, stacklevel + 4, dtype),
    )


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None,
    ignore_index: int = -100, reduce: bool | None = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Any:  # fmt: skip
    """torch.nn.functional.cross_entropy."""
    old = size_average is not None or reduce is not None
    return _served(
        "cross_entropy",
        "size_average and reduce are torch's" if old else _reason(input, target, weight),
        lambda: ops.cross_entropy(
            input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        ),
        lambda native: native(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        ),
    )  # fmt: skip


def gelu(input: Tensor, *, approximate: str = "none") -> Any:
    """torch.nn.functional.gelu."""
    return _served(
        "gelu",
        _reason(input),
        lambda: ops.gelu(input, approximate),
        lambda native: native(input, approximate=approximate),
    )


def silu(input: Tensor, inplace: bool = False) -> Any:
    """torch.nn.functional.silu."""
    return _served(
        "silu",
        "in place is torch's" if inplace else _reason(input),
        lambda: ops.silu(input),
        lambda native: native(input, inplace),
    )


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """torch.nn.functional.linear."""
    why = _reason(input, weight, bias)
    if why is None and prefers_torch(input, weight):
        why = "torch's product is the faster one (fastattn.preference)"
    return _served(
        "linear",
        why,
        lambda: ops.linear(input, weight, bias),
        lambda native: native(input, weight, bias),
    )


_OURS = {
    function.__name__: function
    for function in (scaled_dot_product_attention, layer_norm, rms_norm, softmax, log_softmax, cross_entropy, gelu,
                     silu, linear)
}  # fmt: skip
_TORCHS = {name: getattr(F, name) for name in _OURS}


class Report:
    """What was served and what was left to torch since a block was entered, in all threads; live, and str() of it."""

    def __init__(self) -> None:
        self._start = left_to_torch.counts()
        self._end: Counts | None = None

    @property
    def counts(self) -> Counts:
        return (self._end or left_to_torch.counts()) - self._start

    def close(self) -> None:
        """Nothing is counted from here on."""
        self._end = left_to_torch.counts()

    def __str__(self) -> str:
        return str(self.counts)


class _Doorkeeper:
    """Counts who is inside: the first puts our functions in torch's place, the last takes them out."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.before: dict[str, Any] = {}

    def enter(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.before = {name: getattr(F, name) for name in _OURS}
                for name, function in _OURS.items():
                    setattr(F, name, function)
                _state["active"] = True

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                _state["active"] = False
                for name, function in self.before.items():
                    # What somebody else put there meanwhile stays: ours, if it is called by that, is torch's again.
                    if getattr(F, name) is _OURS[name]:
                        setattr(F, name, function)


_door = _Doorkeeper()


class accelerate(contextlib.ContextDecorator):
    """Within the block, or the decorated function, torch.nn.functional is served by our kernels, process-wide.

        with fastattn.accelerate() as report:
            loss = model(x)              # compiled or not
        print(report)                    # what was served, what was left to torch, and why

    Served: scaled_dot_product_attention (jagged nested tensors, too), layer_norm, rms_norm, softmax, log_softmax,
    cross_entropy, gelu, silu and linear, of float32, bfloat16 and float16, with all gradients. What ours do not serve
    goes to torch's function. Blocks may be nested and entered from several threads: torch's functions are back when the
    last one is left, however it is left. Functions compiled inside are compiled anew outside, and the other way round.
    """

    def __init__(self) -> None:
        self._reports: list[Report] = []

    def __enter__(self) -> Report:
        report = Report()
        self._reports.append(report)
        _door.enter()
        return report

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _door.leave()
        self._reports.pop().close()


#: The ops that the functions are, for explain().
_OPS = {"scaled_dot_product_attention": "attention", "log_softmax": "softmax"}


def _notes(op: str) -> list[str]:
    names = [name for name in _OURS if _OPS.get(name, name) == op]
    lines = left_to_torch.explained(names)
    if _state["active"]:
        lines = [f"accelerate() is active: torch.nn.functional.{name} comes here" for name in names] + lines
    return lines


dispatch.NOTES.append(_notes)
