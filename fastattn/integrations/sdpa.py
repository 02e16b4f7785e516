"""Our attention behind torch's own operators, through torch's registry of flash-attention implementations:

    import fastattn
    torch.nn.attention.activate_flash_attention_impl("fastattn")
    ...
    torch.nn.attention.restore_flash_attention_impl()

While it is active these operators of torch are served by our kernels, on CPUs and GPUs: what
F.scaled_dot_product_attention calls when it takes the flash path, and aten::_flash_attention_forward, which
torch.nn.attention.varlen.varlen_attn calls and which torch has no CPU kernel for. F.scaled_dot_product_attention of
jagged nested tensors comes here, too. Whatever our kernels do not serve is computed by torch's, with the reason
counted (fastattn.integrations.left_to_torch). Results lie in memory as torch's fakes promise, which compiled graphs
rely on.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor

from fastattn import dispatch
from fastattn.flash_attn.arguments import dropout_state, window_of
from fastattn.flash_attn.passes import Passes, dense_passes, packed_passes
from fastattn.flash_attn.varlen import gathered_pages
from fastattn.integrations import left_to_torch
from fastattn.ops.attention import OP, VARLEN_OP, scaled_dot_product_attention

NAME = "fastattn"
_JAGGED = "jagged_scaled_dot_product_attention"


def reason() -> str | None:
    """Why torch's registry does not know us; None when it does. That of torch 2.10 cannot restore torch's kernels."""
    if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
        return f"torch {torch.__version__} has no registry of flash-attention implementations"
    return None


def register() -> None:
    """Tells torch's registry of us; `import fastattn` does. Nothing changes before it is activated."""
    if reason() is None:
        torch.nn.attention.register_flash_attention_impl(NAME, register_fn=_activate)


