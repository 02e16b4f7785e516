"""xformers.ops.fmha.attn_bias: which query sees which key, said by objects instead of matrices.

Every class here is a window and a corner that it is aligned to, of the whole matrix or of each of many blocks of it:
our kernels take both as they are, and what is not seen is not computed. Names, fields and makers are xformers'.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

Device = torch.device | str | None


def _default_device(device: Device) -> torch.device:
    if device is not None:
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class AttentionBias:
    """Base: query i sees keys p - left .. p + right of its position p, which is i or, from the bottom right,
    i + keys - queries; -1: no bound."""

    bottom_right: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Where subclasses that are dataclasses refuse what they hold."""

    @property
    def window(self) -> tuple[int, int]:
        """(left, right)"""
        return -1, -1

    def to(self, device: Any) -> Any:
        """The same for tensors on another device."""
        return self

    def seen(self, queries: int, keys: int, device: Device = "cpu") -> Tensor:
        """bool (queries, keys) of the whole matrix, or of one block."""
        left, right = self.window
        shift = keys - queries if self.bottom_right else 0
        i, j = torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)
        distance = j - i - shift
        found = torch.ones(queries, keys, dtype=torch.bool, device=device)
        if left >= 0:
            found &= distance >= -left
        if right >= 0:
            found &= distance <= right
        return found

    def materialize(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: Device = "cpu") -> Tensor:
        """The bias as a tensor of this shape, (..., queries, keys): 0 where a key is seen, else -inf. For tests."""
        seen = self._matrix(shape[-2], shape[-1], device)
        return torch.zeros(shape, dtype=dtype, device=device).masked_fill(~seen, -torch.inf)

    def _matrix(self, queries: int, keys: int, device: Device) -> Tensor:
        return self.seen(queries, keys, device)


class _Causal(AttentionBias):
    """Nothing behind the query's position is seen."""

    @property
    def window(self) -> tuple[int, int]:
        return -1, 0


class _LastKeys(AttentionBias):
    """The last _window_size keys up to the query's position are seen."""

    _window_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._window_size <= 0:
            raise ValueError(f"window_size must be at least 1, got {self._window_size}")

    @property
    def window(self) -> tuple[int, int]:
        return self._window_size - 1, 0


class _Local(AttentionBias):
    """window_left keys before the query's position and window_right behind it are seen."""

    window_left: int
    window_right: int

    @property
    def window(self) -> tuple[int, int]:
        return self.window_left, self.window_right


# ---- of the whole matrix ----


class LowerTriangularMask(_Causal):
    """Causal, aligned top left."""

    def __init__(self, device: Device = None) -> None:
        """device: without a meaning."""

    def add_bias(self, bias: Tensor) -> LowerTriangularMaskWithTensorBias:
        """Causal, with a tensor added to the scores."""
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    """Causal, aligned top left, with a tensor, (B, H, queries, keys) or what broadcasts to it, added to the scores."""

    def __init__(self, bias: Tensor) -> None:
        self._bias = bias

    def to(self, device: Any) -> LowerTriangularMaskWithTensorBias:
        return LowerTriangularMaskWithTensorBias(self._bias.to(device))

    def materialize(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: Device = "cpu") -> Tensor:
        return super().materialize(shape, dtype, device) + self._bias.to(dtype=dtype, device=device)


class LowerTriangularFromBottomRightMask(_Causal):
    """Causal, aligned bottom right: the last query sees the last key."""

    bottom_right = True

    def make_local_attention(self, window_size: int) -> LowerTriangularFromBottomRightLocalAttentionMask:
        """Of the last window_size keys only."""
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(_LastKeys, LowerTriangularFromBottomRightMask):
    """Causal, aligned bottom right, of the last _window_size keys, the query's own among them."""

    _window_size: int


@dataclass
class LocalAttentionFromBottomRightMask(_Local):
    """window_left keys before the query's position and window_right behind it, aligned bottom right."""

    window_left: int
    window_right: int

    bottom_right = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window_left < 0 or self.window_right < 0:
            raise ValueError(
                f"window_left and window_right must be at least 0, got {self.window_left} and {self.window_right}"
            )


