"""The accuracy law: how far a result may be from the truth, whatever computes it.

Both sides are measured against fp64. With e = |result - truth| and "torch's" error that of torch's own kernel (or of
the same formula in plain torch where torch has no such kernel) in the same dtype on the same inputs:

    norm error       ||e|| / ||truth||   <= 2 x torch's + one rounding of the result's dtype
    largest element  max e               <= 3 x torch's + one rounding of the largest true element
    over an op's cases, the geometric mean of (norm error / torch's norm error) <= 1.1

A case that needs more says so, and why, beside it (`Case.norm_factor`, `element_factor`, `roundings` in cases.py).
Where the truth is not finite the result must be the same infinity or NaN.
A float64 result has no better truth to be measured against: it must agree with the formula to DOUBLE_AGREEMENT,
relatively or absolutely.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
#: What compiled kernels take.
KERNEL_DTYPES = (torch.float32, *HALVES)
#: What ops take.
FLOATING = (*KERNEL_DTYPES, torch.float64)

NORM_FACTOR = 2.0
ELEMENT_FACTOR = 3.0
ROUNDINGS = 1.0
GEOMETRIC_MEAN = 1.1
DOUBLE_AGREEMENT = 1e-10


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What ops compute in and keep statistics in: float64 for float64 input, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rounding(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number: the largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


@dataclass(frozen=True)
class Error:
    """Distance from the truth: norm = ||e|| / ||truth||, largest = max e, scale = max |truth|."""

    norm: float
    largest: float
    scale: float


def error(result: Tensor, truth: Tensor) -> Error:
    """The error of `result` against the fp64 tensor `truth` of the same shape.

    Elements whose truth is not finite are left out; `same_nonfinite` checks those.
    """
    if result.shape != truth.shape:
        raise ValueError(f"a result of shape {tuple(result.shape)} cannot be compared with {tuple(truth.shape)}")
    finite = torch.isfinite(truth)
    t = truth[finite].double()
    if t.numel() == 0:
        return Error(0.0, 0.0, 0.0)
    e = (result.detach()[finite].double() - t).abs()
    norm, size = e.norm().item(), t.norm().item()
    return Error(norm / size if size > 0 else norm, e.max().item(), t.abs().max().item())


def same_nonfinite(result: Tensor, truth: Tensor) -> bool:
    """Whether the result is NaN and +-inf exactly where the truth is."""
    strange = ~torch.isfinite(truth)
    r, t = result.detach().double(), truth.double()
    return bool(
        torch.equal(torch.isnan(r), torch.isnan(t)) and torch.equal(r[strange & ~t.isnan()], t[strange & ~t.isnan()])
    )


def violation(
    ours: Error,
    torchs: Error,
    dtype: torch.dtype,
    *,
    norm_factor: float = NORM_FACTOR,
    element_factor: float = ELEMENT_FACTOR,
    roundings: float = ROUNDINGS,
) -> str | None:
    """None when the law holds for a result of this dtype, else what breaks it."""
    if dtype == torch.float64:
        agrees = min(ours.norm, ours.largest) <= DOUBLE_AGREEMENT
        return None if agrees else f"differs from the float64 formula by {ours.norm:.3e} > {DOUBLE_AGREEMENT:.0e}"
    norm_bound = norm_factor * torchs.norm + roundings * rounding(dtype)
    if not ours.norm <= norm_bound:  # a NaN error is a violation too
        return f"norm error {ours.norm:.3e} > {norm_bound:.3e} (torch's: {torchs.norm:.3e})"
    element_bound = element_factor * torchs.largest + roundings * rounding(dtype) * torchs.scale
    if not ours.largest <= element_bound:
        return f"largest element error {ours.largest:.3e} > {element_bound:.3e} (torch's: {torchs.largest:.3e})"
    return None


def geometric_mean(pairs: Iterable[tuple[Error, Error]], dtype: torch.dtype) -> float:
    """Geometric mean of our norm error over torch's; 1.0 for no pairs.

    Errors below a hundredth of a rounding count as that much, so that exact results do not decide; nor do those
    where torch's result is infinite or NaN and should not be.
    """
    floor = rounding(dtype) / 100
    logs = [
        math.log(max(ours.norm, floor) / max(torchs.norm, floor))
        for ours, torchs in pairs
        if math.isfinite(torchs.norm)
    ]
    return math.exp(sum(logs) / len(logs)) if logs else 1.0
