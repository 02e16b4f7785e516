"""Dropout, defined once: which elements of the (batch, head, query, key) score matrix are kept.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is a pure function of a 64-bit
key and a 128-bit counter, so the mask does not depend on tiles, threads or devices:

    key     = seed                              low 32 bits, high 32 bits
    counter = (offset, b * H + h, i, j // 4)    each modulo 2^32
    word    = j % 4                             of the four 32-bit words that come out
    kept    = word >= floor(p * 2^32)

Dropout of rows (add_layer_norm, add_rms_norm), an (rows, columns) matrix, asks at

    counter = (offset, row // 2^32, row, column // 4), word column % 4:

the mask of one batch and head where there are fewer than 2^32 rows. Every backend reproduces exactly this. (seed,
offset) is an int64 tensor of two elements, drawn by `draw`.
"""

from __future__ import annotations

import math

import torch

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def draw(device: torch.device) -> torch.Tensor:
    """A fresh (seed, offset) from torch's generator of `device`: int64, shape (2,).

    One torch op, so that seeds, activation checkpointing, compiled graphs and CUDA graphs treat it as they treat any
    random op.
    """
    return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device)


def fixed(seed: int, device: torch.device) -> torch.Tensor:
    """(seed, 0) as `draw` would return it; seed in [0, 2^63)."""
    return torch.tensor([seed, 0], dtype=torch.int64, device=device)


def check_seed(op: str, seed: int | torch.Tensor | None) -> None:
    """ValueError unless it fixes a state, or leaves it to torch's generator."""
    if isinstance(seed, torch.Tensor):
        if seed.shape != (2,) or seed.dtype != torch.int64:
            raise ValueError(f"{op}: a seed that is a tensor must be int64 (2,), got {seed.dtype} {tuple(seed.shape)}")
    elif seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"{op}: seed must be in [0, 2**63), got {seed}")


def state_of(seed: int | torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """(seed, offset) of a call: drawn where the caller fixed none, or the caller's own state."""
    if seed is None:
        return draw(device)
    return seed.to(device) if isinstance(seed, torch.Tensor) else fixed(seed, device)


def threshold(p: float) -> int:
    """floor(p * 2^32): an element is kept when its word is at least this."""
    return math.floor(p * 2.0**32)


def words(state: torch.Tensor, counter: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The four output words (int64 tensors holding 32-bit values) of Philox4x32-10.

    state: (seed, offset), int64 (2,). counter: the three words after the offset, int64 tensors that broadcast.
    """
    key0, key1 = state[0] & _LOW, (state[0] >> 32) & _LOW
    c1, c2, c3 = torch.broadcast_tensors(*(c & _LOW for c in counter))
    c0 = (state[1] & _LOW).expand_as(c1)
    for _ in range(10):
        # 32 x 32 -> 64 bit products; int64 wraps, the mask takes the right bits all the same.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = ((product1 >> 32) & _LOW) ^ c1 ^ key0, ((product0 >> 32) & _LOW) ^ c3 ^ key1
        c1, c3 = product1 & _LOW, product0 & _LOW
        key0, key1 = (key0 + WEYL[0]) & _LOW, (key1 + WEYL[1]) & _LOW
    return c0, c1, c2, c3


def keep_mask(state: torch.Tensor, p: float, batch: int, heads: int, queries: int, keys: int) -> torch.Tensor:
    """The mask itself: bool (batch, heads, queries, keys), True where the probability is kept.

    state: (seed, offset), int64 (2,), on the device where the mask is wanted. p: dropout probability in [0, 1].
    """
    device = state.device
    groups = -(-keys // 4)
    bh = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1)
    i = torch.arange(queries, device=device).view(1, 1, queries, 1)
    j4 = torch.arange(groups, device=device).view(1, 1, 1, groups)
    word = torch.stack(words(state, (bh, i, j4)), dim=-1)
    return (word >= threshold(p)).flatten(-2)[..., :keys]


def row_mask(state: torch.Tensor, p: float, rows: int, columns: int) -> torch.Tensor:
    """What dropout of rows keeps: bool (rows, columns). Leading dimensions count as rows, those that are normalised
    together as columns.

    state: (seed, offset), int64 (2,), on the device where the mask is wanted. p: dropout probability in [0, 1].
    """
    row = torch.arange(rows, device=state.device)[:, None]
    group = torch.arange(-(-columns // 4), device=state.device)
    word = torch.stack(words(state, (row >> 32, row, group)), dim=-1)
    return (word >= threshold(p)).flatten(-2)[:, :columns]
