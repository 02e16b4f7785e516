"""Attention on the triton backend: the host's side of both ops.

Device code is in triton_forward.py and triton_backward.py, what they share in triton_scores.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import env
from fastattn import philox as philox_mask
from fastattn.dispatch import Implementation
from fastattn.gpu import devices, tuning
from fastattn.gpu.deferred import Deferred
from fastattn.ops.attention import triton_features as bits
from fastattn.ops.attention.op import AttentionProblem, filled
from fastattn.ops.attention.varlen import VarlenProblem, sequences_of

FORWARD = Deferred("fastattn.ops.attention.triton_forward")
BACKWARD = Deferred("fastattn.ops.attention.triton_backward")
SCORES = Deferred("fastattn.ops.attention.triton_scores")

MAX_HEAD_DIM = 512
#: Positions, and sums of three of them, are 32-bit numbers in the kernels.
MAX_LENGTH = 2**29
#: Keys and values that programs running at a time may read between them: what second-level caches hold for sure.
SHARED_BYTES = 2**25
#: Steps of a mask's gradient that one program takes where few programs would take them all.
STEPS = 16


def supports(problem: AttentionProblem | VarlenProblem) -> str | None:
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"has no kernel for {problem.dtype}: float32, bfloat16, float16"
    if not 1 <= problem.head_dim <= MAX_HEAD_DIM or not 1 <= problem.value_dim <= MAX_HEAD_DIM:
        return f"head dims are 1 to {MAX_HEAD_DIM}, got {problem.head_dim} and {problem.value_dim}"
    if max(problem.queries, problem.keys) > MAX_LENGTH:
        return f"lengths are at most {MAX_LENGTH}, got {problem.queries} and {problem.keys}"
    return None


class Launch:
    """A call as its kernels take it: which features, and the arguments that all kernels have in common.

    Shapes are those of the dense op; packed rows (T, H, E) are one batch element of it.
    """

    __slots__ = (
        "alibi", "batches", "documents", "features", "grouped", "heads", "keys", "lse_strides", "mask", "numbers",
        "packed", "philox", "prefix", "queries", "sequences", "sinks", "sizes",
    )  # fmt: skip

    features: int
    batches: int
    heads: int
    #: Query heads that share a head of keys.
    grouped: int
    queries: int
    keys: int
    #: Packed sequences; 0 says that rows are dense.
    sequences: int
    #: Pointers, each with its strides.
    lse_strides: tuple[int, int]
    mask: tuple[Any, ...]
    alibi: tuple[Any, ...]
    documents: tuple[Any, ...]
    prefix: tuple[Any, ...]
    packed: tuple[Any, ...]
    philox: Tensor | None
    sinks: Tensor | None
    #: scale, softcap, what kept weights are multiplied by, dropout's threshold.
    numbers: tuple[float, float, float, int]
    #: queries, keys, shift, left, right, heads, grouped.
    sizes: tuple[int, ...]


def _block(dim: int) -> int:
    """The power of two that holds a head dim; products of matrices need 16."""
    return 16 if dim <= 16 else 1 << (dim - 1).bit_length()


def _window(left: int, right: int, queries: int, keys: int, shift: int) -> tuple[int, int, int]:
    """(bits, left, right) of a window over these positions; a bound that nobody meets is none."""
    features = 0
    if 0 <= left < queries - 1 + shift:
        features |= bits.LEFT
    if 0 <= right < keys - 1 - shift:
        features |= bits.RIGHT
    return features, min(left, MAX_LENGTH), min(right, MAX_LENGTH)


def _close(tensor: Tensor) -> Tensor:
    """Last stride 1, as kernels assume it of small tensors."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _batch_stride(tensor: Tensor) -> int:
    """Of a tensor whose first dimension may be broadcast."""
    return tensor.stride(0) if tensor.shape[0] > 1 else 0


def _folded(query: Tensor, scale: float, features: int) -> int:
    """Not float32, whose natural scores have exact differences; nor where the scale makes the largest the least."""
    if query.dtype == torch.float32 or scale <= 0.0 or features & (bits.SOFTCAP | bits.ALIBI | bits.ADDITIVE_MASK):
        return 0
    return bits.FOLDED