# ---- how a dimension is cut into sequences ----


@dataclass
class _SeqLenInfo:
    """Sequences one behind the other. seqstart: (N + 1,) int32, where they start, and the end; seqstart_py: a list."""

    seqstart: Tensor
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list[int]

    def to(self, device: Any) -> Any:
        return replace(self, seqstart=self.seqstart.to(device))

    def intervals(self) -> Iterable[tuple[int, int]]:
        """(start, end) of every sequence."""
        return itertools.pairwise(self.seqstart_py)

    @classmethod
    def from_seqlens(cls, seqlens: Iterable[int], *, device: Device = None) -> _SeqLenInfo:
        lengths = [int(n) for n in seqlens]
        if any(n < 0 for n in lengths):
            raise ValueError(f"sequences must have a length of at least 0, got {lengths}")
        starts = [0, *itertools.accumulate(lengths)]
        return cls(_numbers(starts, device), max(lengths, default=0), min(lengths, default=0), starts)

    def split(self, x: Tensor, batch_sizes: Sequence[int] | None = None) -> list[Tensor]:
        """x, (1, total, ...), as tensors (B_i, M_i, ...) of the sequences; batch_sizes: how many go into each."""
        if x.shape[0] != 1 or x.shape[1] != self.seqstart_py[-1]:
            raise ValueError(f"what is split must be (1, {self.seqstart_py[-1]}, ...), got {tuple(x.shape)}")
        sizes = [1] * (len(self.seqstart_py) - 1) if batch_sizes is None else batch_sizes
        parts, at = [], 0
        for size in sizes:
            start, end = self.seqstart_py[at], self.seqstart_py[at + size]
            length = self.seqstart_py[at + 1] - start if size else 0
            parts.append(x[0, start:end].reshape(size, length, *x.shape[2:]))
            at += size
        return parts


@dataclass
class _WithRoom(_SeqLenInfo):
    """Sequences with room behind them. seqlen: (N,) int32, how much of each is used; seqlen_py: the same."""

    seqlen: Tensor
    seqlen_py: Sequence[int]

    def to(self, device: Any) -> Any:
        return replace(self, seqstart=self.seqstart.to(device), seqlen=self.seqlen.to(device))

    def intervals(self) -> Iterable[tuple[int, int]]:
        for (start, _), length in zip(super().intervals(), self.seqlen_py, strict=True):
            yield start, start + length

    @property
    def room(self) -> int:
        """The most keys that a sequence has room for."""
        return max((end - start for start, end in itertools.pairwise(self.seqstart_py)), default=0)


@dataclass
class _PaddedSeqLenInfo(_WithRoom):
    """Sequences that all have room for `padding`."""

    padding: int

    @classmethod
    def from_seqlens_padded(
        cls, seqlens: Sequence[int], padding: int, *, device: Device = None
    ) -> _PaddedSeqLenInfo:  # fmt: skip
        lengths = [int(n) for n in seqlens]
        if any(not 0 <= n <= padding for n in lengths):
            raise ValueError(f"kv_seqlen must be in [0, kv_padding], [0, {padding}], got {lengths}")
        starts = [i * padding for i in range(len(lengths) + 1)]
        return cls(
            _numbers(starts, device), max(lengths, default=0), min(lengths, default=0), starts,
            _numbers(lengths, device), lengths, padding,
        )  # fmt: skip


@dataclass
class _GappySeqInfo(_WithRoom):
    """Sequences that start anywhere."""

    @classmethod
    def from_seqlens_gappy(
        cls, seqstarts: Sequence[int], seqlens: Sequence[int], paged: bool = False, *, device: Device = None
    ) -> _GappySeqInfo:
        if paged:
            raise ValueError(
                "sequences in pages start with their first page here: see PagedBlockDiagonalPaddedKeysMask"
            )
        if len(seqstarts) != len(seqlens) + 1:
            raise ValueError(
                "kv_seqstarts must have one number more than kv_seqlen, the end, got"
                f" {len(seqstarts)} and {len(seqlens)}"
            )
        starts, lengths = [int(n) for n in seqstarts], [int(n) for n in seqlens]
        for i, ((start, end), length) in enumerate(zip(itertools.pairwise(starts), lengths, strict=True)):
            if not 0 <= length <= end - start:
                raise ValueError(f"sequence {i} of {length} keys does not fit between {start} and {end}")
        return cls(
            _numbers(starts, device), max(lengths, default=0), min(lengths, default=0), starts,
            _numbers(lengths, device), lengths,
        )  # fmt: skip


