"""xformers.ops.fmha.merge_attentions: attention to all keys, from attention to parts of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NAME = "merge_attentions"


def merge_attentions(
    attn_split: Tensor | Sequence[Tensor],
    lse_split: Tensor | Sequence[Tensor],
    write_lse: bool = True,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(output, lse) of queries over the keys of all parts, of which none is in two; differentiable.

    lse is the log-sum-exp of all lse_i, and the output the sum of exp(lse_i - lse) * output_i, summed in lse's dtype.

    Args:
        attn_split: outputs of memory_efficient_attention_partial, each (B, M, H, Kv) or (B, M, G, H, Kv): a list of
            them, or one tensor of them stacked.
        lse_split: their lse, (B, H, M) or (B, G, H, M), likewise.
        write_lse: False: None in the place of lse.
        output_dtype: of the output; the parts' by default.

    Queries that see no key in any part have output 0 and lse -inf. Raises ValueError for parts that do not fit.
    """
    outputs, statistics = list(attn_split), list(lse_split)
    _check(outputs, statistics)
    lses = torch.stack(statistics)
    dead = (lses == -torch.inf).all(0)
    lses = lses.masked_fill(dead, 0.0)
    weights = torch.softmax(lses, 0).masked_fill(dead, 0.0).movedim(-1, 2).unsqueeze(-1)
    merged = sum(weight * output.to(weight.dtype) for weight, output in zip(weights, outputs, strict=True))
    assert isinstance(merged, Tensor)
    lse = torch.logsumexp(lses, 0).masked_fill(dead, -torch.inf) if write_lse else None
    return merged.to(output_dtype or outputs[0].dtype), lse


def _check(outputs: Sequence[Tensor], statistics: Sequence[Tensor]) -> None:
    if not outputs or len(outputs) != len(statistics):
        raise ValueError(
            f"{NAME}: there must be an lse for each output, and at least one, got {len(outputs)} outputs and"
            f" {len(statistics)} lse"
        )
    for output, lse in zip(outputs, statistics, strict=True):
        fits = output.ndim in (4, 5) and lse.shape == (output.shape[0], *output.shape[2:-1], output.shape[1])
        if not fits or output.shape != outputs[0].shape:
            raise ValueError(
                f"{NAME}: outputs must all be one (B, M, H, Kv) or (B, M, G, H, Kv), and lse (B, H, M) or (B, G, H, M),"
                f" got {tuple(output.shape)} and {tuple(lse.shape)} beside {tuple(outputs[0].shape)}"
            )
