"""softmax and log_softmax: public functions and the op's contract.

softmax(x)_i = exp(x_i) / sum_j exp(x_j)        log_softmax(x)_i = x_i - log sum_j exp(x_j)

of x = scale * input + mask, the sum over the columns that a mask or a causal limit leaves visible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch import Op, Problem, autocast_enabled, check_size
from fastattn.numerics import FLOATING, accumulation_dtype

ALIGNMENTS = ("top_left", "bottom_right")
MOST_MASK_DIMS = 16  # csrc/softmax/params.h


@dataclass(frozen=True)
class SoftmaxProblem(Problem):
    shape: tuple[int, ...]
    dim: int
    log: bool
    output_dtype: torch.dtype
    scaled: bool = False
    mask_dtype: torch.dtype | None = None
    causal: str = "none"


def _forward_fake(
    input: Tensor,
    dim: int,
    log: bool,
    dtype: torch.dtype,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: int = 0,
) -> Tensor:
    return input.new_empty(input.shape, dtype=dtype)


def _backward_fake(
    grad_output: Tensor,
    output: Tensor,
    dim: int,
    log: bool,
    dtype: torch.dtype,
    scale: float = 1.0,
    masked: bool = False,
    causal: int = 0,
) -> Tensor:
    return output.new_empty(output.shape, dtype=dtype)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    input, dim, log, _, *features = inputs
    ctx.given = len(inputs)
    ctx.options = dim, log, input.dtype
    scale, mask, causal = features or (1.0, None, 0)
    ctx.features = scale, mask is not None, causal
    ctx.mask = None if mask is None else (mask.shape, mask.dtype)
    ctx.save_for_backward(output)


def _backward(kernel: Any, ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    (output,) = ctx.saved_tensors
    nothing = (None,) * (ctx.given - 1)
    if ctx.features == (1.0, False, 0):
        return kernel(grad_output, output, *ctx.options), *nothing
    if ctx.mask is None or not ctx.needs_input_grad[5]:
        return kernel(grad_output, output, *ctx.options, *ctx.features), *nothing
    # The mask is added to the scaled input: its gradient is the unscaled one, summed where the mask repeats.
    scale, masked, causal = ctx.features
    grad_scores = kernel(grad_output, output, *ctx.options, 1.0, masked, causal)
    shape, dtype = ctx.mask
    grad_mask = grad_scores.to(accumulation_dtype(grad_scores.dtype)).sum_to_size(shape).to(dtype)
    return grad_scores if scale == 1.0 else grad_scores * scale, None, None, None, None, grad_mask, None


OP = Op(
    "softmax",
    forward_schema=(
        "(Tensor input, int dim, bool log, ScalarType dtype, float scale=1.0, Tensor? mask=None, int causal=0)"
        " -> Tensor"
    ),
    backward_schema=(
        "(Tensor grad_output, Tensor output, int dim, bool log, ScalarType dtype, float scale=1.0, bool masked=False,"
        " int causal=0) -> Tensor"
    ),
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def _canonical(name: str, input: Tensor, dim: int | None, dtype: torch.dtype | None) -> tuple[Tensor, int, torch.dtype]:
    """The input in a floating dtype, the dimension counted from the front, the output's dtype."""
    if dim is None:
        raise ValueError(f"{name}: dim must be given")
    limit = max(input.ndim, 1)
    if not -limit <= dim < limit:
        raise ValueError(f"{name}: dim must be in [{-limit}, {limit - 1}] for a {input.ndim}-D input, got {dim}")
    if dtype is not None and dtype not in FLOATING:
        raise ValueError(f"{name}: dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    if dtype is None and autocast_enabled(input.device.type) and input.device.type != "cpu":
        dtype = torch.float32 if input.dtype in (torch.bfloat16, torch.float16) else None  # torch's list for GPUs
    if dtype is not None and input.dtype != dtype:
        widened = dtype == torch.float32 and input.dtype in (torch.bfloat16, torch.float16)
        input = input if widened else input.to(dtype)  # widening is part of the kernel
    if input.dtype not in FLOATING:
        raise ValueError(
            f"{name}: input must be float32, bfloat16, float16 or float64, got {input.dtype}; pass dtype= to convert it"
        )
    return input, dim % limit, dtype or input.dtype


def _check_features(
    name: str, input: Tensor, dim: int, scale: float, mask: Tensor | None, is_causal: bool, alignment: str
) -> None:
    if not -math.inf < scale < math.inf:  # also refuses NaN
        raise ValueError(f"{name}: scale must be finite, got {scale}")
    if alignment not in ALIGNMENTS:
        raise ValueError(f"{name}: causal_alignment must be one of {ALIGNMENTS}, got {alignment!r}")
    if is_causal and (input.ndim < 2 or dim != input.ndim - 1):
        raise ValueError(
            f"{name}: is_causal is over the last two dimensions, and dim must be the last; got dim {dim} of a"
            f" {input.ndim}-D input"
        )
    if mask is None:
        return
    if mask.dtype != torch.bool and mask.dtype not in FLOATING:
        raise ValueError(f"{name}: mask must be bool or floating, got {mask.dtype}")
    if mask.device != input.device:
        raise ValueError(f"{name}: mask is on {mask.device}, input on {input.device}")
    fits = mask.ndim <= input.ndim and all(
        m in (1, n) for m, n in zip(mask.shape, input.shape[input.ndim - mask.ndim :], strict=True)
    )
    if not fits:
        raise ValueError(
            f"{name}: mask must broadcast to the input's shape {tuple(input.shape)}, got {tuple(mask.shape)}"
        )
    if input.ndim > MOST_MASK_DIMS:
        raise ValueError(f"{name}: with a mask the input has at most {MOST_MASK_DIMS} dimensions, got {input.ndim}")


def _canonical_mask(input: Tensor, dim: int, mask: Tensor | None) -> Tensor | None:
    """With the input's dimensions, `dim` last, adjacent elements; bool, of the input's dtype or float32 (float64)."""
    if mask is None:
        return None
    accumulation = accumulation_dtype(input.dtype)
    if mask.dtype not in (torch.bool, input.dtype, accumulation):
        mask = mask.to(accumulation)
    mask = mask[(None,) * (input.ndim - mask.ndim)].movedim(dim, -1)
    return mask if mask.shape[-1] == 1 or mask.stride(-1) == 1 else mask.contiguous()


def _problem(
    input: Tensor,
    dim: int,
    log: bool,
    dtype: torch.dtype,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: str = "none",
) -> SoftmaxProblem:
    check_size("log_softmax" if log else "softmax", "an input", input.shape)
    return SoftmaxProblem(
        input.device.type,
        input.dtype,
        tuple(input.shape),
        dim,
        log,
        dtype,
        scaled=scale != 1.0,
        mask_dtype=None if mask is None else mask.dtype,
        causal=causal,
    )


def _softmax(
    name: str,
    log: bool,
    input: Tensor,
    dim: int | None,
    dtype: torch.dtype | None,
    scale: float,
    mask: Tensor | None,
    is_causal: bool,
    alignment: str,
    backend: str | None,
) -> Tensor:
    if (
        type(input) is Tensor and dtype is None and mask is None and scale == 1.0 and not is_causal and backend is None
        and alignment == "top_left" and input.is_cpu and type(dim) is int and not torch.compiler.is_compiling()
    ):  # fmt: skip
        ndim = input.ndim
        if -ndim <= dim < ndim:
            result = OP.attempt(input, dim % ndim, log, input.dtype)
            if result is not None:
                return result
    x, axis, out = _canonical(name, input, dim, dtype)
    if scale != 1.0 or mask is not None or is_causal or alignment not in ALIGNMENTS:
        return _with_features(name, log, x, axis, out, float(scale), mask, is_causal, alignment, backend)
    if torch.compiler.is_compiling():
        compute = OP.resolve(_problem(x, axis, log, out), backend).public
    else:
        signature = (x.shape, x.dtype, x.device, axis, log, out)
        compute = OP.resolve_cached(signature, lambda: _problem(x, axis, log, out), backend).run
    if x.ndim == 0:
        return compute(x.reshape(1), 0, log, out).reshape(())
    return compute(x, axis, log, out)


def _with_features(
    name: str,
    log: bool,
    x: Tensor,
    axis: int,
    out: torch.dtype,
    scale: float,
    mask: Tensor | None,
    is_causal: bool,
    alignment: str,
    backend: str | None,
) -> Tensor:
    """Rows with a scale, a mask or a causal limit; another dimension than the last is brought there."""
    _check_features(name, x, axis, scale, mask, is_causal, alignment)
    m = _canonical_mask(x, axis, mask)
    causal = alignment if is_causal else "none"
    if torch.compiler.is_compiling():
        compute = OP.resolve(_problem(x, axis, log, out, scale, m, causal), backend).public
    else:
        signature = (
            x.shape, x.dtype, x.device, axis, log, out, scale != 1.0, None if m is None else m.dtype, causal,
        )  # fmt: skip
        compute = OP.resolve_cached(signature, lambda: _problem(x, axis, log, out, scale, m, causal), backend).run
    features = scale, m, 0 if causal == "none" else 1 + ALIGNMENTS.index(causal)
    if x.ndim == 0:
        return compute(x.reshape(1), 0, log, out, scale, None if m is None else m.reshape(1), 0).reshape(())
    if axis == x.ndim - 1:
        return compute(x, axis, log, out, *features)
    return compute(x.movedim(axis, -1), x.ndim - 1, log, out, *features).movedim(-1, axis).contiguous()


def softmax(
    input: Tensor,
    dim: int | None = None,
    dtype: torch.dtype | None = None,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    backend: str | None = None,
) -> Tensor:
    """torch.nn.functional.softmax: exp(x - max) normalised to sum 1 along `dim`; of scale * input + mask if given.

    Args:
        input: any shape and strides, float32, bfloat16, float16 or float64 (other dtypes with dtype=).
        dim: the dimension that sums to 1; negative counts from the end.
        dtype: the input is converted to it first; the result's dtype.
        scale: the input is multiplied by it.
        mask: broadcasts to the input's shape and is not expanded. bool: True is visible, the rest counts as -inf.
            Floating: added to the scaled input, and differentiable (summed where it repeats).
        is_causal: over the last two dimensions (..., rows, columns), with dim the last: row i sees columns up to i
            ("top_left") or up to i + columns - rows ("bottom_right"). What lies beyond is not computed.
        causal_alignment: "top_left" or "bottom_right".
        backend: serve with this backend or raise BackendUnsupported.

    Returns:
        Contiguous, the input's shape. Sums and exponentials are float32 for 16-bit dtypes. A row of -inf is NaN, as
        torch's; with a mask or is_causal, a row that sees nothing is 0, and so is its gradient.

    Raises:
        ValueError: a dim, dtype, scale or mask that does not fit.
    """
    return _softmax("softmax", False, input, dim, dtype, scale, mask, is_causal, causal_alignment, backend)


def log_softmax(
    input: Tensor,
    dim: int | None = None,
    dtype: torch.dtype | None = None,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    backend: str | None = None,
) -> Tensor:
    """torch.nn.functional.log_softmax: x - max - log(sum(exp(x - max))) along `dim`; arguments as for softmax.

    What a mask or a causal limit hides is -inf, with a gradient of 0, and so is a row that sees nothing.
    """
    return _softmax("log_softmax", True, input, dim, dtype, scale, mask, is_causal, causal_alignment, backend)


def _prepare_for(name: str, log: bool) -> Any:
    def prepare(
        input: Tensor,
        dim: int | None = None,
        dtype: torch.dtype | None = None,
        *,
        scale: float = 1.0,
        mask: Tensor | None = None,
        is_causal: bool = False,
        causal_alignment: str = "top_left",
        **_: Any,
    ) -> tuple[Op, SoftmaxProblem]:
        x, axis, out = _canonical(name, input, dim, dtype)
        _check_features(name, x, axis, float(scale), mask, is_causal, causal_alignment)
        m = _canonical_mask(x, axis, mask)
        return OP, _problem(x, axis, log, out, float(scale), m, causal_alignment if is_causal else "none")

    return prepare


softmax.prepare = _prepare_for("softmax", False)  # type: ignore[attr-defined]
log_softmax.prepare = _prepare_for("log_softmax", True)  # type: ignore[attr-defined]