def _numbers(values: list[int], device: Device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=_default_device(device))


# ---- of each block ----


@dataclass
class _OfBlocks(AttentionBias):
    """Queries of block i see keys of block i only; of tensors whose batch size is 1."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: Any

    def to(self, device: Any) -> Any:
        return replace(self, q_seqinfo=self.q_seqinfo.to(device), k_seqinfo=self.k_seqinfo.to(device))


class BlockDiagonalBias(_OfBlocks):
    """Base of those whose blocks of keys lie one behind the other."""

    def _matrix(self, queries: int, keys: int, device: Device) -> Tensor:
        ends = self.q_seqinfo.seqstart_py[-1], self.k_seqinfo.seqstart_py[-1]
        if (queries, keys) != ends:
            raise ValueError(f"the blocks are of {ends[0]} queries and {ends[1]} keys, got {queries} and {keys}")
        found = torch.zeros(queries, keys, dtype=torch.bool, device=device)
        for (q0, q1), (k0, k1) in zip(self.q_seqinfo.intervals(), self.k_seqinfo.intervals(), strict=True):
            found[q0:q1, k0:k1] = self.seen(q1 - q0, k1 - k0, device)
        return found


def _same_count(q_seqlen: Sequence[int], kv_seqlen: Sequence[int]) -> None:
    if len(q_seqlen) != len(kv_seqlen):
        raise ValueError(f"there must be as many sequences of queries as of keys, got {len(q_seqlen)} and"
                         f" {len(kv_seqlen)}")  # fmt: skip


def _rows(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(1, -1, *t.shape[2:]) for t in tensors], 1)


@dataclass
class BlockDiagonalMask(BlockDiagonalBias):
    """Every block sees all of itself."""

    _batch_sizes: Sequence[int] | None = None

    @classmethod
    def from_seqlens(
        cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int] | None = None, *, device: Device = None
    ) -> Any:
        """Blocks of these lengths; keys as queries where kv_seqlen is None."""
        queries = _SeqLenInfo.from_seqlens(q_seqlen, device=device)
        if kv_seqlen is None or list(q_seqlen) == list(kv_seqlen):
            return cls(queries, queries)
        _same_count(q_seqlen, kv_seqlen)
        return cls(queries, _SeqLenInfo.from_seqlens(kv_seqlen, device=device))

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple[Any, Tensor]:
        """(bias, all rows as (1, total, ...)) of tensors (B_i, M_i, ...); `split` takes them apart again."""
        mask = cls.from_seqlens([t.shape[1] for t in tensors for _ in range(t.shape[0])], device=tensors[0].device)
        return replace(mask, _batch_sizes=[t.shape[0] for t in tensors]), _rows(tensors)

    @classmethod
    def from_tensor_lists_qkv(
        cls, tensors_q: Sequence[Tensor], tensors_k: Sequence[Tensor], tensors_v: Sequence[Tensor] | None = None
    ) -> tuple[Any, Tensor, Tensor, Tensor | None]:
        """(bias, queries, keys, values) as from_tensor_list."""
        _same_count(tensors_q, tensors_k)  # type: ignore[arg-type]
        lengths: tuple[list[int], list[int]] = ([], [])
        for q, k in zip(tensors_q, tensors_k, strict=True):
            if q.shape[0] != k.shape[0]:
                raise ValueError(f"queries and keys must have one batch size, got {q.shape[0]} and {k.shape[0]}")
            lengths[0].extend([q.shape[1]] * q.shape[0])
            lengths[1].extend([k.shape[1]] * k.shape[0])
        mask = cls.from_seqlens(*lengths, device=tensors_q[0].device)
        mask = replace(mask, _batch_sizes=[q.shape[0] for q in tensors_q])
        return mask, _rows(tensors_q), _rows(tensors_k), None if tensors_v is None else _rows(tensors_v)

    def split_queries(self, tensor: Tensor) -> list[Tensor]:
        return self.q_seqinfo.split(tensor, self._batch_sizes)

    def split_kv(self, tensor: Tensor) -> list[Tensor]:
        return self.k_seqinfo.split(tensor, self._batch_sizes)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of from_tensor_list again, of a result (1, total, ...)."""
        if self.q_seqinfo is not self.k_seqinfo:
            raise ValueError("queries and keys differ in length: use split_queries or split_kv")
        return self.split_queries(tensor)

    def _made(self, kind: Any, **more: Any) -> Any:
        return kind(q_seqinfo=self.q_seqinfo, k_seqinfo=self.k_seqinfo, _batch_sizes=self._batch_sizes, **more)

    def make_causal(self) -> BlockDiagonalCausalMask:
        return self._made(BlockDiagonalCausalMask)

    def make_causal_from_bottomright(self) -> BlockDiagonalCausalFromBottomRightMask:
        return self._made(BlockDiagonalCausalFromBottomRightMask)

    def make_local_attention(self, window_size: int) -> BlockDiagonalCausalLocalAttentionMask:
        return self._made(BlockDiagonalCausalLocalAttentionMask, _window_size=window_size)

    def make_local_attention_from_bottomright(
        self, window_size: int
    ) -> BlockDiagonalCausalLocalAttentionFromBottomRightMask:
        return self._made(BlockDiagonalCausalLocalAttentionFromBottomRightMask, _window_size=window_size)


