"""Which calls of torch's functions came to our kernels and which were left to torch's own, and why; process-wide."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Counts:
    """served: calls that ours computed, by function. left: (function, reason) of calls that torch computed.

    Counted in eager code: a compiled graph decides once, when it is traced.
    """

    served: Counter[str]
    left: Counter[tuple[str, str]]

    def __str__(self) -> str:
        names = sorted({*self.served, *(name for name, _ in self.left)})
        lines = []
        for name in names:
            reasons = {reason: count for (of, reason), count in self.left.items() if of == name}
            lines.append(f"{name}: {self.served[name]} served, {sum(reasons.values())} left to torch")
            lines += [f"  {count} x {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1])]
        return "\n".join(lines) or "nothing was called"

    def __sub__(self, earlier: Counts) -> Counts:
        return Counts(self.served - earlier.served, self.left - earlier.left)


_served: Counter[str] = Counter()
_left: Counter[tuple[str, str]] = Counter()


def counts() -> Counts:
    """Of this process so far."""
    return Counts(Counter(_served), Counter(_left))


def note_served(function: str) -> None:
    if not torch.compiler.is_compiling():
        _served[function] += 1


def note_left(function: str, reason: str) -> None:
    if not torch.compiler.is_compiling():
        _left[function, reason] += 1


def explained(functions: Iterable[str]) -> list[str]:
    """Lines for explain(): of each function the calls that were left, with their reasons."""
    wanted = set(functions)
    return [f"left to torch: {count} x {name}: {reason}" for (name, reason), count in _left.items() if name in wanted]