def _check_prefix(prefix: Tensor, keys: int) -> None:
    """On the CPU, where looking costs nothing; a GPU's kernels clamp."""
    for value in prefix.flatten().tolist():
        if not 0 <= value <= keys:
            raise RuntimeError(f"attention: prefix_len must be in [0, {keys}], got {value}")


def _dense(
    query: Tensor, key: Tensor, mask: Tensor | None, philox: Tensor | None, scale: float, is_causal: bool,
    bottom_right: bool, dropout_p: float, given: tuple[Any, ...],
) -> Launch:  # fmt: skip
    left, right, softcap, sinks, slopes, query_ids, key_ids, prefix = filled(given)
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    shift = keys - queries if bottom_right else 0
    features, left, right = _window(left, 0 if is_causal else right, queries, keys, shift)
    call = Launch()
    call.prefix = (None, 0)
    if prefix is not None:
        if not prefix.is_cuda:
            _check_prefix(prefix, keys)
        if features:
            features |= bits.PREFIX
            call.prefix = (prefix, _batch_stride(prefix))
    call.documents = (None, 0, None, 0)
    if query_ids is not None:
        features |= bits.DOCUMENTS
        query_ids, key_ids = _close(query_ids), _close(key_ids)
        call.documents = (query_ids, _batch_stride(query_ids), key_ids, _batch_stride(key_ids))
    call.mask = (None, 0, 0, 0, 0)
    if mask is not None:
        strides = [stride if size > 1 else 0 for size, stride in zip(mask.shape, mask.stride(), strict=True)]
        if mask.dtype == torch.bool:
            features |= bits.BOOL_MASK
            mask = mask.view(torch.uint8)
        else:
            features |= bits.ADDITIVE_MASK
        call.mask = (mask, *strides)
    call.lse_strides = (heads * queries, queries)
    call.packed = (None, None, None)
    call.sequences = 0
    _rest(call, features, query, key, philox, sinks, slopes, scale, softcap, dropout_p, batch)
    call.queries, call.keys = queries, keys
    call.sizes = (queries, keys, shift, left, right, heads, call.grouped)
    return call


def _rest(
    call: Launch, features: int, query: Tensor, key: Tensor, philox: Tensor | None, sinks: Tensor | None,
    slopes: Tensor | None, scale: float, softcap: float, dropout_p: float, batches: int,
) -> None:  # fmt: skip
    """What dense and packed calls have in common."""
    call.batches, call.heads = batches, query.shape[1]
    call.grouped = call.heads // max(key.shape[1], 1)
    call.philox = philox
    call.numbers = (scale, softcap, 0.0, 0)
    call.sinks = None
    if softcap > 0.0:
        features |= bits.SOFTCAP
    if sinks is not None:
        features |= bits.SINKS
        call.sinks = _close(sinks)
    call.alibi = (None, 0)
    if slopes is not None:
        features |= bits.ALIBI
        slopes = _close(slopes)
        call.alibi = (slopes, slopes.stride(0) if slopes.ndim == 2 else 0)
    if philox is not None:
        features |= bits.DROPOUT
        kept = 0.0 if dropout_p == 1.0 else 1.0 / (1.0 - dropout_p)
        call.numbers = (scale, softcap, kept, philox_mask.threshold(dropout_p))
    if env.debugging():
        features |= bits.DEBUG
    call.features = features | _folded(query, scale, features)


