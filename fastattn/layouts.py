"""Tensors as callers' lie in memory, for the cases of all ops."""

from __future__ import annotations

from torch import Tensor

from fastattn.cases import Sampler


def contiguous(s: Sampler, *shape: int, std: float = 1.0) -> Tensor:
    return s.normal(*shape, std=std)


def strided_rows(s: Sampler, *shape: int, std: float = 1.0) -> Tensor:
    """Rows with a gap after each, starting at an address that is aligned to nothing."""
    return s.normal(*shape[:-1], shape[-1] + 7, std=std)[..., 3:-4]


def transposed(s: Sampler, *shape: int, std: float = 1.0) -> Tensor:
    """The last dimension is not the innermost in memory."""
    return s.normal(*shape[:-2], shape[-1], shape[-2], std=std).transpose(-1, -2)


def permuted_rows(s: Sampler, *shape: int, std: float = 1.0) -> Tensor:
    """Rows of a (B, H, S, D) tensor seen as (B, S, H, D): no single stride walks along them."""
    return s.normal(shape[0], shape[2], shape[1], *shape[3:], std=std).transpose(1, 2)


def same_rows(s: Sampler, *shape: int, std: float = 1.0) -> Tensor:
    """One row many times: a stride of 0."""
    return s.normal(1, *shape[1:], std=std).expand(shape)


def same_columns(s: Sampler, *shape: int, std: float = 1.0) -> Tensor:
    return s.normal(*shape[:-1], 1, std=std).expand(shape)
