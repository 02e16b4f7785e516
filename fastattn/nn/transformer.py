"""Transformer layers: attention and feed-forward networks with the norms, dropouts and residuals around them.

A layer adds a branch to its residual and normalises in one kernel, and applies the activation where the product before
it is computed. That takes its parts apart; where a part is more than torch's (hooks on it, another class, another
forward), every part is called as the module that it is.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import ops
from fastattn.nn.activations import GELU, LogSoftmax, SiLU, Softmax
from fastattn.nn.attention import MultiheadAttention, MultiheadAttentionForward
from fastattn.nn.linear import Linear, LinearForward, linear
from fastattn.nn.losses import CrossEntropyLoss
from fastattn.nn.norms import LayerNorm, RMSNorm, add_layer_norm, plain_layer_norm
from fastattn.nn.served import Served, hooked, refusal

# As they are now: layers keep the function that they were made with, and these names may be replaced later.
_RELU, _GELU = F.relu, F.gelu


def _activation_name(activation: Any) -> str | None:
    """As `linear` calls it; None for one that it does not know."""
    if activation is _RELU or activation is torch.relu or type(activation) is nn.ReLU:
        return "relu"
    if activation is _GELU:
        return "gelu"
    if isinstance(activation, nn.GELU) and not hooked(activation):
        return {"none": "gelu", "tanh": "gelu_tanh"}[activation.approximate]
    return None


class _LayerForward(Served):
    """What encoder and decoder layers have in common. _norms, _dropouts: their names, one for each residual."""

    _norms: tuple[str, ...]
    _dropouts: tuple[str, ...]
    linear1: Any
    linear2: Any
    dropout: Any
    activation: Any
    norm_first: bool

    def _part(self, name: str) -> Any:
        return self._modules[name]

    def _taken_apart(self, x: Tensor) -> str | None:
        """None where the layer's parts may be computed together; else why they are called one by one."""
        reason = refusal(x)
        if reason is not None:
            return reason
        for name in (*self._norms, *self._dropouts, "linear1", "linear2", "dropout"):
            part = self._part(name)
            if part is None or hooked(part):
                return f"{name} has hooks or a forward of its own"
            kind = type(part)
            if name in self._norms:
                plain = plain_layer_norm(part)
            elif name.startswith("linear"):
                plain = kind.forward in (nn.Linear.forward, LinearForward.forward)
            else:
                plain = kind is nn.Dropout and not part.inplace
            if not plain:
                return f"{name} is a {kind.__name__}"
            for parameter in (part.weight, part.bias) if name not in self._dropouts and name != "dropout" else ():
                reason = None if parameter is None else refusal(parameter)
                if reason is not None:
                    return f"{name}: {reason}"
        return None

    def _feed_forward(self, x: Tensor) -> Tensor:
        name = _activation_name(self.activation)
        x = linear(x, self.linear1.weight, self.linear1.bias, name)
        if name is None:
            x = self.activation(x)
        if self.dropout.training and self.dropout.p > 0.0:
            x = F.dropout(x, self.dropout.p)
        return linear(x, self.linear2.weight, self.linear2.bias)

    def _add(self, branch: Tensor, x: Tensor, index: int, norm: int | None) -> tuple[Tensor, Tensor]:
        """(norm(s), s) of s = x + dropout(branch); both are s where there is no norm."""
        dropout = self._part(self._dropouts[index])
        p = dropout.p if dropout.training else 0.0
        if norm is None:
            total = x + (F.dropout(branch, p) if p > 0.0 else branch)
            return total, total
        return add_layer_norm(branch, x, self._part(self._norms[norm]), p)

    def _normed(self, x: Tensor, index: int) -> Tensor:
        normed: Tensor = self._part(self._norms[index])(x)
        return normed

    def _through(self, x: Tensor, branches: tuple[Any, ...]) -> Tensor:
        """x after every branch with its residual: before a branch its norm (norm_first), or after it."""
        if not self.norm_first:
            for i, branch in enumerate(branches):
                x = self._add(branch(x), x, i, i)[0]
            return x
        normed = self._normed(x, 0)
        for i, branch in enumerate(branches):
            following = i + 1 if i + 1 < len(branches) else None
            normed, x = self._add(branch(normed), x, i, following)
        return x

    def _one_by_one(self, x: Tensor, branches: tuple[Any, ...]) -> Tensor:
        """The same, every part called as a module. The branches include their dropouts."""
        for i, branch in enumerate(branches):
            if self.norm_first:
                x = x + branch(self._normed(x, i))
            else:
                x = self._normed(x + branch(x), i)
        return x


