"""GELU and its derivative on the device, as csrc/cpu/activation.h has them. Arithmetic is float32."""

from __future__ import annotations

import triton
import triton.language as tl


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
def gelu(x, TANH: tl.constexpr, FINE: tl.constexpr):
    """x Phi(x); with TANH Phi(x) is sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3), which is (1 + tanh(u)) / 2.

    FINE: good for results of more bits than bfloat16.
    """
    if TANH:
        odds = tl.exp2(x * (x * x * -0.1029432397 - 2.302208198))  # -2 u log2(e)
    else:
        odds = _normal_odds(x, FINE)
    return x / (1.0 + odds)


@triton.jit
def gelu_derivative(x, TANH: tl.constexpr, FINE: tl.constexpr):
    """Phi(x) + x Phi'(x)."""
    square = x * x
    if TANH:
        exponent = x * (square * -0.1029432397 - 2.302208198)
        decay = tl.exp2(-tl.abs(exponent))
        upper = 1.0 / (1.0 + decay)
        lower = decay * upper
        phi = tl.where(x > 0.0, upper, lower)
        # 2 u'; where it would overflow, `lower` is 0 and has the last word
        inner = tl.minimum(square, 1e30) * 0.2140644488 + 1.595769122
        return x * (upper * lower) * inner + phi
    else:
        density = tl.exp2(square * -0.7213475204) * 0.3989422804
        return x * density + 1.0 / (1.0 + _normal_odds(x, FINE))