def _ranges(ids: Tensor, block: int) -> tuple[Tensor, int, int]:
    """The smallest and largest id of every block; (table, stride of its batch, blocks)."""
    batch, count = ids.shape
    blocks = -(-count // block)
    table = torch.empty((batch, 2, blocks), dtype=torch.int64, device=ids.device)
    if table.numel():
        SCORES.id_ranges[(batch * blocks,)](table, ids, ids.stride(0), count, blocks, BLOCK=block)
    return table, table.stride(0) if batch > 1 else 0, blocks


def _group(lanes: int, bytes_of_lane: int) -> int:
    """How many lanes' blocks are started side by side."""
    return max(1, min(lanes, SHARED_BYTES // max(bytes_of_lane, 1)))


def _empty_like(like: Tensor, width: int) -> Tensor:
    """(B, H, S, width) in the memory order of `like` (op.memory_order)."""
    batch, heads, length, _ = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty((batch, length, heads, width)).transpose(1, 2)
    return like.new_empty((batch, heads, length, width))


def _options(kernel: str, tensor: Tensor, dim: int, size: int, features: int = 0) -> Any:
    kind = "featured" if features & bits.HEAVY else "plain"
    chosen = tuning.options("attention", kernel, devices.target_of(tensor.device), tensor.dtype, dim, kind, size)
    # Assertions are compiled only where the launch says so.
    return {**chosen, "debug": True} if features & bits.DEBUG else chosen


def _attend(call: Launch, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor) -> None:
    """query, key, value and output: (B, H, S, E) in any strides."""
    dim, value_dim = query.shape[3], value.shape[3]
    options = _options("forward", query, max(dim, value_dim), call.queries, call.features)
    blocks = -(-call.queries // options["ROWS"]) if not call.sequences else _tiles(call, call.queries, options["ROWS"])
    lanes = call.batches * call.heads
    if lanes * blocks == 0:
        return
    ranges: tuple[Any, int, int] = (None, 0, 0)
    with devices.on(query):
        if call.features & bits.DOCUMENTS:
            ranges = _ranges(call.documents[2], options["COLUMNS"])
        FORWARD.forward[(lanes * blocks,)](
            output, lse, query, key, value, *output.stride()[:3], *query.stride()[:3], *key.stride()[:3],
            *value.stride()[:3], *call.lse_strides, *call.mask, call.philox, call.sinks, *call.alibi, *call.documents,
            *ranges[:2], *call.prefix, *call.packed, *call.numbers, *call.sizes, lanes,
            _group(lanes, call.keys * (dim + value_dim) * query.element_size() // call.grouped), blocks, ranges[2],
            call.sequences, FEATURES=call.features, DIM=dim, VALUE_DIM=value_dim, BLOCK_DIM=_block(dim),
            BLOCK_VALUE=_block(value_dim), **options,
        )  # fmt: skip


def _tiles(call: Launch, rows: int, size: int) -> int:
    """Enough tiles for any sequences of these rows, and for the rows before the first and behind the last."""
    return rows // size + call.sequences + 2


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    philox: Tensor | None,
    scale: float,
    is_causal: bool,
    bottom_right: bool,
    dropout_p: float,
    *given: Any,
) -> tuple[Tensor, Tensor]:
    call = _dense(query, key, mask, philox, scale, is_causal, bottom_right, dropout_p, given)
    output = _empty_like(query, value.shape[3])
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    _attend(call, query, key, value, output, lse)
    return output, lse


def _mask_gradient(call: Launch, mask: Tensor, tensors: Sequence[Any], dims: tuple[int, int]) -> Tensor:
    """Of an additive mask, summed over what it was broadcast to."""
    query = tensors[1]
    batches, heads, queries, keys = call.batches, call.heads, call.queries, call.keys
    result = torch.empty(mask.shape, dtype=mask.dtype, device=mask.device)
    if result.numel() == 0:
        return result
    if batches * heads * queries * keys == 0:
        return result.zero_()
    options = dict(_options("backward_mask", query, max(dims), keys))
    mask_batches, mask_heads, mask_rows, mask_columns = mask.shape
    sum_rows, sum_columns = mask_rows < queries, mask_columns < keys
    down, across = -(-queries // options["ROWS"]), -(-keys // options["COLUMNS"])
    tiles = mask_batches * mask_heads * (1 if sum_rows else down) * (1 if sum_columns else across)
    steps = batches // mask_batches * (heads // mask_heads) * (down if sum_rows else 1) * (across if sum_columns else 1)
    # A share of the steps is a program's own sum, in float32: only where the sums are small beside Sq x Sk.
    splits = -(-steps // STEPS) if sum_rows or sum_columns else 1
    parts = result if splits == 1 else torch.empty((splits, *mask.shape), dtype=torch.float32, device=mask.device)
    with devices.on(query):
        BACKWARD.backward_mask[(tiles * splits,)](
            parts, *tensors, *(stride for tensor in tensors[:4] for stride in tensor.stride()[:3]), *call.lse_strides,
            *call.mask, call.philox, *call.alibi, *call.documents, *call.prefix, *call.numbers, *call.sizes, batches,
            *mask.shape, splits, FEATURES=call.features | bits.REST, DIM=dims[0], VALUE_DIM=dims[1],
            BLOCK_DIM=_block(dims[0]), BLOCK_VALUE=_block(dims[1]), SUM_ROWS=sum_rows, SUM_COLUMNS=sum_columns,
            **options,
        )  # fmt: skip
    return result if splits == 1 else parts.sum(0).to(mask.dtype)


def _differentiate(
    call: Launch, grad: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
    lse: Tensor, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, mask: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Writes the gradients of query, key and value, (B, H, S, E) in any strides; returns those of mask and sinks."""
    dim, value_dim = query.shape[3], value.shape[3]
    dims, wide = (dim, value_dim), max(dim, value_dim)
    features = call.features
    lanes = call.batches * call.heads
    kv_lanes = call.batches * key.shape[1]
    constants = {
        "DIM": dim, "VALUE_DIM": value_dim, "BLOCK_DIM": _block(dim), "BLOCK_VALUE": _block(value_dim)
    }  # fmt: skip
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    rest = None
    if features & bits.ADDITIVE_MASK or query.dtype == torch.float32:
        features |= bits.REST
        rest = torch.empty_like(lse)
    grad_sinks = grad_mask = None
    strides = [tensor.stride()[:3] for tensor in (grad, query, key, value)]
    of_four = (*strides[0], *strides[1], *strides[2], *strides[3], *call.lse_strides)
    item = query.element_size()

    with devices.on(query):
        if lanes * call.queries:
            chosen = _options("delta", grad, value_dim, call.queries)
            blocks = -(-call.queries // chosen["ROWS"])
            parts = None
            if call.sinks is not None:
                parts = torch.empty((call.batches, call.heads, blocks), dtype=torch.float32, device=lse.device)
            BACKWARD.delta[(lanes * blocks,)](
                delta, parts, grad, output, lse, None if grad_lse is None else grad_lse.contiguous(), call.sinks,
                *strides[0], *output.stride()[:3], *call.lse_strides, call.queries, call.heads, blocks,
                FEATURES=(features & bits.SINKS) | (bits.GRAD_LSE if grad_lse is not None else 0),
                VALUE_DIM=value_dim, BLOCK_VALUE=_block(value_dim), **chosen,
            )  # fmt: skip
            if call.sinks is not None:
                assert parts is not None
                grad_sinks = parts.sum((0, 2)).to(call.sinks.dtype)

            chosen = _options("backward_query", query, wide, call.queries, features)
            rows = chosen["ROWS"]
            blocks = _tiles(call, call.queries, rows) if call.sequences else -(-call.queries // rows)
            ranges: tuple[Any, int, int] = (None, 0, 0)
            if features & bits.DOCUMENTS:
                ranges = _ranges(call.documents[2], chosen["COLUMNS"])
            BACKWARD.backward_query[(lanes * blocks,)](
                grad_query, rest, grad, query, key, value, lse, delta, *grad_query.stride()[:3], *of_four, *call.mask,
                call.philox, call.sinks, *call.alibi, *call.documents, *ranges[:2], *call.prefix, *call.packed,
                *call.numbers, *call.sizes, lanes, _group(lanes, call.keys * (dim + value_dim) * item // call.grouped),
                blocks, ranges[2], call.sequences, FEATURES=features, **constants, **chosen,
            )  # fmt: skip

        if kv_lanes * call.keys:
            chosen = _options("backward_key", key, wide, call.keys, features)
            columns = chosen["COLUMNS"]
            blocks = _tiles(call, call.keys, columns) if call.sequences else -(-call.keys // columns)
            ranges = (None, 0, 0)
            if features & bits.DOCUMENTS:
                ranges = _ranges(call.documents[0], chosen["ROWS"])
            BACKWARD.backward_key[(kv_lanes * blocks,)](
                grad_key, grad_value, grad, query, key, value, lse, delta, rest, *grad_key.stride()[:3],
                *grad_value.stride()[:3], *of_four, *call.mask, call.philox, *call.alibi, *call.documents, *ranges[:2],
                *call.prefix, *call.packed, *call.numbers, *call.sizes, kv_lanes,
                _group(kv_lanes, call.queries * (dim + value_dim) * item * call.grouped), blocks, ranges[2],
                call.sequences, FEATURES=features, **constants, **chosen,
            )  # fmt: skip
    if mask is not None:
        grad_mask = _mask_gradient(call, mask, (grad, query, key, value, lse, delta, rest), dims)
    if call.sinks is not None and grad_sinks is None:
        grad_sinks = torch.zeros_like(call.sinks)
    return grad_mask, grad_sinks


def backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    philox: Tensor | None,
    output: Tensor,
    lse: Tensor,
    scale: float,
    is_causal: bool,
    bottom_right: bool,
    dropout_p: float,
    mask_grad: bool,
    *given: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = _dense(query, key, mask, philox, scale, is_causal, bottom_right, dropout_p, given)
    grad_query, grad_key, grad_value = (_empty_like(tensor, tensor.shape[3]) for tensor in (query, key, value))
    grad_mask, grad_sinks = _differentiate(
        call, grad_output, grad_lse, query, key, value, output, lse, grad_query, grad_key, grad_value,
        mask if mask_grad else None,
    )  # fmt: skip
    none = torch.empty((0,), dtype=torch.float32, device=query.device)
    return (
        grad_query, grad_key, grad_value, none if grad_mask is None else grad_mask,
        none if grad_sinks is None else grad_sinks,
    )  # fmt: skip


IMPLEMENTATION = Implementation(supports, forward, backward)


def _rows(tensor: Tensor) -> Tensor:
    """(T, H, E) as (1, H, T, E)."""
    return tensor.transpose(0, 1).unsqueeze(0)


def _packed(
    query: Tensor, key: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, seqused_k: Tensor | None, philox: Tensor | None,
    sinks: Tensor | None, slopes: Tensor | None, scale: float, max_q: int, max_k: int, left: int, right: int,
    softcap: float, dropout_p: float,
) -> Launch:  # fmt: skip
    """query, key: (1, H, T, E)."""
    if not cu_seq_q.is_cuda:
        sequences_of(query[0, 0], key[0, 0], cu_seq_q, cu_seq_k, seqused_k, max_q, max_k)
    queries, keys = query.shape[2], key.shape[2]
    features = bits.PACKED
    # No query stands further from a key than there are rows.
    if 0 <= left < keys:
        features |= bits.LEFT
    if 0 <= right < queries:
        features |= bits.RIGHT
    call = Launch()
    call.prefix, call.documents, call.mask = (None, 0), (None, 0, None, 0), (None, 0, 0, 0, 0)
    call.lse_strides = (0, queries)
    call.packed = (cu_seq_q, cu_seq_k, seqused_k)
    call.sequences = cu_seq_q.shape[0] - 1
    _rest(call, features, query, key, philox, sinks, slopes, scale, softcap, dropout_p, 1)
    call.queries, call.keys = queries, keys
    call.sizes = (queries, keys, 0, min(left, MAX_LENGTH), min(right, MAX_LENGTH), call.heads, call.grouped)
    return call


def forward_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    seqused_k: Tensor | None,
    philox: Tensor | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    rows, heads, _ = query.shape
    output = query.new_empty((rows, heads, value.shape[2]))
    lse = torch.empty((heads, rows), dtype=torch.float32, device=query.device)
    q, k, v = _rows(query), _rows(key), _rows(value)
    call = _packed(q, k, cu_seq_q, cu_seq_k, seqused_k, philox, sinks, slopes, *options)
    _attend(call, q, k, v, _rows(output), lse)
    return output, lse


def backward_varlen(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    seqused_k: Tensor | None,
    philox: Tensor | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
    output: Tensor,
    lse: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_query, grad_key, grad_value = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    q, k, v = _rows(query), _rows(key), _rows(value)
    call = _packed(q, k, cu_seq_q, cu_seq_k, seqused_k, philox, sinks, slopes, *options)
    _, grad_sinks = _differentiate(
        call, _rows(grad_output), grad_lse, q, k, v, _rows(output), lse, _rows(grad_query), _rows(grad_key),
        _rows(grad_value), None,
    )  # fmt: skip
    none = torch.empty((0,), dtype=torch.float32, device=query.device)
    return grad_query, grad_key, grad_value, none if grad_sinks is None else grad_sinks


VARLEN = Implementation(supports, forward_varlen, backward_varlen)
