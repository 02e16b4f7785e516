"""Device code of SwiGLU's gate: one program for a tile of rows and columns."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(row, column, whether there is such an element) of this program's tile."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < rows) & (column < columns)


@triton.jit
def forward(
    output_ptr, gate_ptr, up_ptr, gate_stride, up_stride, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row, column, inside = _tile(rows, columns, ROWS, COLUMNS)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(output_ptr + row * columns + column, gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit
def backward(
    grad_gate_ptr, grad_up_ptr, grad_ptr, gate_ptr, up_ptr, grad_stride, gate_stride, up_stride, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """With s = sigmoid(g): d(g s u) = u s (1 + g (1 - s)) dg + g s du."""
    row, column, inside = _tile(rows, columns, ROWS, COLUMNS)
    grad = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    tl.store(grad_gate_ptr + row * columns + column, grad * up * s * (1.0 + gate * (1.0 - s)), mask=inside)
    tl.store(grad_up_ptr + row * columns + column, grad * gate * s, mask=inside)
