"""What a mask function of Transformers means, found by calling it with indices that remember what is done to them.

Transformers describes a mask as a function of (batch, head, query, key) that compares indices: causality is
`kv_idx <= q_idx`, a window `kv_idx > q_idx - width`, packed sequences are equal ids of both. Given an `Index` for the
query and one for the key, such a function returns a `Pattern`: a band around the diagonal, pairs of ids that must be
equal, and keys or queries that are masked. Where it does what cannot be said that way, the caller evaluates the mask
point by point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: Ids of masked keys and queries: below every id in use, and different, so that they do not see each other.
MASKED_KEY, MASKED_QUERY = -2, -1


class Unstructured(Exception):
    """The function does something with an index that no band and no equality of ids expresses."""


@dataclass(frozen=True)
class Frame:
    """Where the queries and the keys of a mask stand: query i at query_start + i, key j at key_start + j."""

    queries: int
    keys: int
    query_start: int
    key_start: int
    device: torch.device

    def start(self, axis: str) -> int:
        return self.query_start if axis == "query" else self.key_start

    def positions(self, axis: str) -> Tensor:
        """(1, n) int64"""
        return torch.arange(self.queries if axis == "query" else self.keys, device=self.device)[None] + self.start(axis)


@dataclass(frozen=True)
class Pattern:
    """Who sees whom, in positions: everything that is listed must hold.

    left: the query is at most so many positions behind the key; right: at most so many before it. None: no bound.
    ids: (B or 1, queries) and (B or 1, keys) that must be equal. masked: (axis, (B or 1, n) bool, True takes part).
    moved: bounds of positions that were looked up in a table: (left, right, values of queries, values of keys).
    """

    frame: Frame
    left: int | None = None
    right: int | None = None
    ids: tuple[tuple[Tensor, Tensor], ...] = ()
    masked: tuple[tuple[str, Tensor], ...] = ()
    moved: tuple[tuple[int | None, int | None, Tensor, Tensor], ...] = ()

    @property
    def device(self) -> torch.device:
        return self.frame.device

    def to(self, *_: Any, **__: Any) -> Pattern:
        return self

    def __and__(self, other: Any) -> Pattern:
        if isinstance(other, Pattern):
            return Pattern(
                self.frame, _tighter(self.left, other.left), _tighter(self.right, other.right), self.ids + other.ids,
                self.masked + other.masked, self.moved + other.moved,
            )  # fmt: skip
        if other is True:
            return self
        raise Unstructured(f"a mask and {type(other).__name__}")

    __rand__ = __and__


def _tighter(one: int | None, other: int | None) -> int | None:
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)


@dataclass(frozen=True)
class Batch:
    """The index of the batch element."""


@dataclass(frozen=True)
class PerBatch:
    """(B,) a number for each batch element."""

    values: Tensor


@dataclass(frozen=True, eq=False)
class Distance:
    """Position of the query minus position of the key, plus shift; negated: the other way round."""

    frame: Frame
    shift: int
    negated: bool
    absolute: bool = False

    def __abs__(self) -> Distance:
        if self.shift != 0:
            raise Unstructured("the absolute value of a shifted distance")
        return replace(self, absolute=True)

    def __neg__(self) -> Distance:
        return replace(self, shift=-self.shift, negated=not self.negated)

    def __add__(self, other: Any) -> Distance:
        if self.absolute:
            raise Unstructured("a shifted absolute value")
        return replace(self, shift=self.shift + _integer(other))

    def __sub__(self, other: Any) -> Distance:
        return self + -_integer(other)

    def _at_most(self, bound: int) -> Pattern:
        if self.absolute:
            if bound < 0:
                raise Unstructured("an absolute value below 0")
            return Pattern(self.frame, left=bound, right=bound)
        bound -= self.shift
        return Pattern(self.frame, right=bound) if self.negated else Pattern(self.frame, left=bound)

    def __le__(self, other: Any) -> Pattern:
        return self._at_most(_integer(other))

    def __lt__(self, other: Any) -> Pattern:
        return self._at_most(_integer(other) - 1)

    def __ge__(self, other: Any) -> Pattern:
        if self.absolute:
            raise Unstructured("keys that are far away")
        return (-self)._at_most(-_integer(other))

    def __gt__(self, other: Any) -> Pattern:
        if self.absolute:
            raise Unstructured("keys that are far away")
        return (-self)._at_most(-_integer(other) - 1)


@dataclass(frozen=True, eq=False)
class Index:
    """The position of the query or the key, plus shift; or what `values` (B or 1, n) has there, plus shift."""

    frame: Frame
    axis: str
    shift: int = 0
    values: Tensor | None = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        return self.frame.device

    def new_ones(self, *_: Any, **__: Any) -> Pattern:
        """What and_masks begins with: everything is seen."""
        return Pattern(self.frame)

    def concrete(self) -> Tensor:
        """(B or 1, n)"""
        return (self.frame.positions(self.axis) if self.values is None else self.values) + self.shift

    def __add__(self, other: Any) -> Index:
        if isinstance(other, PerBatch):
            return replace(self, shift=0, values=self.concrete() + other.values[:, None])
        return replace(self, shift=self.shift + _integer(other))

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, Index):
            if other.axis == self.axis or self.values is not None or other.values is not None:
                raise Unstructured("a difference of looked up positions")
            shift = self.shift - other.shift
            return Distance(self.frame, shift, negated=self.axis == "key")
        if isinstance(other, PerBatch):
            return replace(self, shift=0, values=self.concrete() - other.values[:, None])
        return self + -_integer(other)

    def __floordiv__(self, other: Any) -> Index:
        return replace(self, shift=0, values=self.concrete() // _integer(other))

    def __mod__(self, other: Any) -> Index:
        return replace(self, shift=0, values=self.concrete() % _integer(other))

    def _compared(self, other: Any, less: bool, equal: bool) -> Pattern:
        """self < other (less) or self > other, or equal."""
        if not isinstance(other, Index):
            bound = _integer(other)
            if self.values is None and not less and self.frame.start(self.axis) + self.shift > bound - equal:
                return Pattern(self.frame)  # all of them: what bidirectional masks begin with
            mine = self.concrete()
            holds = (mine < bound) if less else (mine > bound)
            return Pattern(self.frame, masked=((self.axis, holds | (mine == bound) if equal else holds),))
        if other.axis == self.axis:
            raise Unstructured("a position compared with another one of its kind")
        key, query = (self, other) if self.axis == "key" else (other, self)
        # key <= query + room for a bound on the right, query <= key + room for one on the left.
        is_right = less == (self.axis == "key")
        room = (query.shift - key.shift if is_right else key.shift - query.shift) - (0 if equal else 1)
        left, right = (None, room) if is_right else (room, None)
        if key.values is None and query.values is None:
            return Pattern(self.frame, left, right)
        if key.values is None or query.values is None:
            raise Unstructured("a position compared with a looked up one")
        return Pattern(self.frame, moved=((left, right, query.values, key.values),))

    def __le__(self, other: Any) -> Pattern:
        return self._compared(other, less=True, equal=True)

    def __lt__(self, other: Any) -> Pattern:
        return self._compared(other, less=True, equal=False)

    def __ge__(self, other: Any) -> Pattern:
        return self._compared(other, less=False, equal=True)

    def __gt__(self, other: Any) -> Pattern:
        return self._compared(other, less=False, equal=False)

    def __eq__(self, other: Any) -> Any:
        if not isinstance(other, Index) or other.axis == self.axis:
            raise Unstructured("an equality that is not of a query and a key")
        key, query = (self, other) if self.axis == "key" else (other, self)
        return Pattern(self.frame, ids=((query.concrete(), key.concrete()),))


def _integer(value: Any) -> int:
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dtype.is_floating_point:
            raise Unstructured(f"a tensor of shape {tuple(value.shape)}")
        return int(value)
    if isinstance(value, (Index, Distance, Pattern, PerBatch, Batch, float)):
        raise Unstructured(f"arithmetic with {type(value).__name__}")
    return value


class _Tables(TorchFunctionMode):
    """Tensors that are indexed with a Batch and an Index become an Index, a Pattern or a PerBatch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            found = _looked_up(args[0], args[1])
            if found is not None:
                return found
        return func(*args, **(kwargs or {}))