class Activated:
    """Our kernels in torch's place; torch's registry keeps it and calls `remove`."""

    def __init__(self) -> None:
        self.library = torch.library.Library("aten", "IMPL")
        self.nested = importlib.import_module("torch.nested._internal.ops")
        self.jagged: Any = getattr(self.nested, _JAGGED, None)
        gpus = bool(torch.version.cuda or torch.version.hip)
        with warnings.catch_warnings():
            # Torch warns of every kernel that is replaced; that is what activating is.
            warnings.filterwarnings("ignore", message=".*other operators may also be overridden", category=UserWarning)
            for name, (devices, kernel) in _KERNELS.items():
                for device in devices:
                    # Operators that a torch does not have yet, or no longer, are nobody's.
                    if hasattr(torch.ops.aten, name) and (device == "CPU" or gpus):
                        self._replace(name, device, kernel)
        if self.jagged is not None:
            setattr(self.nested, _JAGGED, self._of_jagged)

    def _replace(self, name: str, device: str, kernel: Callable[..., Any]) -> None:
        try:
            native = torch.library.get_kernel(f"aten::{name}", device)
        except RuntimeError:  # torch has none for this device
            native = None

        def run(keys: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                result = kernel(*args, **kwargs)
            except _NotServed as why:
                if native is None:
                    raise dispatch.BackendUnsupported(f"aten::{name}: {why}; torch has no kernel either") from why
                left_to_torch.note_left(f"aten::{name}", str(why))
                return native.call_boxed(keys, *args, **kwargs)
            left_to_torch.note_served(f"aten::{name}")
            return result

        self.library.impl(name, run, device, with_keyset=True, allow_override=True)

    def _of_jagged(self, *args: Any, **kwargs: Any) -> Any:
        """F.scaled_dot_product_attention of jagged nested tensors."""
        try:
            result = scaled_dot_product_attention(*args, **kwargs)
        except ValueError as error:
            left_to_torch.note_left(_JAGGED, str(error))
            return self.jagged(*args, **kwargs)
        left_to_torch.note_served(_JAGGED)
        return result

    def remove(self) -> None:
        """Torch's kernels again."""
        self.library._destroy()
        if self.jagged is not None:
            setattr(self.nested, _JAGGED, self.jagged)


def _activate() -> Activated:
    return Activated()


class _NotServed(Exception):
    """A call that our kernels do not serve; the message says why."""


def _passes_of(find: Callable[..., Passes], *args: Any, torch_has_none: bool = False) -> Passes:
    """The passes of a call; _NotServed where the definition in plain torch would serve it and nobody forced that.

    torch_has_none: torch has no kernel of its own for this operator and device; then the definition will do.
    """
    try:
        passes = find(*args)
    except ValueError as error:
        raise _NotServed(str(error)) from error
    bound = passes.bound
    if bound.backend == "reference" and not torch_has_none and dispatch.forced_backend() is None:
        raise _NotServed(bound.op.refusals(passes.problem()))
    return passes


# ---- layouts ----


def _lying_as(tensor: Tensor, strides: Sequence[int]) -> Tensor:
    if tensor.stride() == tuple(strides):
        return tensor
    return torch.empty_strided(tensor.shape, tuple(strides), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """In memory as empty_like(other)."""
    return _lying_as(tensor, torch.empty_like(other, device="meta").stride())


def _sequence_first(tensor: Tensor) -> Tensor:
    """(B, H, S, ...) as a transposed contiguous (B, S, H, ...)."""
    turned = torch.empty_like(tensor.transpose(1, 2), device="meta", memory_format=torch.contiguous_format)
    return _lying_as(tensor, turned.transpose(1, 2).stride())


# ---- (B, H, S, D) ----


def _mask(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None else mask[(None,) * (4 - mask.ndim)]


def _of_cpu(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, mask: Tensor | None,
    scale: float | None,
) -> Passes:  # fmt: skip
    if dropout_p > 0.0:
        raise _NotServed("torch's operator for CPUs keeps no state for dropout")
    return _passes_of(dense_passes, query, key, value, _mask(mask), scale, 0.0, is_causal, False)


def _sdpa_cpu(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False, *,
    attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    output, lse = _of_cpu(query, key, value, dropout_p, is_causal, attn_mask, scale).forward(None)
    return _like(output, query), _sequence_first(lse)


def _sdpa_cpu_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, dropout_p: float,
    is_causal: bool, *, attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    passes = _of_cpu(query, key, value, dropout_p, is_causal, attn_mask, scale)
    return tuple(_sequence_first(grad) for grad in passes.backward(grad_out, out, logsumexp, None))


def _sdpa_gpu(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
    return_debug_mask: bool = False, *, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    if return_debug_mask:
        raise _NotServed("return_debug_mask is torch's")
    passes = _passes_of(dense_passes, query, key, value, None, scale, dropout_p, is_causal, False)
    state = dropout_state(dropout_p, query.device)
    output, lse = passes.forward(state)
    return (_like(output, query), lse, None, None, query.shape[2], key.shape[2], *_as_states(state, query),
            query.new_empty(0))  # fmt: skip


def _sdpa_gpu_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, cum_seq_q: Any,
    cum_seq_k: Any, max_q: int, max_k: int, dropout_p: float, is_causal: bool, philox_seed: Tensor,
    philox_offset: Tensor, *, scale: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    passes = _passes_of(dense_passes, query, key, value, None, scale, dropout_p, is_causal, False)
    state = _as_state(philox_seed, philox_offset) if dropout_p > 0.0 else None
    grads = passes.backward(grad_out, out, logsumexp, state)
    return tuple(_like(grad, side) for grad, side in zip(grads, (query, key, value), strict=True))


def _as_states(state: Tensor | None, query: Tensor) -> tuple[Tensor, Tensor]:
    """The two tensors in which torch keeps the state of dropout: ours is both numbers in the first, or one in each."""
    if state is None:
        state = torch.zeros(2, dtype=torch.int64, device=query.device)
    if torch.version.hip:
        return state[0].clone(), state[1].clone()
    return state.view(torch.uint64), torch.zeros((), dtype=torch.uint64, device=query.device)


def _as_state(seed: Tensor, offset: Tensor) -> Tensor:
    return torch.stack((seed, offset)) if seed.ndim == 0 else seed.view(torch.int64)


# ---- (B, S, H, D) or packed (T, H, D) ----


def _window(is_causal: bool, left: int | None, right: int | None) -> tuple[int, int]:
    left, right = (-1 if bound is None or bound < 0 else int(bound) for bound in (left, right))
    return window_of(is_causal, (left, right))


def _flash(
    query: Tensor, key: Tensor, value: Tensor, cum_seq_q: Tensor | None, cum_seq_k: Tensor | None, max_q: int,
    max_k: int, dropout_p: float, is_causal: bool, return_debug_mask: bool, *, scale: float | None = None,
    window_size_left: int | None = None, window_size_right: int | None = None, seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None, block_table: Tensor | None = None, num_splits: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    if return_debug_mask:
        raise _NotServed("return_debug_mask is torch's")
    window = _window(is_causal, window_size_left, window_size_right)
    if cum_seq_q is None:
        if seqused_k is not None or block_table is not None:
            raise _NotServed("seqused_k and block_table are for packed sequences")
        heads = (t.transpose(1, 2) for t in (query, key, value))
        passes = _passes_of(
            dense_passes, *heads, None, scale, dropout_p, is_causal, True, window, 0.0, alibi_slopes,
            torch_has_none=query.is_cpu,
        )  # fmt: skip
    else:
        if block_table is not None:
            lengths = seqused_k if cum_seq_k is None else cum_seq_k.diff() if seqused_k is None else seqused_k
            if lengths is None:
                raise _NotServed("a block_table needs seqused_k")
            key, value, cum_seq_k, seqused_k, max_k = gathered_pages(NAME, key, value, lengths, max_k, block_table)
        if cum_seq_k is None:
            raise _NotServed("packed queries need cum_seq_k, the bounds of their keys")
        passes = _passes_of(
            packed_passes, query, key, value, cum_seq_q, cum_seq_k, seqused_k, max_q, max_k, scale, dropout_p, window,
            0.0, alibi_slopes, torch_has_none=query.is_cpu,
        )  # fmt: skip
    state = dropout_state(dropout_p, query.device)  # a call that is left to torch draws torch's
    output, lse = passes.forward(state)
    if cum_seq_q is None:
        output = output.transpose(1, 2)
    return _like(output, query), lse.float(), *_as_states(state, query), query.new_empty(0)


def _flash_into(out: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    output, lse, *_ = _flash(*args, **kwargs)
    out.copy_(output)
    return lse


def _flash_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor,
    cum_seq_q: Tensor | None, cum_seq_k: Tensor | None, max_q: int, max_k: int, dropout_p: float, is_causal: bool,
    rng_state: Tensor, unused: Tensor, *, scale: float | None = None, window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    window = _window(is_causal, window_size_left, window_size_right)
    state = _as_state(rng_state, unused) if dropout_p > 0.0 else None
    if cum_seq_q is None:
        heads = (t.transpose(1, 2) for t in (query, key, value))
        passes = _passes_of(
            dense_passes, *heads, None, scale, dropout_p, is_causal, True, window, torch_has_none=query.is_cpu
        )  # fmt: skip
        grads = [
            grad.transpose(1, 2)
            for grad in passes.backward(grad_out.transpose(1, 2), out.transpose(1, 2), logsumexp, state)
        ]
    else:
        assert cum_seq_k is not None
        passes = _passes_of(
            packed_passes, query, key, value, cum_seq_q, cum_seq_k, None, max_q, max_k, scale, dropout_p, window,
            torch_has_none=query.is_cpu,
        )  # fmt: skip
        grads = list(passes.backward(grad_out, out, logsumexp, state))
    return tuple(_like(grad, side) for grad, side in zip(grads, (query, key, value), strict=True))


_CPU, _GPU, _BOTH = ("CPU",), ("CUDA",), ("CPU", "CUDA")
_KERNELS: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    "_scaled_dot_product_flash_attention_for_cpu": (_CPU, _sdpa_cpu),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (_CPU, _sdpa_cpu_backward),
    "_scaled_dot_product_flash_attention": (_GPU, _sdpa_gpu),
    "_scaled_dot_product_flash_attention_backward": (_GPU, _sdpa_gpu_backward),
    "_flash_attention_forward": (_BOTH, _flash),
    "_flash_attention_forward_no_dropout_inplace": (_BOTH, _flash_into),
    "_flash_attention_backward": (_BOTH, _flash_backward),
}


def _notes(op: str) -> list[str]:
    if op not in (OP.name, VARLEN_OP.name):
        return []
    left = left_to_torch.explained([*(f"aten::{name}" for name in _KERNELS), _JAGGED])
    why = reason()
    if why is not None:
        return [f"torch.nn.attention: {why}"]
    active = torch.nn.attention.current_flash_attention_impl() == NAME
    return [f"torch.nn.attention: {NAME} is active", *left] if active else left


dispatch.NOTES.append(_notes)
register()
