"""Activations of input + bias on GPUs: the launches that the triton backends of GELU and SiLU share."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.gpu import devices, tuning
from fastattn.gpu.columns import column_sums, partial_sums
from fastattn.gpu.deferred import Deferred
from fastattn.gpu.rows import as_rows

KERNELS = Deferred("fastattn.gpu.activation_kernels")

#: By number, as device code takes them (activation_kernels.py).
GELU, GELU_TANH, GELU_SIGMOID, SILU = 1, 2, 4, 5


def _matrix(input: Tensor, bias: Tensor | None, *others: Tensor) -> tuple[int, int]:
    """(rows, columns); where no bias tells columns apart and all lies in a row, it is one."""
    elements = input.numel()
    if bias is None and input.is_contiguous() and all(tensor.is_contiguous() for tensor in others):
        return 1, elements
    columns = input.shape[-1] if input.ndim else 1
    return elements // columns, columns


@functools.lru_cache(maxsize=4096)
def chunk_rows(rows: int, columns: int) -> int:
    """Rows that one program adds up for the bias' gradient: by the shape alone, and for about a thousand programs."""
    return max(min(max(rows * columns // 2**19, 16), 128), 4096 // columns)


@dataclass(frozen=True)
class Activation:
    """An activation's triton backend. op: whose tile sizes are looked up; kinds: what device code computes, by the
    number that the op has for its form."""

    op: str
    kinds: tuple[int, ...]

    def _options(self, kernel: str, device: torch.device, rows: int, columns: int) -> tuning.Options:
        kind = "rows" if rows > 1 else "row"
        return tuning.options(self.op, kernel, devices.target_of(device), kind=kind, size=columns)

    def forward(self, input: Tensor, bias: Tensor | None, form: int = 0) -> Tensor:
        output = torch.empty_like(input, memory_format=torch.contiguous_format)
        if output.numel() == 0:
            return output
        rows, columns = _matrix(input, bias)
        x, x_stride = as_rows(input)
        options = self._options("forward", input.device, rows, columns)
        grid = (-(-rows // options["ROWS"]) * -(-columns // options["COLUMNS"]),)
        with devices.on(input):
            KERNELS.forward[grid](output, x, bias, x_stride, rows, columns, ACTIVATION=self.kinds[form], **options)
        return output

    def backward(
        self, grad_output: Tensor, input: Tensor, bias: Tensor | None, bias_grad: bool, form: int = 0
    ) -> tuple[Tensor, Tensor]:
        grad_input = torch.empty_like(input, memory_format=torch.contiguous_format)
        if bias is None:
            grad_bias = torch.empty((0,), dtype=torch.float32, device=input.device)
        else:
            grad_bias = torch.empty_like(bias) if bias_grad else bias.new_empty((0,))
        bias_grad = bias is not None and bias_grad
        if grad_input.numel() == 0:
            return grad_input, grad_bias.zero_()
        rows, columns = _matrix(input, bias, grad_output)
        x, x_stride = as_rows(input)
        grad, grad_stride = as_rows(grad_output)
        options = self._options("backward", input.device, rows, columns)
        chunk = chunk_rows(rows, columns) if bias_grad else options["ROWS"]
        chunks = -(-rows // chunk)
        sums = partial_sums(1, chunks, columns, input.device) if bias_grad else None
        grid = (chunks * -(-columns // options["COLUMNS"]),)
        with devices.on(input):
            KERNELS.backward[grid](
                grad_input, sums, grad, x, bias, grad_stride, x_stride, rows, columns, chunk,
                ACTIVATION=self.kinds[form], **options,
            )  # fmt: skip
        if sums is not None:
            column_sums(self.op, sums, grad_bias)
        return grad_input, grad_bias
