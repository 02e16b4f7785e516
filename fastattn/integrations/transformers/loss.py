"""The loss of Transformers' models on fastattn.cross_entropy: what fastattn.patch puts in front of a model's class.

A model asks its property `loss_function` for the loss: what has been set on the model, `_loss_function`, or else
Transformers' function for the kind of model. Here `_loss_function` is a method of the class, and calls Transformers'
function: shifted labels, num_items_in_batch, ignore_index and the dtype are that one's business, whatever the version.
The cross entropy in it is ours.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.modeling_utils import PreTrainedModel

from fastattn import ops
from fastattn.nn.served import Served, refusal


class LossFunction(Served):
    """A model's loss, whose cross entropy is fastattn.cross_entropy."""

    def _loss_function(self, *args: Any, **kwargs: Any) -> Any:
        losses: dict[Any, Any] = LOSS_MAPPING
        loss = losses.get(getattr(self, "loss_type", None), losses["ForCausalLM"])
        with _CrossEntropy(self):
            return loss(*args, **kwargs)


class _CrossEntropy(TorchFunctionMode):
    """Within the block F.cross_entropy is ours, in this thread."""

    def __init__(self, model: LossFunction) -> None:
        super().__init__()
        self.model = model

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Looked up now: within fastattn.accelerate() it is that module's.
        if func is F.cross_entropy:
            return self.cross_entropy(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def cross_entropy(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Any:
        reason = refusal(input, target, weight)
        if size_average is not None or reduce is not None:
            reason = "size_average and reduce are torch's"
        if reason is not None:
            self.model._left_to_torch(reason)
            return F.cross_entropy(
                input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
            )
        return ops.cross_entropy(
            input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )


def asked_for(model: nn.Module) -> bool:
    """Whether the model's forward, its own or an inherited one, uses its loss_function."""
    forwards = (inspect.unwrap(vars(base)["forward"]) for base in type(model).__mro__ if "forward" in vars(base))
    return any("loss_function" in getattr(getattr(f, "__code__", None), "co_names", ()) for f in forwards)


def replaced(model: nn.Module) -> bool:
    """Whether somebody has set another loss, on the model or in its class."""
    cls: Any = type(model)
    return hasattr(model, "_loss_function") or cls.loss_function is not PreTrainedModel.loss_function
