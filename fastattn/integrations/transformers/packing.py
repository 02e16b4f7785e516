"""Padding that is not computed at all: layers run on the tokens of a batch, one sequence behind the other.

Attention leaves padded keys out anyway; products, norms and activations of a layer compute all of the rectangle.
`skip_padding` packs the tokens before each layer and unpacks them behind it: the model sees the rectangle, and the
tokens are what is computed.
"""

from __future__ import annotations

import functools
import types
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.integrations.transformers.masks import BandMask, Mask, PackedMask

#: From this share of tokens on, packing is not worth its two copies.
FULL = 0.95


class Unpackable(Exception):
    """An argument that is neither a row for each token nor the same for all of them."""


class TokenMask(PackedMask):
    """The mask of packed tokens, and the way back: rows (T,) of the batch x length rectangle."""

    def __init__(self, mask: BandMask, keep: Tensor) -> None:
        batch, length = keep.shape
        counts = keep.sum(1)
        bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        self.rows = keep.flatten().nonzero()[:, 0]
        self.rectangle = (batch, length)
        super().__init__(bounds, int(counts.max()), self.rows.shape[0], mask.left, mask.right)

    def pack(self, value: Any) -> Any:
        """An argument of a layer for the tokens alone."""
        batch, length = self.rectangle
        if isinstance(value, Tensor):
            if value.ndim == 1 and value.shape[0] == length:  # positions that all sequences share
                return value.index_select(0, self.rows % length)
            if value.ndim < 2 or value.ndim > 3 or value.shape[1] != length or value.shape[0] not in (1, batch):
                raise Unpackable(f"a tensor of shape {tuple(value.shape)}")
            flat = value.expand(batch, *value.shape[1:]).reshape(batch * length, *value.shape[2:])
            return flat.index_select(0, self.rows)[None]
        if isinstance(value, BandMask):
            return self
        if isinstance(value, (tuple, list)):
            return type(value)([self.pack(part) for part in value])
        if isinstance(value, dict):
            return {name: self.pack(part) for name, part in value.items()}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise Unpackable(type(value).__name__)

    def unpack(self, value: Any) -> Any:
        """A layer's result in the rectangle, padding 0."""
        if isinstance(value, Tensor):
            if value.shape[:2] != (1, self.shape[2]):
                return value
            batch, length = self.rectangle
            flat = value.new_zeros((batch * length, *value.shape[2:])).index_copy(0, self.rows, value[0])
            return flat.reshape(batch, length, *value.shape[2:])
        if isinstance(value, (tuple, list)):
            return type(value)([self.unpack(part) for part in value])
        return value


def _masks(value: Any) -> list[Mask]:
    if isinstance(value, (tuple, list, dict)):
        parts = value.values() if isinstance(value, dict) else value
        return [mask for part in parts for mask in _masks(part)]
    return [value] if isinstance(value, Mask) else []


def _token_mask(args: Any, kwargs: Any) -> TokenMask | None:
    """The tokens that a layer is called for; None where it is to be called as it is."""
    masks = _masks((args, kwargs))
    if len(masks) != 1:
        return None
    mask = masks[0]
    if not isinstance(mask, BandMask) or mask.keep is None or mask.offset != 0:
        return None
    keep = mask.keep.expand(mask.shape[0], -1)
    tokens = int(keep.sum())
    if tokens == 0 or tokens > FULL * keep.numel():
        return None
    if mask.left >= 0 or mask.right >= 0:  # distances must survive: no padding within a sequence
        steps = keep[:, 1:] != keep[:, :-1]
        if bool((steps.sum(1) > 2).any()) or bool(((steps.sum(1) == 2) & keep[:, 0]).any()):
            return None
    return TokenMask(mask, keep)


