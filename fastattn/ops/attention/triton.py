"""Attention on the triton backend: the host's side of both ops.

Device code is in triton_forward.py and triton_backward.py, what they share in triton_scores.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import philox as philox_mask
from fastattn.dispatch import Implementation, takes_dtype
from fastattn.gpu import devices, tuning
from fastattn.gpu.deferred import Deferred
from fastattn.gpu.devices import Target
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
    reason = takes_dtype(problem)
    if reason is not None:
        return reason
    if not 1 <= problem.head_dim <= MAX_HEAD_DIM or not 1 <= problem.value_dim <= MAX_HEAD_DIM:
        return f"head dims are 1 to {MAX_HEAD_DIM}, got {problem.head_dim} and {problem.value_dim}"
    if max(problem.queries, problem.keys) > MAX_LENGTH:
        return f"lengths are at most {MAX_LENGTH}, got {problem.queries} and {problem.keys}"
    return None


#: Shape and strides.
Layout = tuple[tuple[int, ...], tuple[int, ...]]


class Operands(NamedTuple):
    """Tensors besides query, key and value, in the order of kernels' parameters; None for what a call has not."""

    mask: Tensor | None = None
    philox: Tensor | None = None
    slopes: Tensor | None = None
    query_ids: Tensor | None = None
    key_ids: Tensor | None = None
    prefix: Tensor | None = None
    cu_queries: Tensor | None = None
    cu_keys: Tensor | None = None
    used: Tensor | None = None
    sinks: Tensor | None = None


class Asked(NamedTuple):
    """All that a call is besides its tensors' elements and the layouts of query, key and value."""

    scale: float
    dropout_p: float
    is_causal: bool = False
    bottom_right: bool = False
    left: int = -1
    right: int = -1
    softcap: float = 0.0
    sinks: bool = False
    mask_dtype: torch.dtype | None = None
    mask: Layout | None = None
    slopes: Layout | None = None
    query_ids: Layout | None = None
    key_ids: Layout | None = None
    prefix: Layout | None = None
    #: Packed sequences; None says that rows are dense.
    sequences: int | None = None


