"""One optimizer step. It needs torch alone: benchmarks run it where nothing can be installed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastattn.models.gpt import GPT
from fastattn.train.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); biases and LayerNorm weights do not decay, matrices do."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def training_step(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[tuple[Tensor, Tensor]],
    lr: float,
    config: TrainConfig,
) -> tuple[float, float]:
    """One optimizer step over the batches, whose gradients are averaged.

    Returns the mean loss in nats per token and the gradient norm before clipping.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    total = 0.0
    for inputs, targets in batches:
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=config.dtype == "bf16"):
            _, loss = model(inputs, targets)
        assert loss is not None
        (loss / len(batches)).backward()
        total += loss.item()
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total / len(batches), norm.item()