def _packed(tokens: TokenMask, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    try:
        return tokens.pack(tuple(args)), tokens.pack(kwargs)
    except Unpackable:
        return None


@torch.no_grad()
def _agree(layer: nn.Module, forward: Any, args: Any, kwargs: Any, packed: Any, tokens: TokenMask) -> bool:
    """Whether the layer gives every token what it gives it in the rectangle."""
    training = [module for module in layer.modules() if module.training]
    layer.eval()
    try:
        expected, found = forward(*args, **kwargs), tokens.unpack(forward(*packed[0], **packed[1]))
    finally:
        for module in training:
            module.training = True
    pairs = zip(*((value,) if isinstance(value, Tensor) else value for value in (found, expected)), strict=True)
    for mine, other in pairs:
        if not isinstance(other, Tensor) or not isinstance(mine, Tensor):
            continue
        if mine.shape != other.shape:
            return False
        flat = (t.reshape(-1, *t.shape[2:]).index_select(0, tokens.rows).float() for t in (mine, other))
        one, two = flat
        if not (one - two).norm() <= torch.finfo(other.dtype).eps ** 0.5 * two.norm():
            return False
    return True


class PackedForward(nn.Module):
    """In front of a layer's class: the forward pass on tokens alone, where the layer is called for a padded batch."""

    #: Shared by a model's layers: class -> whether its tokens are independent, found in its first padded call.
    fastattn_independent: dict[type, bool]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        original = type(self)._fastattn_packs  # type: ignore[attr-defined]
        known = self.fastattn_independent
        tokens = None
        if not torch.compiler.is_compiling() and known.get(original, True):
            tokens = _token_mask(args, kwargs)
        packed = None if tokens is None else _packed(tokens, args, kwargs)
        if tokens is not None and packed is not None:
            if original not in known:
                known[original] = _agree(self, super().forward, args, kwargs, packed, tokens)
            if known[original]:
                return tokens.unpack(super().forward(*packed[0], **packed[1]))
            warnings.warn(
                f"fastattn: {original.__name__} gives other results for packed tokens: its padding is computed",
                stacklevel=2,
            )
        return super().forward(*args, **kwargs)


@functools.cache
def packed_class(original: type) -> type:
    """The subclass of a layer's class that packs: one for each."""
    members = {
        "_fastattn_packs": original,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce,
    }
    return types.new_class(original.__name__, (PackedForward, original), exec_body=lambda body: body.update(members))


def _reduce(self: Any, protocol: Any) -> Any:
    """As the original pickles; the class is made again from it."""
    reduced = super(type(self), self).__reduce_ex__(max(int(protocol), 2))
    return (_new, (type(self)._fastattn_packs, *reduced[1][1:]), *reduced[2:])


def _new(original: type, *args: Any) -> nn.Module:
    cls = packed_class(original)
    module: nn.Module = cls.__new__(cls, *args)
    return module


def skip_padding(model: nn.Module) -> list[str]:
    """Makes the layers of a model compute tokens and no padding, where a batch is padded. Twice is harmless.

    For models with attn_implementation="fastattn" whose attention mask is padding (with causality or a window, too):
    encoders, and decoders in training. Hidden states of padded places are then 0 behind each layer, as
    flash_attention_2's attention is there. What else is called is called as before: batches that are (almost) full,
    steps with a cache, cross attention, arguments that are no rows of tokens, everything while torch.compile traces.
    A class of layers is tried both ways in its first padded call, and left alone, with a warning, where results differ.

    Returns: the names of the layers: elements of the outermost nn.ModuleLists of the model.
    """
    known: dict[type, bool] = {}
    names: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{layer}.") for layer in names):
            continue
        for index, layer in enumerate(module):
            names.append(f"{name}.{index}")
            if not isinstance(layer, PackedForward):
                original: Any = type(layer)
                layer.__class__ = packed_class(original)
            layer.fastattn_independent = known  # type: ignore[assignment]
    return names


def keep_padding(model: nn.Module) -> None:
    """Undoes skip_padding()."""
    for module in model.modules():
        if isinstance(module, PackedForward):
            module.__class__ = type(module)._fastattn_packs  # type: ignore[attr-defined]
            del module.fastattn_independent