def _looked_up(table: Tensor, index: Any) -> Any:
    if isinstance(index, Batch) and table.ndim == 1:
        return PerBatch(table)
    if not isinstance(index, tuple) or not any(isinstance(part, Index) for part in index):
        return None
    if len(index) != 2 or not isinstance(index[0], Batch) or not isinstance(index[1], Index) or table.ndim != 2:
        raise Unstructured("a table of other than (batch, position)")
    place = index[1]
    positions = place.concrete()
    if positions.shape[0] == 1:
        row = positions[0]
        if row.numel() and (int(row.min()) < 0 or int(row.max()) >= table.shape[1]):
            raise Unstructured("a table that does not reach all positions")
        values = table[:, row]
    else:
        values = table.gather(1, positions)
    if values.dtype == torch.bool:
        return Pattern(place.frame, masked=((place.axis, values),))
    return Index(place.frame, place.axis, values=values)


def read(mask_function: Callable[..., Any], frame: Frame, tables: bool) -> Pattern | None:
    """The function's pattern; None where it has none. tables: whether it may look into tensors."""
    query, key = Index(frame, "query"), Index(frame, "key")
    if not tables:  # nothing to catch where torch.compile traces: a function of positions alone
        return mask_function(Batch(), Batch(), query, key)
    try:
        with _Tables():
            found = mask_function(Batch(), Batch(), query, key)
    except Exception:  # whatever a function does that an Index cannot: the caller evaluates it with numbers, where its
        return None  # own errors show
    return found if isinstance(found, Pattern) else None