class TransformerEncoderLayerForward(_LayerForward):
    """torch.nn.TransformerEncoderLayer on our kernels."""

    _norms = ("norm1", "norm2")
    _dropouts = ("dropout1", "dropout2")
    self_attn: Any
    _sa_block: Any
    _ff_block: Any

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """The layer's output, of src's shape. See TransformerEncoderLayer."""
        if src.is_nested:
            return self._nested(src, src_mask, src_key_padding_mask, is_causal)
        reason = self._taken_apart(src)
        if reason is not None:
            self._note(reason)

            def with_dropout(x: Tensor) -> Any:
                return self._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal)

            return self._one_by_one(src, (with_dropout, self._ff_block))

        def attention(x: Tensor) -> Any:
            return self.self_attn(
                x, x, x, attn_mask=src_mask, key_padding_mask=src_key_padding_mask, need_weights=False,
                is_causal=is_causal,
            )[0]  # fmt: skip

        return self._through(src, (attention, self._feed_forward))

    def _nested(self, src: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool) -> Any:
        """A nested tensor, as nn.TransformerEncoder makes of a padded batch for inference: rows that are one sequence
        behind the other, without any padding to compute with."""
        reason = self._not_packed(src, mask, padding)
        if reason is not None:
            self._left_to_torch(reason)
            return super().forward(src, mask, padding, is_causal)
        sizes = src._nested_tensor_size()
        rows = src.values().view(-1, sizes.shape[1] and int(sizes[0, 1]))
        lengths = sizes[:, 0]
        bounds = F.pad(lengths.cumsum(0), (1, 0)).to(rows.device)
        longest = int(lengths.max())

        def attention(x: Tensor) -> Tensor:
            attn = self.self_attn
            heads = (attn.num_heads, attn.head_dim)
            q, k, v = linear(x, attn.in_proj_weight, attn.in_proj_bias).unflatten(-1, (3, *heads)).unbind(-3)
            output = ops.attention_varlen(q, k, v, bounds, bounds, longest, longest)
            return linear(output.flatten(1), attn.out_proj.weight, attn.out_proj.bias)

        result = self._through(rows, (attention, self._feed_forward))
        return torch._nested_view_from_buffer(
            result.reshape(-1), sizes, src._nested_tensor_strides(), src._nested_tensor_storage_offsets()
        )

    def _not_packed(self, src: Tensor, mask: Tensor | None, padding: Tensor | None) -> str | None:
        attn = self.self_attn
        if type(src) is not Tensor or src.layout != torch.strided or not src.is_contiguous():
            return "a nested tensor that is not made of rows"
        if mask is not None or padding is not None:
            return "masks with a nested tensor"
        if not isinstance(attn, MultiheadAttentionForward) or hooked(attn):
            return "self_attn has hooks, or is not fastattn's"
        if (
            attn.in_proj_weight is None
            or attn.bias_k is not None
            or attn.add_zero_attn
            or (attn.training and attn.dropout)
        ):
            return "a nested tensor, and attention with keys of its own, other widths or dropout"
        return self._taken_apart(src.values()) or attn.no_kernel(src)


class TransformerDecoderLayerForward(_LayerForward):
    """torch.nn.TransformerDecoderLayer on our kernels."""

    _norms = ("norm1", "norm2", "norm3")
    _dropouts = ("dropout1", "dropout2", "dropout3")
    self_attn: Any
    multihead_attn: Any
    _sa_block: Any
    _mha_block: Any
    _ff_block: Any

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Any:
        """The layer's output, of tgt's shape. See TransformerDecoderLayer."""
        reason = self._taken_apart(tgt)
        if reason is not None:
            self._note(reason)

            def self_with_dropout(x: Tensor) -> Any:
                return self._sa_block(x, tgt_mask, tgt_key_padding_mask, tgt_is_causal)

            def memory_with_dropout(x: Tensor) -> Any:
                return self._mha_block(x, memory, memory_mask, memory_key_padding_mask, memory_is_causal)

            return self._one_by_one(tgt, (self_with_dropout, memory_with_dropout, self._ff_block))

        def to_itself(x: Tensor) -> Any:
            return self.self_attn(
                x, x, x, attn_mask=tgt_mask, key_padding_mask=tgt_key_padding_mask, need_weights=False,
                is_causal=tgt_is_causal,
            )[0]  # fmt: skip

        def to_memory(x: Tensor) -> Any:
            return self.multihead_attn(
                x, memory, memory, attn_mask=memory_mask, key_padding_mask=memory_key_padding_mask,
                need_weights=False, is_causal=memory_is_causal,
            )[0]  # fmt: skip

        return self._through(tgt, (to_itself, to_memory, self._feed_forward))


#: torch's classes and ours: what `dressed` replaces in a module that is being made.
_OURS: dict[type, type] = {
    nn.Linear: Linear,
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
    nn.MultiheadAttention: MultiheadAttention,
    nn.GELU: GELU,
    nn.SiLU: SiLU,
    nn.Softmax: Softmax,
    nn.LogSoftmax: LogSoftmax,
    nn.CrossEntropyLoss: CrossEntropyLoss,
}


def _dressed(module: nn.Module) -> None:
    """Makes torch's modules in it ours, in place: parameters are drawn in torch's order."""
    for part in module.modules():
        part.__class__ = _OURS.get(type(part), type(part))


class TransformerEncoderLayer(TransformerEncoderLayerForward, nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer, argument for argument and parameter for parameter.

    src (N, L, E) with batch_first, else (L, N, E), or (L, E); float32, bfloat16 or float16. One path for training and
    inference: residual, dropout and norm are one kernel, the activation (relu, gelu) is part of the product before it.

    A nested tensor, as torch.nn.TransformerEncoder makes of a padded batch for inference, is computed as packed rows.
    """

    @functools.wraps(nn.TransformerEncoderLayer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _dressed(self)


class TransformerDecoderLayer(TransformerDecoderLayerForward, nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer, argument for argument and parameter for parameter.

    tgt (N, L, E) and memory (N, S, E) with batch_first, else (L, N, E), (S, N, E), or without N; float32, bfloat16 or
    float16. Residual, dropout and norm are one kernel, the activation (relu, gelu) is part of the product before it.
    """

    @functools.wraps(nn.TransformerDecoderLayer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _dressed(self)


_OURS[nn.TransformerEncoderLayer] = TransformerEncoderLayer
_OURS[nn.TransformerDecoderLayer] = TransformerDecoderLayer


class Transformer(nn.Transformer):
    """torch.nn.Transformer whose layers are fastattn.nn's; a custom_encoder or custom_decoder stays what it is."""

    @functools.wraps(nn.Transformer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        given = inspect.signature(nn.Transformer.__init__).bind(self, *args, **kwargs).arguments
        for name in ("encoder", "decoder"):
            if given.get(f"custom_{name}") is None:
                _dressed(getattr(self, name))
