"""Who runs against whom: ours, torch's own kernels, the best that plain torch can be written to do, torch.compile.

A peer is given its best form. What a user would prepare once, outside the loop, is prepared once (`adapt`): additive
masks, block masks. Functions take the arguments by the names of the op's public function.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.cases import Arguments, Suite
from fastattn.ops.attention.samples import may_see

OURS, TORCH, EAGER, COMPILE, FLEX = "fastattn", "torch", "eager", "compile", "flex"


@dataclass(frozen=True)
class Contender:
    """function(**adapt(arguments)) is the call that is timed.

    backward: whether it has one. compiles: at its first call, which is not like the others. needs: bytes, roughly.
    """

    name: str
    function: Callable[..., Any]
    adapt: Callable[[Arguments], Arguments] = dict
    backward: bool = True
    compiles: bool = False
    needs: Callable[[Arguments], int] = lambda arguments: 0


def attention_eager(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Two matrix products and a softmax in the fewest passes over the scores; mask is additive, of the query's dtype.

    Scale and mask are part of the first product, or the scale goes to the queries, which are the smaller side, and the
    mask is added in place: about a third faster than masked_fill on scaled scores. Heads that share keys are folded
    into one product.
    """
    batch, heads, queries, dim = query.shape
    kv_heads, keys, factor = *key.shape[1:3], _scale(query, scale)
    if kv_heads == heads and mask is not None and mask.ndim == 2:
        q, k, v = (t.reshape(batch * heads, t.shape[2], t.shape[3]) for t in (query, key, value))
        everywhere = mask.expand(batch * heads, queries, keys)
        weights = torch.softmax(torch.baddbmm(everywhere, q, k.transpose(1, 2), alpha=factor), -1)
        return torch.bmm(weights, v).view(batch, heads, queries, -1)
    scaled = query * factor
    if kv_heads == heads:
        scores = scaled @ key.transpose(-1, -2)
        return torch.softmax(scores if mask is None else scores.add_(mask), -1) @ value
    scores = scaled.reshape(batch, kv_heads, heads // kv_heads * queries, dim) @ key.transpose(-1, -2)
    if mask is not None:
        scores = (scores.view(batch, heads, queries, -1) + mask).view(scores.shape)
    return (torch.softmax(scores, -1) @ value).view(batch, heads, queries, -1)


def attention_written_out(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The formula as models write it: what torch.compile is given, which fuses it or recognises it as attention."""
    factor = _scale(query, scale)
    if key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * factor
    if mask is not None:
        scores = scores + mask
    return torch.softmax(scores, -1) @ value


def _scale(query: Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale


def boolean_mask(arguments: Arguments) -> Arguments:
    """The arguments with window, document_ids and prefix_len made one mask, as a user of torch would build it once."""
    described = {name: arguments[name] for name in ("window", "document_ids", "prefix_len") if name in arguments}
    if not described:
        return arguments
    kept = {name: value for name, value in arguments.items() if name not in described}
    causal = kept.pop("is_causal", False)
    seen = may_see(kept["query"], kept["key"], causal, "top_left", **described)
    assert seen is not None and kept.get("attn_mask") is None, "workloads have one kind of mask"
    return {**kept, "attn_mask": seen.squeeze()}


def additive_mask(arguments: Arguments) -> Arguments:
    """The arguments with every mask made one additive mask; bottom-right alignment is not a workload."""
    arguments = boolean_mask(arguments)
    query, key = arguments["query"], arguments["key"]
    mask = arguments.get("attn_mask")
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    if arguments.get("is_causal"):
        shape = (query.shape[2], key.shape[2])
        future = torch.full(shape, -torch.inf, dtype=query.dtype).triu_(1)
        mask = future if mask is None else mask + future
    kept: Arguments = {name: arguments[name] for name in ("query", "key", "value", "scale") if name in arguments}
    return {**kept, "mask": mask}


def _scores_bytes(arguments: Arguments) -> int:
    """Five S x S matrices live at once in the backward of attention that is not fused."""
    query, key = arguments["query"], arguments["key"]
    return 5 * query.shape[:3].numel() * key.shape[2] * query.element_size()


def _block_mask(arguments: Arguments) -> Arguments:
    from torch.nn.attention.flex_attention import create_block_mask

    if boolean_mask(arguments).get("attn_mask") is not None:
        raise RuntimeError("the flex contender takes causal workloads and those without a mask")
    query, key = arguments["query"], arguments["key"]
    names_kept = ("query", "key", "value", "scale", "enable_gqa")
    kept: Arguments = {name: arguments[name] for name in names_kept if name in arguments}
    if arguments.get("is_causal"):
        sizes = query.shape[2], key.shape[2]
        kept["block_mask"] = create_block_mask(lambda b, h, q, k: q >= k, None, None, *sizes, device="cpu")
    return kept


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def _attention(suite: Suite) -> dict[str, Callable[[], Contender]]:
    def flex() -> Contender:
        from torch.nn.attention.flex_attention import flex_attention

        # On CPU it has no backward.
        return Contender(FLEX, _compiled(flex_attention), _block_mask, backward=False, compiles=True)

    return {
        OURS: lambda: Contender(OURS, suite.function),
        TORCH: lambda: Contender(TORCH, F.scaled_dot_product_attention, boolean_mask),
        EAGER: lambda: Contender(EAGER, attention_eager, additive_mask, needs=_scores_bytes),
        COMPILE: lambda: Contender(
            COMPILE, _compiled(attention_written_out), additive_mask, compiles=True, needs=_scores_bytes
        ),
        FLEX: flex,
    }


def _others(suite: Suite) -> dict[str, Callable[[], Contender]]:
    return {
        OURS: lambda: Contender(OURS, suite.function),
        TORCH: lambda: Contender(TORCH, suite.peer),
        COMPILE: lambda: Contender(COMPILE, _compiled(suite.peer), compiles=True),
        **{name: functools.partial(Contender, name, function) for name, function in suite.peers},
    }


def choices(suite: Suite) -> dict[str, Callable[[], Contender]]:
    """Every contender of an op: its name and what makes it, anew for every case (torch.compile specialises)."""
    return _attention(suite) if suite.name == "attention" else _others(suite)


def names(suite: Suite, wanted: Sequence[str] | None) -> list[str]:
    """The contenders to run, ours and torch's always among them: the law is stated against torch's error.

    wanted: names; None for all but flex. ValueError for names that the op does not have.
    """
    known = list(choices(suite))
    if wanted is None:
        return [name for name in known if name != FLEX]
    for name in wanted:
        if name not in known:
            raise ValueError(f"{suite.name} has no contender {name!r}; there are {', '.join(known)}")
    return [name for name in known if name in (OURS, TORCH, *wanted)]
