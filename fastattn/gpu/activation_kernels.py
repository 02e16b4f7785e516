"""Device code of activations: the functions and their derivatives, as csrc/cpu/activation.h has them, in float32; and
the kernels of an activation of input + bias, one program for a tile of rows and columns, backwards for a chunk of rows.

ACTIVATION: 0 nothing, 1 GELU, 2 GELU by tanh, 3 ReLU, 4 GELU by a sigmoid, 5 SiLU. FINE: good for results of more bits
than bfloat16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.gpu.column_kernels import block_and_columns, leave_sums
from fastattn.gpu.functions import exp


@triton.jit
def _normal_odds(x, FINE: tl.constexpr):
    """(1 - Phi(x)) / Phi(x), Phi the distribution function of the standard normal, as 2^(-x R(x^2)).

    R is fitted so that x Phi(x) has an error below 5e-8 |x|, and for x < 0 a relative one below 2.5e-4 down to
    x = -5.5; not FINE: below 2.4e-4 |x| and 2.4e-3. Beyond, R is too large, and Phi falls to 0 early.
    """
    if FINE:
        square = tl.minimum(x * x, 1000.0)
        r = square * 1.306519922e-13 - 1.439538297e-11
        r = r * square + 5.550799433e-10
        r = r * square - 4.807671991e-9
        r = r * square - 2.938148317e-7
        r = r * square + 1.105350471e-5
        r = r * square - 1.588255018e-4
        r = r * square - 9.450491203e-5
        r = r * square + 0.1048350831
        r = r * square + 2.302209277
    else:
        square = tl.minimum(x * x, 1000.0)
        r = square * 6.143198171e-8 + 8.542490468e-6
        r = r * square - 1.315595995e-3
        r = r * square + 0.1084548702
        r = r * square + 2.299726829
    return tl.exp2(-x * r)


@triton.jit
def _gelu(x, TANH: tl.constexpr, FINE: tl.constexpr):
    """x Phi(x); with TANH Phi(x) is sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3), which is (1 + tanh(u)) / 2."""
    if TANH:
        odds = tl.exp2(x * (x * x * -0.1029432397 - 2.302208198))  # -2 u log2(e)
    else:
        odds = _normal_odds(x, FINE)
    return x / (1.0 + odds)


@triton.jit
def _sigmoid(x, decay):
    """(sigmoid(x), sigmoid(x) sigmoid(-x) without cancellation), given e^-|x|."""
    upper = 1.0 / (1.0 + decay)
    lower = decay * upper
    return tl.where(x > 0.0, upper, lower), upper * lower


@triton.jit
def _gelu_derivative(x, TANH: tl.constexpr, FINE: tl.constexpr):
    """Phi(x) + x Phi'(x)."""
    square = x * x
    if TANH:
        exponent = x * (square * -0.1029432397 - 2.302208198)
        phi, slope = _sigmoid(x, tl.exp2(-tl.abs(exponent)))
        # 2 u'; where it would overflow, `slope` is 0 and has the last word
        inner = tl.minimum(square, 1e30) * 0.2140644488 + 1.595769122
        return x * slope * inner + phi
    else:
        density = tl.exp2(square * -0.7213475204) * 0.3989422804
        return x * density + 1.0 / (1.0 + _normal_odds(x, FINE))


@triton.jit
def _decay(x, FINE: tl.constexpr):
    """e^-|x|."""
    if FINE:
        return exp(-tl.abs(x))
    else:
        return tl.exp2(tl.abs(x) * -1.4426950409)


@triton.jit
def _swish(x, BETA: tl.constexpr, FINE: tl.constexpr):
    """x sigmoid(beta x): SiLU with 1, GELU by a sigmoid with 1.702."""
    phi, _ = _sigmoid(x, _decay(x * BETA, FINE))
    return x * phi


@triton.jit
def _swish_derivative(x, BETA: tl.constexpr, FINE: tl.constexpr):
    phi, slope = _sigmoid(x, _decay(x * BETA, FINE))
    return x * (slope * BETA) + phi  # beta x may be infinite where x is not


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, FINE: tl.constexpr):
    """The activation."""
    if ACTIVATION == 1 or ACTIVATION == 2:
        x = _gelu(x, ACTIVATION == 2, FINE)
    if ACTIVATION == 3:
        x = tl.where(x < 0.0, 0.0, x)  # NaN stays
    if ACTIVATION == 4:
        x = _swish(x, 1.702, FINE)
    if ACTIVATION == 5:
        x = _swish(x, 1.0, FINE)
    return x


@triton.jit
def through_activation(grad, x, ACTIVATION: tl.constexpr, FINE: tl.constexpr):
    """A gradient before an activation of x, given the one after it. ReLU's x may be its output."""
    if ACTIVATION == 1 or ACTIVATION == 2:
        grad *= _gelu_derivative(x, ACTIVATION == 2, FINE)
    if ACTIVATION == 3:
        grad = tl.where(x <= 0.0, 0.0, grad)
    if ACTIVATION == 4:
        grad *= _swish_derivative(x, 1.702, FINE)
    if ACTIVATION == 5:
        grad *= _swish_derivative(x, 1.0, FINE)
    return grad


@triton.jit
def _sum(x_ptr, row, column, x_stride, bias, inside):
    return tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32) + bias


@triton.jit
def _bias(bias_ptr, column, columns):
    if bias_ptr is not None:
        return tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    else:
        return 0.0


@triton.jit
def forward(
    output_ptr, x_ptr, bias_ptr, x_stride, rows, columns,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    block, column = block_and_columns(columns, COLUMNS)
    row = block * ROWS + tl.arange(0, ROWS)[:, None]
    inside = (row < rows) & (column < columns)
    x = _sum(x_ptr, row, column, x_stride, _bias(bias_ptr, column, columns), inside)
    y = activate(x, ACTIVATION, output_ptr.dtype.element_ty != tl.bfloat16)
    tl.store(output_ptr + row * columns + column, y, mask=inside)


@triton.jit
def backward(
    grad_input_ptr, sums_ptr, grad_ptr, x_ptr, bias_ptr, grad_stride, x_stride, rows, columns, chunk_rows,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """sums_ptr: (chunks, columns) for the bias' gradient, or None."""
    chunk, column = block_and_columns(columns, COLUMNS)
    end = tl.minimum((chunk + 1) * chunk_rows, rows)
    bias = _bias(bias_ptr, column, columns)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(0, chunk_rows, ROWS):
        row = chunk * chunk_rows + step + tl.arange(0, ROWS)[:, None]
        inside = (row < end) & (column < columns)
        grad = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
        x = _sum(x_ptr, row, column, x_stride, bias, inside)
        grad = through_activation(grad, x, ACTIVATION, grad_input_ptr.dtype.element_ty != tl.bfloat16)
        tl.store(grad_input_ptr + row * columns + column, grad, mask=inside)
        if sums_ptr is not None:
            sums += tl.where(inside, grad, 0.0)
    leave_sums(sums_ptr, sums, chunk, column, columns)
