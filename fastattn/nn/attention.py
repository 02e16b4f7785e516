"""Multi-head attention with torch.nn.MultiheadAttention's arguments.

Shapes: N batch, L queries, S keys, E model width, H heads, D head dim; what is called masked here is True or -inf in
masks of nn.MultiheadAttention, which is the opposite of an attention mask of the op.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import dispatch, ops
from fastattn.nn.linear import linear
from fastattn.nn.served import Served, no_attention, refusal


class MultiheadAttentionForward(Served):
    """torch.nn.MultiheadAttention on fastattn.linear and fastattn.scaled_dot_product_attention."""

    embed_dim: int
    kdim: int
    vdim: int
    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    in_proj_weight: Any
    q_proj_weight: Any
    k_proj_weight: Any
    v_proj_weight: Any
    in_proj_bias: Any
    bias_k: Any
    bias_v: Any
    add_zero_attn: bool
    out_proj: Any

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention outputs, and the probabilities where they are asked for. See MultiheadAttention."""
        reason = self._refusal(query, key, value, key_padding_mask, attn_mask, is_causal)
        if reason is not None:
            self._left_to_torch(reason)
            result: tuple[Tensor, Tensor | None] = super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
            return result
        batched = query.ndim == 3
        q, k, v = self._heads(query, key, value)
        mask, is_causal = self._mask(q, k, key_padding_mask, attn_mask, is_causal)
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            output, weights = _with_probabilities(q, k, v, mask, is_causal, dropout_p)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            output = ops.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)
        # (N, H, L, D) to the layout of the queries
        output = output.transpose(1, 2) if self.batch_first or not batched else output.permute(2, 0, 1, 3)
        output = output.flatten(2)
        return linear(output if batched else output[0], self.out_proj.weight, self.out_proj.bias), weights

    def _refusal(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> str | None:
        """Why torch gets the call; it has the words for arguments that do not fit, too."""
        reason = refusal(
            query, key, value, self.in_proj_weight, self.in_proj_bias, self.out_proj.weight, self.out_proj.bias,
            attn_mask, key_padding_mask,
        )  # fmt: skip
        return (
            reason or self.no_kernel(query) or self._misfit(query, key, value, key_padding_mask, attn_mask, is_causal)
        )

    def no_kernel(self, query: Tensor) -> str | None:
        """Why no kernel serves the head dim for such a query; None: one does, or a backend is forced."""
        if dispatch.forced_backend() is not None:
            return None
        return no_attention(query.device.type, query.dtype, self.head_dim)

    def _misfit(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> str | None:
        if query.ndim not in (2, 3) or key.ndim != query.ndim or value.ndim != query.ndim:
            return "query, key and value must be (L, E) or three-dimensional"
        sizes = (self.embed_dim, self.kdim, self.vdim)
        if (query.shape[-1], key.shape[-1], value.shape[-1]) != sizes or key.shape[:-1] != value.shape[:-1]:
            return f"query, key and value do not fit embed_dim, kdim and vdim {sizes}"
        batch, queries, keys = 1, query.shape[0], key.shape[0]
        if query.ndim == 3:
            batch_dim = 0 if self.batch_first else 1
            batch, queries, keys = query.shape[batch_dim], query.shape[1 - batch_dim], key.shape[1 - batch_dim]
            if key.shape[batch_dim] != batch:
                return "query and key differ in the batch"
        if is_causal and attn_mask is None:
            return "is_causal is a hint about attn_mask, which is missing"
        if key_padding_mask is not None:
            if key_padding_mask.shape != ((batch, keys) if query.ndim == 3 else (keys,)):
                return f"key_padding_mask of shape {tuple(key_padding_mask.shape)} does not fit the keys"
            if key_padding_mask.dtype != torch.bool and not key_padding_mask.is_floating_point():
                return "key_padding_mask must be bool or floating"
        if attn_mask is not None:
            if attn_mask.shape not in ((queries, keys), (batch * self.num_heads, queries, keys)):
                return f"attn_mask of shape {tuple(attn_mask.shape)} does not fit queries and keys"
            if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
                return "attn_mask must be bool or floating"
        return None

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projected queries (N, H, L, D), and keys and values (N, H, S, D) with those that the module adds.

        Views of what was projected together; nothing is copied unless keys are added.
        """
        q, k, v = (self._split(t, query.ndim == 3) for t in self._projected(query, key, value))
        added: list[tuple[Tensor, Tensor]] = []
        shape = (k.shape[0], self.num_heads, 1, self.head_dim)
        if self.bias_k is not None and self.bias_v is not None:
            pair = (b.to(k.dtype).view(1, self.num_heads, 1, self.head_dim) for b in (self.bias_k, self.bias_v))
            bias_k, bias_v = (b.expand(shape) for b in pair)
            added.append((bias_k, bias_v))
        if self.add_zero_attn:
            added.append((k.new_zeros(shape), v.new_zeros(shape)))
        if added:
            k = torch.cat((k, *(pair[0] for pair in added)), 2)
            v = torch.cat((v, *(pair[1] for pair in added)), 2)
        return q, k, v

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """(..., E) each; what is the same tensor is multiplied once."""
        width, bias = self.embed_dim, self.in_proj_bias
        if self.in_proj_weight is None:
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            inputs = (query, key, value)
            return tuple(linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))
        if key is not value:
            parts: tuple[tuple[Tensor, int, int], ...] = ((query, 0, 1), (key, 1, 2), (value, 2, 3))
        elif query is not key:
            parts = ((query, 0, 1), (key, 1, 3))
        else:
            parts = ((query, 0, 3),)
        found: list[Tensor] = []
        for x, first, last in parts:
            whole = first == 0 and last == 3
            weight = self.in_proj_weight if whole else self.in_proj_weight[first * width : last * width]
            part = bias if bias is None or whole else bias[first * width : last * width]
            found += linear(x, weight, part).unflatten(-1, (last - first, width)).unbind(-2)
        return tuple(found)

    def _split(self, tensor: Tensor, batched: bool) -> Tensor:
        """(N, L, E), (L, N, E) or (L, E) as (N, H, L, D)."""
        heads = tensor.unflatten(-1, (self.num_heads, self.head_dim))
        if not batched:
            return heads.transpose(0, 1).unsqueeze(0)
        return heads.transpose(1, 2) if self.batch_first else heads.permute(1, 2, 0, 3)

    def _mask(
        self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None, is_causal: bool
    ) -> tuple[Tensor | None, bool]:
        """The mask as the op takes it, not expanded, and whether causality stands for attn_mask."""
        added = (self.bias_k is not None) + self.add_zero_attn
        # Keys that the module adds are seen by all, which causality would not let them be; nor has it gradients.
        is_causal = is_causal and not added and attn_mask is not None and not attn_mask.requires_grad
        masks: list[Tensor] = []
        if attn_mask is not None and not is_causal:
            batched = attn_mask.ndim == 3
            masks.append(attn_mask.unflatten(0, (q.shape[0], self.num_heads)) if batched else attn_mask[None, None])
        if key_padding_mask is not None:
            masks.append(key_padding_mask.reshape(q.shape[0], 1, 1, -1))
        if added:
            masks = [F.pad(mask, (0, added)) for mask in masks]
        if not masks:
            return None, is_causal
        if all(mask.dtype == torch.bool for mask in masks):
            return ~(masks[0] if len(masks) == 1 else masks[0] | masks[1]), is_causal
        bias = _additive(masks[0], q.dtype)
        return (bias if len(masks) == 1 else bias + _additive(masks[1], q.dtype)), is_causal


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: float32 or of their dtype."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
    return mask if mask.dtype in (torch.float32, dtype) else mask.to(dtype)


def _with_probabilities(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """(output, probabilities (N, H, L, S) as they were multiplied with the values)."""
    scores = q @ k.transpose(-1, -2)
    weights = ops.softmax(scores, -1, scale=1.0 / math.sqrt(q.shape[-1]), mask=mask, is_causal=is_causal)
    if dropout_p > 0.0:
        weights = F.dropout(weights, dropout_p)
    return weights @ v, weights


class MultiheadAttention(MultiheadAttentionForward, nn.MultiheadAttention):
    """torch.nn.MultiheadAttention, argument for argument and parameter for parameter.

    query (N, L, E), key (N, S, kdim), value (N, S, vdim) with batch_first, else (L, N, E) and so on, or without N;
    float32, bfloat16 or float16. Returns the output, of the query's shape, and None or the probabilities.

    * key_padding_mask (N, S) and attn_mask (L, S) or (N * H, L, S): bool (True is masked) or added to the scores. They
      reach the kernel as they are and are expanded only where both are given. What they mask is not computed.
    * is_causal: attn_mask is the causal mask, says the caller, as to torch: it is not looked at.
    * need_weights (the default, as in torch): the caller gets probabilities, so all N H L S of them exist. They are
      fastattn.softmax of the scores, masks included, and the output is their product with the values, dropout in
      between: the matrix products are torch's, and gradients come in through both. need_weights=False is the fused
      kernel, which keeps none of them.
    * A query for which everything is masked has output 0 (before the output projection) and probabilities 0.
    * With add_bias_kv or add_zero_attn every query sees the keys that are added, with is_causal too.

    There is no other path for inference. Dropout masks are philox's (fastattn.philox), where torch draws others. Nested
    tensors, float64, tensor subclasses and arguments that do not fit are torch's, with its errors.
    """