def in_rows(pattern: Pattern) -> Pattern | None:
    """The pattern without `moved` positions; None where these are not positions within packed sequences.

    Positions that begin anew in every sequence differ as places in the row do, within a sequence; and elsewhere ids
    differ.
    """
    if not pattern.moved:
        return pattern
    frame = pattern.frame
    if frame.queries != frame.keys or frame.query_start != frame.key_start or not pattern.ids:
        return None
    left, right = pattern.left, pattern.right
    place = torch.arange(frame.keys, device=frame.device)
    for bound_left, bound_right, query_values, key_values in pattern.moved:
        if not torch.equal(query_values, key_values):
            return None
        steps = torch.diff(key_values - place, dim=-1) == 0
        for query_ids, key_ids in pattern.ids:
            runs = torch.diff(key_ids, dim=-1)
            if torch.equal(query_ids, key_ids) and bool((runs >= 0).all()) and bool((steps | (runs > 0)).all()):
                break
        else:
            return None
        left, right = _tighter(left, bound_left), _tighter(right, bound_right)
    return replace(pattern, left=left, right=right, moved=())


def merged_ids(pattern: Pattern, known: bool) -> tuple[Tensor, Tensor] | None:
    """One pair of ids that says what all of the pattern's ids and masked rows say; None if it says nothing.

    known: whether values may be looked at; otherwise masked rows are taken as masking something.
    """
    frame = pattern.frame
    query_ids: Tensor | None = None
    key_ids: Tensor | None = None
    for queries, keys in pattern.ids:
        if queries.numel() == 0 or keys.numel() == 0:
            continue
        least = torch.minimum(queries.min(), keys.min())
        if known and bool(least == torch.maximum(queries.max(), keys.max())):
            continue  # all of one sequence
        queries, keys = queries - least, keys - least
        if query_ids is None or key_ids is None:
            query_ids, key_ids = queries, keys
        else:
            span = torch.maximum(queries.max(), keys.max()) + 1
            query_ids, key_ids = query_ids * span + queries, key_ids * span + keys
    for axis, keep in pattern.masked:
        if known and bool(keep.all()):
            continue
        if query_ids is None or key_ids is None:
            query_ids = torch.zeros((1, frame.queries), dtype=torch.int32, device=frame.device)
            key_ids = torch.zeros((1, frame.keys), dtype=torch.int32, device=frame.device)
        if axis == "key":
            key_ids = torch.where(keep, key_ids, MASKED_KEY)
        else:
            query_ids = torch.where(keep, query_ids, MASKED_QUERY)
    return None if query_ids is None or key_ids is None else (query_ids, key_ids)