@dataclass(frozen=True, eq=False)
class Launch:
    """A call as its kernels take it; packed rows (T, H, E) are one batch element of the dense op.

    strides: of lse (2), mask (4), slopes, ids of queries and of keys, prefix. numbers: scale, softcap, what kept
    weights are multiplied by, dropout's threshold. sizes: queries, keys, shift, left, right, heads, heads that share
    one of keys.
    """

    target: Target
    dtype: torch.dtype
    features: int
    batches: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    value_dim: int
    sequences: int | None
    strides: tuple[int, ...]
    numbers: tuple[float, float, float, int]
    sizes: tuple[int, ...]

    @property
    def constants(self) -> dict[str, int]:
        return {
            "DIM": self.dim, "VALUE_DIM": self.value_dim, "BLOCK_DIM": _block(self.dim),
            "BLOCK_VALUE": _block(self.value_dim),
        }  # fmt: skip

    def blocks(self, rows: int, size: int) -> int:
        """Of packed rows enough for any sequences, and for the rows before the first and behind the last."""
        return -(-rows // size) if self.sequences is None else rows // size + self.sequences + 2

    def options(self, kernel: str, dim: int, size: int, features: int = 0) -> Mapping[str, int]:
        kind = "featured" if features & bits.HEAVY else "plain"
        chosen = tuning.options("attention", kernel, self.target, self.dtype, dim, kind, size)
        return {**chosen, **devices.assertions(self.target)}


class Start(NamedTuple):
    """A kernel that only waits for its tensors. tile: rows whose ids are an entry of a table of ranges (_ranges)."""

    kernel: Callable[..., Any]
    numbers: tuple[Any, ...]
    constants: Mapping[str, Any]
    tile: int = 0

    def __call__(self, *tensors: Tensor | None) -> None:
        self.kernel(*tensors, *self.numbers, **self.constants)


def _block(dim: int) -> int:
    """What holds a head dim; products of matrices need 16."""
    return max(16, tuning.power_of_two(dim))


def _layout(tensor: Tensor | None) -> Layout | None:
    return None if tensor is None else (tensor.shape, tensor.stride())


def _close(tensor: Tensor | None) -> Tensor | None:
    """Last stride 1, as kernels assume it of small tensors."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _broadcast_strides(layout: Layout | None, dims: int) -> list[int]:
    """Of the first dims, 0 for what is broadcast; zeros for no tensor."""
    if layout is None:
        return [0] * dims
    return [stride if size > 1 else 0 for size, stride in zip(*layout, strict=True)][:dims]


def _window(left: int, right: int, queries: int, keys: int, shift: int) -> int:
    """The bits of a window over these positions; a bound that nobody meets is none."""
    features = bits.LEFT if 0 <= left < queries - 1 + shift else 0
    return features | (bits.RIGHT if 0 <= right < keys - 1 - shift else 0)


def _check_prefix(prefix: Tensor, keys: int) -> None:
    for value in prefix.flatten().tolist():
        if not 0 <= value <= keys:
            raise RuntimeError(f"attention: prefix_len must be in [0, {keys}], got {value}")


def _dense(
    key: Tensor, mask: Tensor | None, philox: Tensor | None, scale: float, is_causal: bool, bottom_right: bool,
    dropout_p: float, given: tuple[Any, ...],
) -> tuple[Operands, Asked]:  # fmt: skip
    """The end of the op's arguments as kernels take them."""
    if not given and mask is None:
        return Operands(philox=philox), Asked(scale, dropout_p, is_causal, bottom_right)
    left, right, softcap, sinks, slopes, query_ids, key_ids, prefix = filled(given)
    if prefix is not None and devices.target_of(prefix.device).interpreted:  # a GPU's kernels clamp
        _check_prefix(prefix, key.shape[2])
    mask_dtype = None
    if mask is not None:
        mask_dtype = mask.dtype
        if mask_dtype == torch.bool:
            mask = mask.view(torch.uint8)
    sinks, slopes, query_ids, key_ids = map(_close, (sinks, slopes, query_ids, key_ids))
    return Operands(mask, philox, slopes, query_ids, key_ids, prefix, sinks=sinks), Asked(
        scale, dropout_p, is_causal, bottom_right, left, right, softcap, sinks is not None, mask_dtype,
        _layout(mask), _layout(slopes), _layout(query_ids), _layout(key_ids), _layout(prefix),
    )  # fmt: skip


def _launch(target: Target, dtype: torch.dtype, query: Layout, key: Layout, value: Layout, asked: Asked) -> Launch:
    """query, key and value: (B, H, S, E)."""
    (batches, heads, queries, dim), _ = query
    (_, kv_heads, keys, value_dim) = (*key[0][:3], value[0][3])
    left, right, shift = asked.left, 0 if asked.is_causal else asked.right, 0
    if asked.sequences is None:
        lse_strides = (heads * queries, queries)
        shift = keys - queries if asked.bottom_right else 0
        features = _window(left, right, queries, keys, shift)
    else:
        lse_strides = (0, queries)
        # No query stands further from a key than there are rows.
        features = bits.PACKED | (bits.LEFT if 0 <= left < keys else 0) | (bits.RIGHT if 0 <= right < queries else 0)
    numbers = (asked.scale, asked.softcap, 0.0, 0)
    if asked.dropout_p > 0.0:
        features |= bits.DROPOUT
        kept = 0.0 if asked.dropout_p == 1.0 else 1.0 / (1.0 - asked.dropout_p)
        numbers = (asked.scale, asked.softcap, kept, philox_mask.threshold(asked.dropout_p))
    if asked.prefix is not None and features & (bits.LEFT | bits.RIGHT):
        features |= bits.PREFIX
    for bit, wanted in (
        (bits.DOCUMENTS, asked.query_ids is not None),
        (bits.BOOL_MASK, asked.mask_dtype == torch.bool),
        (bits.ADDITIVE_MASK, asked.mask is not None and asked.mask_dtype != torch.bool),
        (bits.SOFTCAP, asked.softcap > 0.0),
        (bits.ALIBI, asked.slopes is not None),
        (bits.SINKS, asked.sinks),
    ):
        features |= bit if wanted else 0
    # Not float32, whose natural scores have exact differences; nor where the scale makes the largest the least.
    scaled_last = dtype != torch.float32 and asked.scale > 0.0
    if scaled_last and not features & (bits.SOFTCAP | bits.ALIBI | bits.ADDITIVE_MASK):
        features |= bits.FOLDED
    slopes_stride = asked.slopes[1][0] if asked.slopes is not None and len(asked.slopes[0]) == 2 else 0
    batch_strides = [_broadcast_strides(layout, 1)[0] for layout in (asked.query_ids, asked.key_ids, asked.prefix)]
    grouped = heads // max(kv_heads, 1)
    left, right = min(left, MAX_LENGTH), min(right, MAX_LENGTH)
    return Launch(
        target, dtype, features, batches, heads, kv_heads, queries, keys, dim, value_dim, asked.sequences,
        (*lse_strides, *_broadcast_strides(asked.mask, 4), slopes_stride, *batch_strides), numbers,
        (queries, keys, shift, left, right, heads, grouped),
    )  # fmt: skip


def _ranges(ids: Tensor | None, block: int) -> Tensor | None:
    """The smallest and largest id of every block: int64 (batch, 2, blocks)."""
    if ids is None:
        return None
    batch, count = ids.shape
    blocks = -(-count // block)
    table = torch.empty((batch, 2, blocks), dtype=torch.int64, device=ids.device)
    if table.numel():
        SCORES.id_ranges[(batch * blocks,)](table, ids, ids.stride(0), count, blocks, BLOCK=block)
    return table


def _ranges_layout(ids: Layout | None, block: int) -> tuple[int, int]:
    """(stride of the batch, blocks) of that table."""
    if ids is None:
        return 0, 0
    (batch, count), _ = ids
    blocks = -(-count // block)
    return 2 * blocks if batch > 1 else 0, blocks


def _start(
    kernel: Any, launch: Launch, lanes: int, blocks: int, bytes_of_lane: int, strides: tuple[int, ...],
    ids: Layout | None, tile: int, constants: Mapping[str, Any],
) -> Start:  # fmt: skip
    """A kernel of a program for each of a lane's blocks. bytes_of_lane: what all of a lane's programs read."""
    ranges_stride, ranges = _ranges_layout(ids, tile)
    # So many lanes' blocks are started side by side.
    group = max(1, min(lanes, SHARED_BYTES // max(bytes_of_lane, 1)))
    numbers = (
        *strides, *launch.strides, ranges_stride, *launch.numbers, *launch.sizes, lanes, group, blocks, ranges,
        launch.sequences or 0,
    )  # fmt: skip
    return Start(kernel[(lanes * blocks,)], numbers, {**launch.constants, **constants}, tile)


def _like(layout: Layout, width: int) -> Layout:
    """(B, H, S, width) in the memory order of (B, H, S, E) tensors (op.memory_order)."""
    (batch, heads, length, _), (_, head_stride, row_stride, _) = layout
    row = max(width, 1)
    if head_stride < row_stride:
        line = row * max(heads, 1)
        return (batch, heads, length, width), (line * max(length, 1), row, line, 1)
    head = row * max(length, 1)
    return (batch, heads, length, width), (head * max(heads, 1), head, row, 1)


def _rows(layout: Layout) -> Layout:
    """(T, H, E) as (1, H, T, E)."""
    (length, heads, width), (row_stride, head_stride, stride) = layout
    return (1, heads, length, width), (0, head_stride, row_stride, stride)


def _laid_out(results: Sequence[Layout], asked: Asked) -> list[Layout]:
    """Layouts of the dense op, of packed rows or not."""
    return list(results) if asked.sequences is None else [_rows(layout) for layout in results]


class ForwardPlan(NamedTuple):
    """start: None where there is nothing to compute."""

    output: Layout
    lse: tuple[int, ...]
    start: Start | None


@functools.lru_cache(maxsize=4096)
def _forward_plan(
    target: Target, dtype: torch.dtype, query: Layout, key: Layout, value: Layout, asked: Asked
) -> ForwardPlan:
    query, key, value = _laid_out((query, key, value), asked)
    launch = _launch(target, dtype, query, key, value, asked)
    if asked.sequences is None:
        result = output = _like(query, launch.value_dim)
        lse: tuple[int, ...] = (launch.batches, launch.heads, launch.queries)
    else:
        line = launch.heads * launch.value_dim
        result = (launch.queries, launch.heads, launch.value_dim), (max(line, 1), max(launch.value_dim, 1), 1)
        output = _rows(result)
        lse = (launch.heads, launch.queries)
    wide = max(launch.dim, launch.value_dim)
    options = launch.options("forward", wide, launch.queries, launch.features)
    lanes, blocks = launch.batches * launch.heads, launch.blocks(launch.queries, options["ROWS"])
    if lanes * launch.queries == 0:
        return ForwardPlan(result, lse, None)
    strides = tuple(stride for layout in (output, query, key, value) for stride in layout[1][:3])
    read = launch.keys * (launch.dim + launch.value_dim) * dtype.itemsize // launch.sizes[-1]
    start = _start(
        FORWARD.forward, launch, lanes, blocks, read, strides, asked.key_ids, options["COLUMNS"],
        {"FEATURES": launch.features, **options},
    )  # fmt: skip
    return ForwardPlan(result, lse, start)


def _forward(query: Tensor, key: Tensor, value: Tensor, operands: Operands, asked: Asked) -> tuple[Tensor, Tensor]:
    plan = _forward_plan(
        devices.target_of(query.device), query.dtype, (query.shape, query.stride()), (key.shape, key.stride()),
        (value.shape, value.stride()), asked,
    )  # fmt: skip
    output = query.new_empty_strided(*plan.output)
    lse = query.new_empty(plan.lse, dtype=torch.float32)
    if plan.start is not None:
        with devices.on(query):
            plan.start(output, lse, query, key, value, _ranges(operands.key_ids, plan.start.tile), *operands)
    return output, lse


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
    operands, asked = _dense(key, mask, philox, scale, is_causal, bottom_right, dropout_p, given)
    return _forward(query, key, value, operands, asked)


class BackwardPlan(NamedTuple):
    """results: of query, key and value. parts: of the sinks' gradient, () where there are no sinks. rest: whether what
    probabilities are scaled by is wanted. A kernel that is None has nothing to compute."""

    launch: Launch
    results: tuple[Layout, Layout, Layout]
    delta: Start | None
    parts: tuple[int, ...]
    rest: bool
    of_query: Start | None
    of_key: Start | None


@functools.lru_cache(maxsize=4096)
def _backward_plan(
    target: Target, dtype: torch.dtype, grad: Layout, query: Layout, key: Layout, value: Layout, output: Layout,
    grad_lse: bool, asked: Asked,
) -> BackwardPlan:  # fmt: skip
    shapes = query[0], key[0], value[0]
    grad, query, key, value, output = _laid_out((grad, query, key, value, output), asked)
    launch = _launch(target, dtype, query, key, value, asked)
    if asked.sequences is None:
        results = laid_out = [_like(layout, layout[0][3]) for layout in (query, key, value)]
    else:
        results = [((t, h, e), (max(h * e, 1), max(e, 1), 1)) for t, h, e in shapes]
        laid_out = [_rows(layout) for layout in results]
    grad_query, grad_key, grad_value = (layout[1][:3] for layout in laid_out)
    dim, value_dim = launch.dim, launch.value_dim
    features = launch.features
    rest = bool(features & bits.ADDITIVE_MASK) or dtype == torch.float32
    features |= bits.REST if rest else 0
    delta = of_query = of_key = None
    parts: tuple[int, ...] = ()
    read = tuple(stride for layout in (grad, query, key, value) for stride in layout[1][:3])
    lanes = launch.batches * launch.heads
    if lanes * launch.queries:
        options = launch.options("delta", value_dim, launch.queries)
        blocks = -(-launch.queries // options["ROWS"])
        if asked.sinks:
            parts = (launch.batches, launch.heads, blocks)
        numbers = (*grad[1][:3], *output[1][:3], *launch.strides[:2], launch.queries, launch.heads, blocks)
        delta = Start(
            BACKWARD.delta[(lanes * blocks,)], numbers,
            {"FEATURES": (features & bits.SINKS) | (bits.GRAD_LSE if grad_lse else 0), "VALUE_DIM": value_dim,
             "BLOCK_VALUE": _block(value_dim), **options},
        )  # fmt: skip
        options = launch.options("backward_query", max(dim, value_dim), launch.queries, features)
        of_query = _start(
            BACKWARD.backward_query, launch, lanes, launch.blocks(launch.queries, options["ROWS"]),
            launch.keys * (dim + value_dim) * dtype.itemsize // launch.sizes[-1], (*grad_query, *read), asked.key_ids,
            options["COLUMNS"], {"FEATURES": features, **options},
        )  # fmt: skip
    lanes = launch.batches * launch.kv_heads
    if lanes * launch.keys:
        options = launch.options("backward_key", max(dim, value_dim), launch.keys, features)
        of_key = _start(
            BACKWARD.backward_key, launch, lanes, launch.blocks(launch.keys, options["COLUMNS"]),
            launch.queries * (dim + value_dim) * dtype.itemsize * launch.sizes[-1], (*grad_key, *grad_value, *read),
            asked.query_ids, options["ROWS"], {"FEATURES": features, **options},
        )  # fmt: skip
    return BackwardPlan(launch, (results[0], results[1], results[2]), delta, parts, rest, of_query, of_key)


def _mask_gradient(launch: Launch, mask: Tensor, tensors: Sequence[Any], operands: Operands) -> Tensor:
    """Of an additive mask, summed over what it was broadcast to. tensors: the kernel's, from grad to rest."""
    batches, heads, queries, keys = launch.batches, launch.heads, launch.queries, launch.keys
    result = torch.empty(mask.shape, dtype=mask.dtype, device=mask.device)
    if result.numel() == 0:
        return result
    if batches * heads * queries * keys == 0:
        return result.zero_()
    options = dict(launch.options("backward_mask", max(launch.dim, launch.value_dim), keys))
    mask_batches, mask_heads, mask_rows, mask_columns = mask.shape
    sum_rows, sum_columns = mask_rows < queries, mask_columns < keys
    down, across = -(-queries // options["ROWS"]), -(-keys // options["COLUMNS"])
    tiles = mask_batches * mask_heads * (1 if sum_rows else down) * (1 if sum_columns else across)
    steps = batches // mask_batches * (heads // mask_heads) * (down if sum_rows else 1) * (across if sum_columns else 1)
    # A share of the steps is a program's own sum, in float32: only where the sums are small beside Sq x Sk.
    splits = -(-steps // STEPS) if sum_rows or sum_columns else 1
    parts = result if splits == 1 else torch.empty((splits, *mask.shape), dtype=torch.float32, device=mask.device)
    BACKWARD.backward_mask[(tiles * splits,)](
        parts, *tensors, *operands[:6], *(stride for tensor in tensors[:4] for stride in tensor.stride()[:3]),
        *launch.strides, *launch.numbers, *launch.sizes, batches, *mask.shape, splits,
        FEATURES=launch.features | bits.REST, SUM_ROWS=sum_rows, SUM_COLUMNS=sum_columns, **launch.constants, **options,
    )  # fmt: skip
    return result if splits == 1 else parts.sum(0).to(mask.dtype)


def _backward(
    grad: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
    mask: Tensor | None, operands: Operands, asked: Asked,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, value, mask and sinks; (0,) where nobody asks. mask: an additive one that has one."""
    plan = _backward_plan(
        devices.target_of(query.device), query.dtype, (grad.shape, grad.stride()), (query.shape, query.stride()),
        (key.shape, key.stride()), (value.shape, value.stride()), (output.shape, output.stride()),
        grad_lse is not None, asked,
    )  # fmt: skip
    grad_query, grad_key, grad_value = (query.new_empty_strided(*layout) for layout in plan.results)
    grad_mask = grad_sinks = torch.empty((0,), dtype=torch.float32, device=query.device)
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    rest = torch.empty_like(lse) if plan.rest else None
    tensors = (grad, query, key, value, lse, delta)
    sinks = operands.sinks
    with devices.on(query):
        if plan.delta is None:
            grad_sinks = grad_sinks if sinks is None else torch.zeros_like(sinks)
        else:
            parts = torch.empty(plan.parts, dtype=torch.float32, device=lse.device) if plan.parts else None
            plan.delta(delta, parts, grad, output, lse, None if grad_lse is None else grad_lse.contiguous(), sinks)
            if sinks is not None and parts is not None:
                grad_sinks = parts.sum((0, 2)).to(sinks.dtype)
        if plan.of_query is not None:
            ranges = _ranges(operands.key_ids, plan.of_query.tile)
            plan.of_query(grad_query, rest, *tensors, ranges, *operands)
        if plan.of_key is not None:
            ranges = _ranges(operands.query_ids, plan.of_key.tile)
            plan.of_key(grad_key, grad_value, *tensors, rest, ranges, *operands[:-1])
        if mask is not None:
            grad_mask = _mask_gradient(plan.launch, mask, (*tensors, rest), operands)
    return grad_query, grad_key, grad_value, grad_mask, grad_sinks


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
    operands, asked = _dense(key, mask, philox, scale, is_causal, bottom_right, dropout_p, given)
    return _backward(
        grad_output, grad_lse, query, key, value, output, lse, mask if mask_grad else None, operands, asked
    )


IMPLEMENTATION = Implementation(supports, forward, backward)


def _packed(
    query: Tensor, key: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, seqused_k: Tensor | None, philox: Tensor | None,
    sinks: Tensor | None, slopes: Tensor | None, scale: float, max_q: int, max_k: int, left: int, right: int,
    softcap: float, dropout_p: float,
) -> tuple[Operands, Asked]:  # fmt: skip
    """The end of the packed op's arguments as kernels take them."""
    if devices.target_of(cu_seq_q.device).interpreted:  # a GPU's kernels stay within memory
        sequences_of(query, key, cu_seq_q, cu_seq_k, seqused_k, max_q, max_k)
    sinks, slopes = _close(sinks), _close(slopes)
    return Operands(None, philox, slopes, None, None, None, cu_seq_q, cu_seq_k, seqused_k, sinks), Asked(
        scale, dropout_p, False, False, left, right, softcap, sinks is not None, None, None,
        _layout(slopes), sequences=cu_seq_q.shape[0] - 1,
    )  # fmt: skip


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
    operands, asked = _packed(query, key, cu_seq_q, cu_seq_k, seqused_k, philox, sinks, slopes, *options)
    return _forward(query, key, value, operands, asked)


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
    operands, asked = _packed(query, key, cu_seq_q, cu_seq_k, seqused_k, philox, sinks, slopes, *options)
    grad_query, grad_key, grad_value, _, grad_sinks = _backward(
        grad_output, grad_lse, query, key, value, output, lse, None, operands, asked
    )
    return grad_query, grad_key, grad_value, grad_sinks


VARLEN = Implementation(supports, forward_varlen, backward_varlen)
