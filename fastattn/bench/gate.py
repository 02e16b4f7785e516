"""Right first, then fast: no time is taken of a result that breaks the accuracy law."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fastattn import numerics
from fastattn.bench.contenders import OURS, TORCH
from fastattn.bench.trial import Results
from fastattn.numerics import Error


@dataclass(frozen=True)
class Verdict:
    """errors: of every contender, by result, against float64. violations: of the law, ours; empty when it holds."""

    errors: dict[str, dict[str, Error]]
    violations: tuple[str, ...]


def verdict(
    results: Mapping[str, Results], truth: Results, part: Callable[[Results], Results] | None, dtype: torch.dtype
) -> Verdict:
    """Of the contenders' results, ours and torch's among them.

    part: takes out of results what there is a truth of; None when that is all.
    """
    parts = {name: result if part is None else part(result) for name, result in results.items()}
    errors = {name: errors_of(result, truth) for name, result in parts.items()}
    violations = judge(parts[OURS], parts[TORCH], truth, dtype)
    if not violations and part is not None:
        violations = disagreement(results[OURS], results[TORCH], errors[OURS], errors[TORCH])
    return Verdict(errors, tuple(violations))


def judge(ours: Results, torchs: Results, truth: Results, dtype: torch.dtype) -> list[str]:
    """How our results break the law of fastattn.numerics, given torch's; [] when they do not."""
    found = []
    for name, true in truth.items():
        if name not in ours:
            found.append(f"{name}: missing")
            continue
        result = ours[name]
        if result.shape != true.shape:
            found.append(f"{name}: shape {tuple(result.shape)} instead of {tuple(true.shape)}")
            continue
        if not numerics.same_nonfinite(result, true):
            found.append(f"{name}: infinite or NaN elsewhere than the truth")
            continue
        broken = numerics.violation(numerics.error(result, true), numerics.error(torchs[name], true), dtype)
        if broken is not None:
            found.append(f"{name}: {broken}")
    return found


def disagreement(ours: Results, torchs: Results, errors: dict[str, Error], torch_errors: dict[str, Error]) -> list[str]:
    """Where the truth was taken of a part only: our whole result must be as near to torch's as both errors allow.

    The norm of the difference is at most the sum of both norms of error; twice that is left for the parts unseen.
    """
    found = []
    for name, result in ours.items():
        if name not in errors:
            continue
        apart = numerics.error(result, torchs[name].double()).norm
        bound = 2 * (errors[name].norm + torch_errors[name].norm) + numerics.rounding(result.dtype)
        if not apart <= bound:
            found.append(f"{name}: {apart:.3e} away from torch's, more than {bound:.3e}")
    return found


def errors_of(results: Results, truth: Results) -> dict[str, Error]:
    """The error of every result that has a truth and its shape."""
    return {
        name: numerics.error(results[name], true)
        for name, true in truth.items()
        if name in results and results[name].shape == true.shape
    }
