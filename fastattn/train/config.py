"""What a training run is: every number that decides its result, and the learning-rate schedule."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

DTYPES = ("fp32", "bf16")
KERNELS = ("fastattn", "torch")

# Changing one of these on resume leaves every weight of the run as it would have been.
FREE_ON_RESUME = frozenset({"eval_interval", "checkpoint_interval", "log_interval"})


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run; together with the corpus they determine it bit for bit on one machine.

    ``vocab_size`` is what the BPE aims for (a small corpus may give fewer tokens), ``block_size`` the context
    in tokens, ``batch_size`` the sequences of one forward pass, ``grad_accum`` the passes of one step.
    Intervals are in steps.

    Raises:
        ValueError: a value is outside its range; the message names the field, the value and the range.
    """

    vocab_size: int = 1024
    block_size: int = 256
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 256
    dropout: float = 0.1
    bias: bool = True
    kernels: str = "fastattn"
    steps: int = 1000
    batch_size: int = 8
    grad_accum: int = 1
    lr: float = 1e-3
    min_lr: float = 1e-4
    warmup: int = 50
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    grad_clip: float = 1.0
    dtype: str = "fp32"
    seed: int = 1337
    eval_interval: int = 100
    checkpoint_interval: int = 100
    log_interval: int = 1

    def __post_init__(self) -> None:
        at_least = {
            **dict.fromkeys(("block_size", "n_layer", "n_head", "n_embd", "steps", "batch_size", "grad_accum"), 1),
            **dict.fromkeys(("eval_interval", "checkpoint_interval", "log_interval"), 1),
            "vocab_size": 256,  # a byte-level BPE starts from the 256 bytes
            "warmup": 0,
            "seed": 0,
        }
        for name, low in at_least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, got {self.seed}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head, got n_embd={self.n_embd}, n_head={self.n_head}")
        for name in ("dropout", "beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("lr", "grad_clip"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0 and finite, got {self.weight_decay}")
        if not 0.0 <= self.min_lr <= self.lr:
            raise ValueError(f"min_lr must be between 0 and lr ({self.lr}), got {self.min_lr}")
        for name, allowed in (("dtype", DTYPES), ("kernels", KERNELS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    def learning_rate(self, step: int) -> float:
        """The rate of step 0 .. steps-1: linear from lr/warmup up to lr, then half a cosine down to min_lr.

        The warm-up takes at most the whole run. The last step runs at min_lr.
        """
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        span = max(1, self.steps - 1 - self.warmup)
        progress = min(1.0, (step - self.warmup) / span)
        return self.min_lr + 0.5 * (1.0 + math.cos(math.pi * progress)) * (self.lr - self.min_lr)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of to_dict.

        Raises:
            ValueError: a field is missing or unknown, or a value is outside its range.
        """
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ValueError(
                f"training settings differ from this version's in {', '.join(sorted(set(values) ^ names))}"
            )
        return cls(**values)

    def differences(self, other: TrainConfig) -> list[str]:
        """``name=mine (not theirs)`` for every field that may not change on resume and does."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [
            f"{name}={mine[name]!r} (not {theirs[name]!r})"
            for name in mine
            if name not in FREE_ON_RESUME and mine[name] != theirs[name]
        ]
