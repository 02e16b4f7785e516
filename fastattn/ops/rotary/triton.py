"""Rotary position embedding on the triton backend."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.dispatch import Implementation, takes_dtype
from fastattn.gpu import devices, tuning
from fastattn.gpu.deferred import Deferred
from fastattn.gpu.tuning import power_of_two
from fastattn.ops.rotary.op import RotaryProblem
from fastattn.ops.rotary.positions import positions

KERNELS = Deferred("fastattn.ops.rotary.triton_kernels")
MOST_ROWS = 2**31 - 2**16


def supports(problem: RotaryProblem) -> str | None:
    reason = takes_dtype(problem)
    if reason is not None:
        return reason
    if problem.shape[-3] * problem.shape[-2] > MOST_ROWS:
        return f"counts a sequence's rows of all heads in 31 bits, got {problem.shape[-3]} * {problem.shape[-2]}"
    return None


def _launch(output: Tensor, x: Tensor, cos: Tensor, sin: Tensor, offsets: Tensor | None, cu_seqlens: Tensor | None,
            offset: int, interleaved: bool, sign: float) -> None:  # fmt: skip
    """Rotates x into output, which may be x itself."""
    target = devices.target_of(x.device)
    if target.interpreted:  # values are looked at, as on the cpu backend; a GPU is not waited for
        positions(x, cos.shape[0], offsets, cu_seqlens, offset)
    if x.numel() == 0:
        return
    shape, strides, to = x.shape, x.stride(), output.stride()
    if cu_seqlens is None:
        batch, length, heads, dim = shape
        sequences = 0
    else:
        batch, (length, heads, dim) = 1, shape
        strides, to, sequences = (0, *strides), (0, *to), cu_seqlens.shape[0] - 1
        cu_seqlens = cu_seqlens.contiguous()
    if offsets is not None:
        offsets = offsets.contiguous() if offsets.numel() else None
    half = cos.shape[1]
    rest = 0 if output is x else dim - 2 * half
    options = tuning.options("rotary", "rotate", target, size=dim)
    blocks = -(-length * heads // options["ROWS"])
    with devices.on(x):
        KERNELS.rotate[(blocks * batch,)](
            output, x, cos, sin, offsets, cu_seqlens, *strides[:3], *to[:3],
            cos.stride(0), sin.stride(0), length, heads, half, dim, cos.shape[0], offset, sequences,
            sequences.bit_length(), blocks, sign, HALF=power_of_two(half), REST=power_of_two(rest) if rest else 0,
            INTERLEAVED=interleaved, **options, **devices.assertions(target),
        )  # fmt: skip


def forward(x: Tensor, cos: Tensor, sin: Tensor, offsets: Tensor | None, cu_seqlens: Tensor | None, offset: int,
            interleaved: bool) -> Tensor:  # fmt: skip
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(output, x, cos, sin, offsets, cu_seqlens, offset, interleaved, 1.0)
    return output


def backward(grad: Tensor, cos: Tensor, sin: Tensor, offsets: Tensor | None, cu_seqlens: Tensor | None, offset: int,
             interleaved: bool) -> Tensor:  # fmt: skip
    """The rotation by the negative angle."""
    output = torch.empty_like(grad, memory_format=torch.contiguous_format)
    _launch(output, grad, cos, sin, offsets, cu_seqlens, offset, interleaved, -1.0)
    return output


def in_place(x: Tensor, cos: Tensor, sin: Tensor, offsets: Tensor | None, cu_seqlens: Tensor | None, offset: int,
             interleaved: bool) -> None:  # fmt: skip
    _launch(x, x, cos, sin, offsets, cu_seqlens, offset, interleaved, 1.0)


IMPLEMENTATION = Implementation(supports, forward, backward)
