"""Masks as our kernels take them: bands and ids instead of a matrix, made where Transformers asks for a mask.

A model makes its masks once a forward pass and hands them to every layer. What it gets from us is a `BandMask` or (for
one query) a `RangeMask` where we know what is masked, and the boolean matrix of Transformers' own sdpa otherwise. Who
does anything with our masks but hand them on gets that matrix. None is one query that sees every key: unlike sdpa's,
our masks never leave it to module.is_causal what they mean.
"""

from __future__ import annotations

import abc
import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import masking_utils

from fastattn.integrations.transformers.patterns import Frame, Pattern, in_rows, merged_ids, read

_SDPA_MASK = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
_EAGER_MASK = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["eager"]


class Mask(abc.ABC):
    """Who sees whom, as if it were a boolean tensor (B, 1, queries, keys), True takes part.

    It is one for whoever uses it as one: operators, torch's functions and attributes work on `dense()`.
    """

    dtype = torch.bool
    ndim = 4

    def __init__(self, batch: int, queries: int, keys: int, device: torch.device) -> None:
        self.shape = torch.Size((batch, 1, queries, keys))
        self.device = device
        self._dense: Tensor | None = None

    @abc.abstractmethod
    def _build(self) -> Tensor:
        """(B or 1, 1, queries, keys) bool"""

    def dense(self) -> Tensor:
        """(B or 1, 1, queries, keys) bool, built when it is asked for."""
        if self._dense is None:
            self._dense = self._build()
        return self._dense

    def dim(self) -> int:
        return 4

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self) -> Mask:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        target = args[0] if args else kwargs.get("device")
        if len(args) + len(kwargs) == 1 and isinstance(target, (str, torch.device)):
            target = torch.device(target)
            if target.type == self.device.type and target.index in (None, self.device.index):
                return self
        return self._expanded().to(*args, **kwargs)

    def _expanded(self) -> Tensor:
        return self.dense().expand(self.shape)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._expanded(), name)

    def __getitem__(self, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        if len(parts) <= 4 and all(
            isinstance(part, slice) and part.start in (None, 0) and part.step in (None, 1)
            and (part.stop is None or part.stop >= size)
            for part, size in zip(parts, self.shape, strict=False)
        ):  # fmt: skip
            return self
        return self._expanded()[index]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(Mask, lambda mask: mask._expanded(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __len__(self) -> int:
        return self.shape[0]

    def __and__(self, other: Any) -> Tensor:
        return self._expanded() & other

    __rand__ = __and__

    def __or__(self, other: Any) -> Tensor:
        return self._expanded() | other

    __ror__ = __or__

    def __invert__(self) -> Tensor:
        return ~self._expanded()

    def __add__(self, other: Any) -> Tensor:
        return self._expanded() + other

    __radd__ = __add__

    def __mul__(self, other: Any) -> Tensor:
        return self._expanded() * other

    __rmul__ = __mul__

    def __sub__(self, other: Any) -> Tensor:
        return self._expanded() - other

    def __rsub__(self, other: Any) -> Tensor:
        return other - self._expanded()


class BandMask(Mask):
    """Query i sees the keys from i + offset - left to i + offset + right whose id is the query's.

    left, right: -1 is no bound. ids: (B or 1, queries) and (B or 1, keys), or None. keep: (B or 1, keys) bool where
    padding is all that ids say, of queries as of keys.
    """

    def __init__(
        self,
        batch: int,
        queries: int,
        keys: int,
        device: torch.device,
        offset: int,
        left: int,
        right: int,
        ids: tuple[Tensor, Tensor] | None,
        keep: Tensor | None = None,
    ) -> None:
        super().__init__(batch, queries, keys, device)
        self.offset, self.left, self.right, self.ids, self.keep = offset, left, right, ids, keep

    def __repr__(self) -> str:
        return (
            f"BandMask({tuple(self.shape)}, offset={self.offset}, left={self.left}, right={self.right},"
            f" ids={self.ids is not None})"
        )

    def _build(self) -> Tensor:
        queries, keys = self.shape[2:]
        place = torch.arange(queries, device=self.device)[:, None] + self.offset
        ahead = torch.arange(keys, device=self.device)[None] - place
        seen = torch.ones((1, 1, queries, keys), dtype=torch.bool, device=self.device)
        if self.right >= 0:
            seen = seen & (ahead <= self.right)
        if self.left >= 0:
            seen = seen & (ahead >= -self.left)
        if self.ids is not None:
            seen = seen & (self.ids[0][:, None, :, None] == self.ids[1][:, None, None, :])
        return seen


class PackedMask(BandMask):
    """Sequences one behind the other in one row: sequence n is places bounds[n] to bounds[n + 1] - 1.

    bounds: (N + 1,) integers. longest: at least the length of the longest sequence.
    """

    def __init__(self, bounds: Tensor, longest: int, length: int, left: int, right: int) -> None:
        place = torch.arange(length, device=bounds.device)
        ids = torch.searchsorted(bounds[1:].contiguous(), place, right=True)[None]
        super().__init__(1, length, length, bounds.device, 0, left, right, (ids, ids))
        self.bounds, self.longest = bounds, longest


class RangeMask(Mask):
    """One query for each batch element, which sees the keys from starts[b] to ends[b] - 1. Both (B,) int64.

    There is no number in it that changes from step to step of a static cache: a compiled step is compiled once.
    """

    def __init__(self, keys: int, starts: Tensor, ends: Tensor) -> None:
        super().__init__(starts.shape[0], 1, keys, starts.device)
        self.starts, self.ends = starts, ends

    def __repr__(self) -> str:
        return f"RangeMask({tuple(self.shape)})"

    def _build(self) -> Tensor:
        place = torch.arange(self.shape[3], device=self.device)
        seen = (place >= self.starts[:, None]) & (place < self.ends[:, None])
        return seen[:, None, None, :]


def _band(pattern: Pattern, batch: int, known: bool) -> BandMask | None:
    """The mask of a pattern; None where a bound is beyond what a band with ids can say."""
    frame = pattern.frame
    offset, left, right = frame.query_start - frame.key_start, pattern.left, pattern.right
    if right is not None and right < 0:  # strictly before: a diagonal further left
        offset, left, right = offset + right, None if left is None else left + right, 0
    if left is not None and left < 0:
        return None
    square = frame.queries == frame.keys and frame.query_start == frame.key_start and not pattern.ids
    rows = [row for axis, row in pattern.masked if axis == "key"]
    keep = rows[0] if square and len(rows) == len(pattern.masked) == 1 else None
    # Bounds that no query and key of this mask reach are none; a triangle is served faster than a window.
    if left is not None and offset + frame.queries - 1 <= left:
        left = None
    if right is not None and frame.keys - 1 - offset <= right:
        right = None
    ids = merged_ids(pattern, known)
    return BandMask(
        batch, frame.queries, frame.keys, frame.device, offset, -1 if left is None else left,
        -1 if right is None else right, ids, None if ids is None else keep,
    )  # fmt: skip


def _padding(attention_mask: Tensor | None, frame: Frame) -> tuple[tuple[str, Tensor], ...]:
    """The 2-D mask's part for these keys; keys that it does not reach are masked."""
    if attention_mask is None:
        return ()
    end = frame.key_start + frame.keys
    row = attention_mask[:, frame.key_start : end].to(torch.bool)
    missing = frame.keys - row.shape[1]
    if missing > 0:
        row = torch.nn.functional.pad(row, (0, missing), value=False)
    return (("key", row),)


def _range(row: Tensor, batch: int) -> RangeMask | Tensor:
    """One query's (B or 1, keys) mask as a range if it is one, else as it is."""
    starts, count = row.to(torch.int8).argmax(1), row.sum(1)
    ends = starts + count
    place = torch.arange(row.shape[1], device=row.device)
    if bool((row & ((place < starts[:, None]) | (place >= ends[:, None]))).any()):
        return row.expand(batch, -1)[:, None, None, :]
    return RangeMask(row.shape[1], starts.expand(batch), ends.expand(batch))


def _one_query(pattern: Pattern, batch: int, skip: bool) -> RangeMask | Tensor | None:
    """The mask of a single query; None, where that may be left away (skip), if it sees everything."""
    frame = pattern.frame
    offset = frame.query_start - frame.key_start
    first = 0 if pattern.left is None else min(max(0, offset - pattern.left), frame.keys)
    end = frame.keys if pattern.right is None else min(frame.keys, offset + pattern.right + 1)
    rows = [keep.expand(-1, frame.keys) for _, keep in pattern.masked if not bool(keep.all())]
    rows += [queries == keys for queries, keys in pattern.ids]
    if not rows and first == 0 and end == frame.keys and skip:
        return None
    if not rows:
        starts, ends = (torch.full((batch,), n, device=frame.device) for n in (first, max(first, end)))
        return RangeMask(frame.keys, starts, ends)
    row = rows[0] if len(rows) == 1 else functools.reduce(torch.logical_and, rows)
    if first > 0 or end < frame.keys:
        row = row.clone()
        row[:, :first] = False
        row[:, end:] = False
    return _range(row, batch)


def _query_start(arguments: dict[str, Any]) -> tuple[int, int] | None:
    """(number of queries, position of the first); None where it is not known or positions are no range."""
    positions = arguments.get("cache_position")  # before 5.0
    if positions is None:
        return arguments["q_length"], int(arguments.get("q_offset", 0))
    count = positions.shape[0]
    first = int(positions[0]) if count else 0
    if not torch.equal(positions, torch.arange(count, device=positions.device) + first):
        return None
    return count, first


def _traced_start(arguments: dict[str, Any]) -> tuple[int, int] | None:
    """The same where torch.compile traces and no tensor can be looked into."""
    start = arguments.get("q_offset", 0)
    if "cache_position" in arguments or isinstance(start, Tensor):
        return None
    return arguments["q_length"], start


#: Module of a config -> whether the models beside it take attention implementations.
_takes: dict[str, bool] = {}


@torch.compiler.assume_constant_result
def takes_implementations(config_module: str) -> bool:
    """Whether the models whose config is defined in this module call the attention function that they are set to.

    Models with attention of their own add the mask to the scores, whatever the implementation's name: they must get one
    that can be added.
    """
    if config_module not in _takes:
        models = sys.modules.get(config_module.replace("configuration_", "modeling_"))
        found = {} if models is None else vars(models)
        own = [
            name
            for name, value in found.items()
            if isinstance(value, type) and "Attention" in name and value.__module__ == found["__name__"]
        ]
        _takes[config_module] = not own or "ALL_ATTENTION_FUNCTIONS" in found
        if not _takes[config_module]:
            warnings.warn(
                f"fastattn: {config_module.split('.')[-2]} has attention of its own ({own[0]}) that takes no attention"
                ' implementation; it runs as with attn_implementation="eager"',
                stacklevel=2,
            )
    return _takes[config_module]


def fastattn_mask(
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Any = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    config: Any = None,
    device: Any = None,
    **arguments: Any,
) -> Any:
    """The mask that a model asks for: what ALL_MASK_ATTENTION_FUNCTIONS["fastattn"] is. See this module's docstring.

    Args: those of transformers.masking_utils.sdpa_mask, of its version.

    Returns:
        BandMask, RangeMask; None for one query that sees everything; else what sdpa gets: a bool tensor (B, 1, queries,
        keys), or None for what module.is_causal says. For models with attention of their own what eager gets.
    """
    if isinstance(attention_mask, Mask):  # made before, for the whole model
        return attention_mask

    def explicit(make: Callable[..., Any] = _SDPA_MASK) -> Any:
        given = {**arguments, "device": device, "use_vmap": use_vmap, "config": config}
        return make(
            batch_size=batch_size, kv_length=kv_length, kv_offset=kv_offset, mask_function=mask_function,
            attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip, **given,
        )  # fmt: skip

    if config is not None and not takes_implementations(type(config).__module__):
        return explicit(_EAGER_MASK)
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if traced:
        # Here a function that looks into a tensor cannot be told from one that does not, but by who is asking.
        plain = (allow_is_causal_skip or allow_is_bidirectional_skip) and not use_vmap
        chunked = getattr(config, "attention_chunk_size", None) is not None
        queries = _traced_start(arguments) if plain and not chunked and not torch.jit.is_tracing() else None
    else:
        queries = _query_start(arguments)
    if queries is None:
        return explicit()
    if device is None:
        positions = arguments.get("cache_position")
        device = positions.device if positions is not None else "cpu"
    frame = Frame(queries[0], kv_length, queries[1], kv_offset, torch.device(device))
    if frame.device.type == "meta":
        return explicit()
    pattern = read(mask_function, frame, tables=not traced)
    if pattern is not None:
        pattern = pattern & Pattern(frame, masked=_padding(attention_mask, frame))
        pattern = pattern if traced else in_rows(pattern)
        if pattern is not None and frame.queries == 1 and not traced:
            return _one_query(pattern, batch_size, allow_is_causal_skip)
    mask = None if pattern is None else _band(pattern, batch_size, known=not traced)
    if mask is None:
        return explicit()
    if frame.queries == 1 and mask.ids is None and mask.left < 0 and mask.right < 0 and allow_is_causal_skip:
        return None
    return mask


#: Explicit mask -> (its version, what recognised() made of it): all layers of a model get the same tensor.
_recognised: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def recognised(mask: Tensor) -> Tensor | Mask:
    """An explicit mask as a BandMask or RangeMask where it is padding, causality or both; else the mask itself.

    Models that make their own masks (most encoders before 5.0) hand over (B, 1, Sq, Sk) of 0 and the lowest number.
    """
    if mask.requires_grad or mask.ndim != 4 or mask.shape[1] != 1 or mask.numel() == 0 or mask.device.type == "meta":
        return mask
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return mask
    version = None if mask.is_inference() else mask._version
    known = _recognised.get(mask)
    if known is None or version is None or known[0] != version:
        known = version, _recognise(mask)
        _recognised[mask] = known
    return mask if known[1] is None else known[1]


def _recognise(mask: Tensor) -> Mask | None:
    seen = mask
    if mask.dtype.is_floating_point:
        seen = mask == 0
        if not bool((seen | (mask <= torch.finfo(mask.dtype).min)).all()):
            return None
    elif mask.dtype != torch.bool:
        return None
    batch, _, queries, keys = mask.shape
    last = seen[:, :, -1]
    if queries == 1:
        found = _range(last[:, 0], batch)
        return found if isinstance(found, RangeMask) else None
    frame = Frame(queries, keys, keys - queries, 0, mask.device)
    padding = Pattern(frame, masked=(("key", last[:, 0]),))
    for pattern in (padding, padding & Pattern(frame, right=0)):
        band = _band(pattern, batch, known=True)
        if band is not None and torch.equal(band.dense().expand_as(seen), seen):
            return band
    return None
