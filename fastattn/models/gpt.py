"""A GPT to read in one sitting: pre-LN blocks, learned positions, tied embeddings, GPT-2's initialisation.

Attention, LayerNorm, projections and cross entropy come from one namespace, chosen by ``GPTConfig.kernels``:
fastattn's own ops or ``torch.nn.functional``. Both have the same names and signatures, so the model is
written once and the two can be compared weight for weight.

Shape letters: B batch, S sequence (query positions), K key positions, H heads, D head dim, C = H * D model
width, V vocabulary.

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2); Xiong et al.
2020, "On Layer Normalization in the Transformer Architecture" (pre-LN); Press & Wolf 2017, "Using the Output
Embedding to Improve Language Models" (weight tying).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import ops
from fastattn.flash_attn import flash_attn_with_kvcache

KERNELS: dict[str, Any] = {"fastattn": ops, "torch": F}


@dataclass(frozen=True)
class GPTConfig:
    """What a GPT is made of.

    Raises:
        ValueError: a size is not a positive integer, ``n_embd`` is not a multiple of ``n_head``,
            ``dropout`` is outside [0, 1), or ``kernels`` is unknown.
    """

    vocab_size: int
    block_size: int = 256
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 256
    dropout: float = 0.0
    bias: bool = True
    kernels: str = "fastattn"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head, got n_embd={self.n_embd}, n_head={self.n_head}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.kernels not in KERNELS:
            raise ValueError(f"kernels must be one of {sorted(KERNELS)}, got {self.kernels!r}")


class KVCache:
    """The keys and values of every layer, so that generation computes each position once.

    Preallocated for ``config.block_size`` positions, laid out (layer, key/value, B, H, K, D) so that one
    head's keys lie together. ``length`` is the number of positions held; ``GPT.forward`` advances it.
    """

    def __init__(self, config: GPTConfig, batch_size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        head_dim = config.n_embd // config.n_head
        shape = (config.n_layer, 2, batch_size, config.n_head, config.block_size, head_dim)
        self.storage = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, H, S, D) keys and values after those held; return views of all, (B, H, K, D)."""
        end = self.length + key.shape[-2]
        keys, values = self.storage[layer]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def slots(self, layer: int) -> tuple[Tensor, Tensor]:
        """The layer's whole caches for keys and values, seen as (B, K, H, D)."""
        keys, values = self.storage[layer]
        return keys.transpose(1, 2), values.transpose(1, 2)


class LayerNorm(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.kernels = config.kernels
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None

    def forward(self, x: Tensor) -> Tensor:
        return KERNELS[self.kernels].layer_norm(x, self.weight.shape, self.weight, self.bias)


class Linear(nn.Linear):
    """A projection with the GELU that may follow it: one kernel of ours, two of torch's."""

    def __init__(self, config: GPTConfig, inputs: int, outputs: int, *, gelu: bool = False) -> None:
        super().__init__(inputs, outputs, bias=config.bias)
        self.kernels = config.kernels
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        if self.kernels == "fastattn":
            return ops.linear(x, self.weight, self.bias, "gelu_tanh" if self.gelu else None)
        y = F.linear(x, self.weight, self.bias)
        return F.gelu(y, approximate="tanh") if self.gelu else y


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.kernels = config.kernels
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.qkv = Linear(config, config.n_embd, 3 * config.n_embd)
        self.projection = Linear(config, config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        B, S, C = x.shape
        # Three views of one (B, S, 3, H, D) tensor: the kernels read them through their strides, nothing is
        # copied.
        query, key, value = self.qkv(x).view(B, S, 3, self.n_head, C // self.n_head).unbind(2)
        past = cache.length if cache is not None else 0
        if cache is not None and past and self.kernels == "fastattn" and not self.training:
            query, key, value = (t.to(cache.storage.dtype) for t in (query, key, value))
            y = flash_attn_with_kvcache(query, *cache.slots(self.layer), key, value, cache_seqlens=past, causal=True)
            return self.projection(y.view(B, S, C))
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        if cache is not None:
            key, value = cache.append(self.layer, key, value)
        # The last query is aligned with the last key. Without a past that is plain causal attention; a single
        # query sees every key; several queries after a past need the mask spelled out.
        mask = None
        if past and S > 1:
            mask = torch.ones(S, past + S, dtype=torch.bool, device=x.device).tril(past)
        y = KERNELS[self.kernels].scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=past == 0 and S > 1,
        )
        return self.projection(y.transpose(1, 2).reshape(B, S, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.expansion = Linear(config, config.n_embd, 4 * config.n_embd, gelu=True)
        self.projection = Linear(config, 4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.expansion(x))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config)
        self.attention = CausalSelfAttention(config, layer)
        self.mlp_norm = LayerNorm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPT(nn.Module):
    """Token ids in, next-token logits or the loss out."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = LayerNorm(config)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        # GPT-2: N(0, 0.02), and 1/sqrt(number of residual additions) of that where a branch joins the
        # residual stream, so that the stream's variance does not grow with depth.
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=residual_std if name.endswith("projection") else 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def num_parameters(self) -> int:
        """The number of weights; the tied output matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits for the token after each position or, with targets, the mean cross entropy in nats.

        Args:
            idx: (B, S) int64 token ids.
            targets: (B, S) int64 ids of the tokens that follow; -100 is ignored.
            cache: keys and values of the positions before ``idx``; those of ``idx`` are appended.

        Returns:
            logits (B, S, V) in the compute dtype and None, or None and the loss, a float32 scalar.

        Raises:
            ValueError: the positions (cached and new) exceed ``block_size``, or there are none.
        """
        S = idx.shape[1]
        past = cache.length if cache is not None else 0
        if not 1 <= S <= self.config.block_size - past:
            raise ValueError(
                f"the sequence must have 1 to {self.config.block_size - past} tokens "
                f"(block_size {self.config.block_size}, {past} cached), got {S}"
            )
        x = self.token_embedding(idx) + self.position_embedding.weight[past : past + S]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, cache)
        if cache is not None:
            cache.length += S
        x, embedding = self.norm(x), self.token_embedding.weight
        if targets is None:
            return KERNELS[self.config.kernels].linear(x, embedding), None
        x, targets = x.flatten(0, 1), targets.flatten()
        if self.config.kernels == "fastattn":  # the logits, the largest tensor by far, are never all in memory
            return None, ops.linear_cross_entropy(x, embedding, targets).float()
        # In float32: a loss rounded to bfloat16 has three digits.
        return None, F.cross_entropy(F.linear(x, embedding).float(), targets)