@dataclass
class BlockDiagonalCausalMask(_Causal, BlockDiagonalMask):
    """Every block is causal, aligned top left."""


@dataclass
class BlockDiagonalCausalFromBottomRightMask(_Causal, BlockDiagonalMask):
    """Every block is causal, aligned bottom right; no block may have fewer keys than queries."""

    bottom_right = True

    def __post_init__(self) -> None:
        super().__post_init__()
        pairs = zip(self.q_seqinfo.intervals(), self.k_seqinfo.intervals(), strict=True)
        for i, ((q0, q1), (k0, k1)) in enumerate(pairs):
            if k1 - k0 < q1 - q0:
                raise ValueError(f"block {i} has {q1 - q0} queries and {k1 - k0} keys: there must be as many keys")


@dataclass
class BlockDiagonalCausalLocalAttentionMask(_LastKeys, BlockDiagonalCausalMask):
    """Every block is causal, aligned top left, of the last _window_size keys."""

    _window_size: int = 0


@dataclass
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(_LastKeys, BlockDiagonalCausalFromBottomRightMask):
    """Every block is causal, aligned bottom right, of the last _window_size keys."""

    _window_size: int = 0


# ---- of blocks with room behind their keys; all are aligned to the last key in use ----


@dataclass
class BlockDiagonalPaddedKeysMask(BlockDiagonalBias):
    """Every block sees those of its keys that are in use; all blocks have room for equally many."""

    bottom_right = True

    @classmethod
    def from_seqlens(
        cls, q_seqlen: Sequence[int], kv_padding: int, kv_seqlen: Sequence[int], causal_diagonal: Any = None, *,
        device: Device = None,
    ) -> Any:  # fmt: skip
        """Blocks of q_seqlen queries and kv_seqlen keys in use, with room for kv_padding. causal_diagonal: unused."""
        return cls(*cls._sides(q_seqlen, kv_padding, kv_seqlen, device))

    @staticmethod
    def _sides(
        q_seqlen: Sequence[int], kv_padding: int, kv_seqlen: Sequence[int], device: Device = None
    ) -> tuple[_SeqLenInfo, _PaddedSeqLenInfo]:
        _same_count(q_seqlen, kv_seqlen)
        return (
            _SeqLenInfo.from_seqlens(q_seqlen, device=device),
            _PaddedSeqLenInfo.from_seqlens_padded(kv_seqlen, kv_padding, device=device),
        )

    def make_paged(self, block_tables: Tensor, page_size: int, paged_type: Any) -> Any:
        """The same of keys in pages. paged_type: PagedBlockDiagonalPaddedKeysMask or its causal subclass."""
        keys = replace(self.k_seqinfo, padding=block_tables.shape[1] * page_size)
        return paged_type(self.q_seqinfo, keys, block_tables, page_size)

    def make_local_attention(self, window_left: int, window_right: int) -> BlockDiagonalLocalAttentionPaddedKeysMask:
        return BlockDiagonalLocalAttentionPaddedKeysMask(self.q_seqinfo, self.k_seqinfo, window_left, window_right)


