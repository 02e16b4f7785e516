"""SwiGLU's gate: the public function and the op's contract.

swiglu(gate, up) = gate * sigmoid(gate) * up        (Shazeer 2020, equation 5, without the products)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch import Op, Problem, check_size
from fastattn.numerics import FLOATING


@dataclass(frozen=True)
class SwigluProblem(Problem):
    shape: tuple[int, ...]


def _forward_fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _backward_fake(grad_output: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(kernel: Any, ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    return tuple(kernel(grad_output, *ctx.saved_tensors))


OP = Op(
    "swiglu",
    forward_schema="(Tensor gate, Tensor up) -> Tensor",
    backward_schema="(Tensor grad_output, Tensor gate, Tensor up) -> (Tensor grad_gate, Tensor grad_up)",
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def _check(gate: Tensor, up: Tensor) -> None:
    if gate.dtype not in FLOATING:
        raise ValueError(f"swiglu: gate must be float32, bfloat16, float16 or float64, got {gate.dtype}")
    check_size("swiglu", "a gate", gate.shape)
    if (up.shape, up.dtype, up.device) != (gate.shape, gate.dtype, gate.device):
        raise ValueError(
            f"swiglu: up must have the gate's shape {tuple(gate.shape)}, dtype {gate.dtype} and device {gate.device},"
            f" got {tuple(up.shape)}, {up.dtype} on {up.device}"
        )


def _problem(gate: Tensor) -> SwigluProblem:
    return SwigluProblem(gate.device.type, gate.dtype, tuple(gate.shape))


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(gate) * up in one pass, the activation between the products of a SwiGLU feed-forward layer.

    Args:
        gate: any shape, float32, bfloat16, float16 or float64. Halves of one packed tensor (`packed.chunk(2, -1)`) are
            read where they lie.
        up: the gate's shape, dtype and device.
        backend: serve with this backend or raise BackendUnsupported.

    Returns: contiguous, the gate's shape and dtype; float32 inside for 16-bit dtypes.
    Raises: ValueError for shapes, dtypes or devices that do not fit.
    """
    if torch.compiler.is_compiling():
        _check(gate, up)
        return OP.resolve(_problem(gate), backend).public(gate, up)

    def problem() -> SwigluProblem:
        _check(gate, up)
        return _problem(gate)

    signature = (gate.shape, gate.dtype, gate.device, up.shape, up.dtype, up.device)
    return OP.resolve_cached(signature, problem, backend).run(gate, up)


def _prepare(gate: Tensor, up: Tensor, **_: Any) -> tuple[Op, SwigluProblem]:
    _check(gate, up)
    return OP, _problem(gate)


swiglu.prepare = _prepare  # type: ignore[attr-defined]
