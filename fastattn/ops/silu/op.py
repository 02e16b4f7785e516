"""SiLU of input + bias: the public function and the op's contract.

SiLU(x) = x sigmoid(x)        (Hendrycks and Gimpel 2016, section 2; Elfwing, Uchibe and Doya 2018; Swish with beta 1)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastattn.activations import ActivationProblem, activation_op, check, compute, facts
from fastattn.dispatch import Op

OP = activation_op("silu")


def _problem(input: Tensor, bias: Tensor | None) -> ActivationProblem:
    check("silu", input, bias)
    return ActivationProblem(**facts(input, bias))


def silu(input: Tensor, *, bias: Tensor | None = None, backend: str | None = None) -> Tensor:
    """torch.nn.functional.silu, optionally of input + bias in one pass.

    Args:
        input: any shape and strides, float32, bfloat16, float16 or float64.
        bias: (columns,), added along the last dimension before the activation, any floating dtype. The sum is float32
            (float64 for float64) and is not rounded in between.
        backend: serve with this backend or raise BackendUnsupported.

    Returns: contiguous, the input's shape and dtype. The bias' gradient is accumulated in float32.
    Raises: ValueError for shapes, dtypes or devices that do not fit.
    """
    return compute(OP, lambda: _problem(input, bias), input, bias, backend)


def _prepare(input: Tensor, *, bias: Tensor | None = None, **_: Any) -> tuple[Op, ActivationProblem]:
    return OP, _problem(input, bias)


silu.prepare = _prepare  # type: ignore[attr-defined]