@dataclass
class BlockDiagonalCausalWithOffsetPaddedKeysMask(_Causal, BlockDiagonalPaddedKeysMask):
    """And causal."""

    causal_diagonal: Any = None


@dataclass
class BlockDiagonalLocalAttentionPaddedKeysMask(_Local, BlockDiagonalPaddedKeysMask):
    """And window_left keys before, window_right behind the query's position."""

    window_left: int
    window_right: int

    @classmethod
    def from_seqlens_local(
        cls, q_seqlen: Sequence[int], kv_padding: int, kv_seqlen: Sequence[int], window_left: int, window_right: int
    ) -> Any:
        return cls(*cls._sides(q_seqlen, kv_padding, kv_seqlen), window_left, window_right)


@dataclass
class BlockDiagonalCausalLocalAttentionPaddedKeysMask(_LastKeys, BlockDiagonalPaddedKeysMask):
    """And causal, of the last _window_size keys."""

    _window_size: int

    @classmethod
    def from_seqlens_local(
        cls, q_seqlen: Sequence[int], kv_padding: int, kv_seqlen: Sequence[int], window_size: int
    ) -> Any:
        return cls(*cls._sides(q_seqlen, kv_padding, kv_seqlen), window_size)


@dataclass
class BlockDiagonalGappyKeysMask(BlockDiagonalBias):
    """Every block sees those of its keys that are in use; blocks of keys start anywhere."""

    bottom_right = True

    @classmethod
    def from_seqlens(
        cls, q_seqlen: Sequence[int], kv_seqstarts: Sequence[int], kv_seqlen: Sequence[int], *, device: Device = None
    ) -> Any:
        """kv_seqstarts: where the blocks start, and the number of all keys."""
        _same_count(q_seqlen, kv_seqlen)
        return cls(
            _SeqLenInfo.from_seqlens(q_seqlen, device=device),
            _GappySeqInfo.from_seqlens_gappy(kv_seqstarts, kv_seqlen, device=device),
        )


@dataclass
class BlockDiagonalCausalWithOffsetGappyKeysMask(_Causal, BlockDiagonalGappyKeysMask):
    """And causal."""


@dataclass
class PagedBlockDiagonalPaddedKeysMask(_OfBlocks):
    """Every block sees those of its keys that are in use, which lie in pages.

    Key j of block i is in row block_tables[i, j // page_size] * page_size + j % page_size of key and value.
    """

    block_tables: Tensor
    page_size: int

    bottom_right = True

    def to(self, device: Any) -> Any:
        return replace(super().to(device), block_tables=self.block_tables.to(device))

    @classmethod
    def from_seqlens(
        cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int], block_tables: Tensor, page_size: int, *,
        device: Device = None,
    ) -> Any:  # fmt: skip
        sides = BlockDiagonalPaddedKeysMask._sides(q_seqlen, block_tables.shape[1] * page_size, kv_seqlen, device)
        return cls(*sides, block_tables, page_size)

    def _matrix(self, queries: int, keys: int, device: Device) -> Tensor:
        found = torch.zeros(queries, keys, dtype=torch.bool, device=device)
        for i, (q0, q1) in enumerate(self.q_seqinfo.intervals()):
            length = self.k_seqinfo.seqlen_py[i]
            slot = torch.arange(length, device=device)
            page = self.block_tables[i].to(device)[slot // self.page_size]
            found[q0:q1, page * self.page_size + slot % self.page_size] = self.seen(q1 - q0, length, device)
        return found


@dataclass
class PagedBlockDiagonalCausalWithOffsetPaddedKeysMask(_Causal, PagedBlockDiagonalPaddedKeysMask):
    """And causal."""
