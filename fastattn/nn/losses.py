"""Cross entropy."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastattn import ops
from fastattn.nn.served import Served, refusal


class CrossEntropyLossForward(Served):
    """torch.nn.CrossEntropyLoss on fastattn.cross_entropy."""

    weight: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float

    def forward(self, input: Tensor, target: Tensor) -> Any:
        weight = self.weight
        reason = refusal(input, target, weight)
        if reason is not None:
            self._left_to_torch(reason)
            return super().forward(input, target)
        return ops.cross_entropy(
            input, target, weight, ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )  # fmt: skip


class CrossEntropyLoss(CrossEntropyLossForward, nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss: logits (C,), (N, C) or (N, C, d1, ...) of float32, bfloat16 or float16; targets are
    class numbers or probabilities. Computed and reduced in float32. Other tensors are torch's.

    A class number that is none and not ignore_index is a RuntimeError.
    """
