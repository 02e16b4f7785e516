"""Decoding, and appending to the cache, on the triton backend.

On a GPU nothing that stands in a tensor is looked at here, which would be to wait for it: the kernels stay within the
cache whatever it is. Interpreted, on CPU tensors, values are checked as on the cpu backend.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.dispatch import Implementation, takes_dtype
from fastattn.gpu import devices, tuning
from fastattn.gpu.deferred import Deferred
from fastattn.gpu.tuning import power_of_two
from fastattn.ops.decode.op import DecodeProblem
from fastattn.ops.decode.places import places

KERNELS = Deferred("fastattn.ops.decode.triton_kernels")
MAX_HEAD_DIM = 512
#: Of query, that share keys: tiles of 8 are a grid's second axis.
MOST_ROWS = 8 * 65535
#: Of a sequence: the end of a stretch that begins there is to be an int32, too.
MOST_SLOTS = 2**30
LOG2E = math.log2(math.e)
UNBOUNDED = 2**31 - 1

#: A stretch is at least this many slots for up to 16 rows of query, and as many times as many for as many times more:
#: what it leaves behind (float32 sums of all rows) is then an eighth of what it read at most.
SHORTEST_STRETCH = 256
#: Stretches of a long sequence.
MOST_STRETCHES = 64
#: With num_splits, stretches are multiples of this (GRAIN of the device code).
GRAIN = 128
#: Programs of a grid's second axis.
MOST_PROGRAMS = 65535


def supports(problem: DecodeProblem) -> str | None:
    reason = takes_dtype(problem)
    if reason is not None:
        return reason
    if not 1 <= problem.head_dim <= MAX_HEAD_DIM or not 1 <= problem.value_dim <= MAX_HEAD_DIM:
        return f"head dims are 1 to {MAX_HEAD_DIM}, got {problem.head_dim} and {problem.value_dim}"
    if not problem.paged and problem.slots > MOST_SLOTS:
        return f"takes {MOST_SLOTS} slots of a sequence, got {problem.slots}"
    rows = problem.queries * (problem.heads // problem.kv_heads)
    if rows > MOST_ROWS:
        return f"takes {MOST_ROWS} rows of query that share keys, got {rows}"
    return None


@dataclass(frozen=True, slots=True)
class Plan:
    """How the work is cut, a matter of the problem only, and what the tiles are. partials: floats of all stretches; 0
    where a sequence cannot have more than one."""

    group: int
    shortest: int
    parts: int
    splits: int
    partials: int
    grid: tuple[int, int, int]
    attend: tuning.Options
    combine_grid: tuple[int, int]
    combine: tuning.Options


@functools.lru_cache(maxsize=4096)
def _plan(
    target: devices.Target, dtype: torch.dtype, batch: int, queries: int, heads: int, kv_heads: int, dim: int,
    value_dim: int, capacity: int, page: int, padded: bool, left: int, right: int, scores: str, num_splits: int,
) -> Plan:  # fmt: skip
    group = heads // kv_heads
    rows, pairs = queries * group, batch * kv_heads
    shortest, parts = min(SHORTEST_STRETCH * power_of_two(-(-rows // 16)), MOST_SLOTS // GRAIN * GRAIN), MOST_STRETCHES
    if num_splits > 0:
        shortest, parts = GRAIN, min(num_splits, MOST_PROGRAMS - 1)
    seen = min(capacity, left + queries)
    # Stretches begin at multiples of their length: keys that begin within one touch one more.
    splits = min(-(-seen // shortest), parts) + (padded or left != UNBOUNDED)
    splits = max(min(splits, -(-capacity // shortest)), 1)
    attend = dict(tuning.options("decode", "attend", target, dtype, dim=max(dim, value_dim), size=rows))
    combine = dict(tuning.options("decode", "combine", target, dim=value_dim, size=rows))
    if page % attend["KEYS"] and attend["ROWS"] >= 16:  # pages are looked up stages before their keys are
        attend["STAGES"] = 2 * attend["STAGES"] - 1
    grid = (pairs, splits, -(-rows // attend["ROWS"]))
    combine_grid = (pairs, -(-rows // combine["ROWS"]))
    attend |= {
        "DIM": dim, "VALUE_DIM": value_dim, "D": _columns(dim), "DV": _columns(value_dim), "PAGE": page,
        "WINDOW": left != UNBOUNDED or right != UNBOUNDED, "PLAIN": scores == "plain", "SOFTCAP": scores == "capped",
        "COMPARE": num_splits > 0, "SPLIT": splits > 1,
    }  # fmt: skip
    combine |= {"VALUE_DIM": value_dim, "DV": _columns(value_dim), "COMPARE": num_splits > 0}
    attend |= devices.assertions(target)
    combine |= devices.assertions(target)
    partials = pairs * splits * rows * (value_dim + 1) if splits > 1 else 0
    return Plan(group, shortest, parts, splits, partials, grid, attend, combine_grid, combine)


def _columns(dim: int) -> int:
    """What a matrix product takes at least."""
    return max(power_of_two(dim), 16)


def forward(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor | None,
    cache_leftpad: Tensor | None,
    cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    appended: int,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, dim = query.shape
    cache_rows, slots, kv_heads, value_dim = value_cache.shape
    target = devices.target_of(query.device)
    if target.interpreted:
        places(key_cache, batch, cache_seqlens, cache_leftpad, cache_batch_idx, block_table, appended, False)
    output = query.new_empty((batch, queries, heads, value_dim))
    lse = query.new_empty((batch, heads, queries), dtype=torch.float32)
    if lse.numel() == 0:
        return output, lse
    page, capacity, table_row, slopes_batch = 0, slots, 0, 0
    if block_table is not None:
        block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
        page, capacity, table_row = slots, min(slots * block_table.shape[1], MOST_SLOTS), block_table.stride(0)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.contiguous()
        slopes_batch = heads if alibi_slopes.ndim == 2 else 0
    if cache_seqlens is not None:
        cache_seqlens = cache_seqlens.contiguous()
    if cache_leftpad is not None:
        cache_leftpad = cache_leftpad.contiguous()
    if cache_batch_idx is not None:
        cache_batch_idx = cache_batch_idx.contiguous()
    left = window_left if 0 <= window_left < UNBOUNDED else UNBOUNDED
    # The last query stands beside the last key: nothing is behind it.
    right = window_right if 0 <= window_right < UNBOUNDED and queries > 1 else UNBOUNDED
    if softcap > 0.0:
        factor, cap, scores = scale / softcap, softcap * LOG2E, "capped"
    else:
        factor, cap = scale * LOG2E, 0.0
        scores = "plain" if 1e-30 < scale < 1e30 and alibi_slopes is None else "scaled"
    plan = _plan(
        target, query.dtype, batch, queries, heads, kv_heads, dim, value_dim, capacity, page,
        cache_leftpad is not None, left, right, scores, num_splits,
    )  # fmt: skip
    partial = output
    if plan.partials:
        partial = query.new_empty(plan.partials, dtype=torch.float32)
    with devices.on(query):
        KERNELS.attend[plan.grid](
            output, lse, partial, query, key_cache, value_cache, cache_seqlens, cache_leftpad, cache_batch_idx,
            block_table, alibi_slopes, *query.stride()[:3], *key_cache.stride()[:3], *value_cache.stride()[:3],
            table_row, slopes_batch, batch, queries, plan.group, kv_heads, cache_rows, capacity, appended, left, right,
            factor, cap, plan.shortest, plan.parts, **plan.attend,
        )  # fmt: skip
        if plan.partials:
            KERNELS.combine[plan.combine_grid](
                output, lse, partial, cache_seqlens, cache_leftpad, batch, queries, plan.group, kv_heads, capacity,
                appended, left, right, plan.shortest, plan.parts, plan.splits, **plan.combine,
            )  # fmt: skip
    return output, lse


def append(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    cache_seqlens: Tensor | None,
    cache_leftpad: Tensor | None,
    cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
) -> None:
    """Writes key and value behind the ends of the sequences; on a GPU, what does not fit is left away."""
    batch, new, kv_heads, dim = key.shape
    target = devices.target_of(key.device)
    if target.interpreted:
        places(key_cache, batch, cache_seqlens, cache_leftpad, cache_batch_idx, block_table, new, True)
    assert cache_seqlens is not None
    value_dim = value.shape[3]
    if key.numel() == 0 or key_cache.numel() == 0:
        return
    page, capacity, table_row = 0, key_cache.shape[1], 0
    if block_table is not None:
        block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
        page, capacity, table_row = capacity, capacity * block_table.shape[1], block_table.stride(0)
    options = tuning.options("decode", "append", target, size=max(dim, value_dim))
    blocks = -(-new * kv_heads // options["ROWS"])
    with devices.on(key):
        KERNELS.append[(blocks * batch,)](
            key_cache, value_cache, key, value, cache_seqlens.contiguous(),
            None if cache_batch_idx is None else cache_batch_idx.contiguous(), block_table,
            *key_cache.stride()[:3], *value_cache.stride()[:3], *key.stride()[:3], *value.stride()[:3], table_row,
            new, kv_heads, key_cache.shape[0], capacity, blocks, DIM=dim, VALUE_DIM=value_dim, D=power_of_two(dim),
            DV=power_of_two(value_dim), PAGE=page, **options, **devices.assertions(target),
        )  # fmt: skip


IMPLEMENTATION = Implementation(supports, forward, None)
