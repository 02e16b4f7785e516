"""SwiGLU's gate on the triton backend."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.dispatch import Implementation, takes_dtype
from fastattn.gpu import devices, tuning
from fastattn.gpu.deferred import Deferred
from fastattn.gpu.rows import as_rows

KERNELS = Deferred("fastattn.ops.swiglu.triton_kernels")


def _launch(kernel: str, results: tuple[Tensor, ...], tensors: tuple[Tensor, ...]) -> None:
    """One program for every tile of the results, which are contiguous and of one shape."""
    output = results[0]
    if output.numel() == 0:
        return
    columns = output.shape[-1] if output.ndim else 1
    rows = output.numel() // columns
    read = [as_rows(tensor) for tensor in tensors]
    options = tuning.options("swiglu", kernel, devices.target_of(output.device), size=columns)
    grid = -(-rows // options["ROWS"]), -(-columns // options["COLUMNS"])
    with devices.on(output):
        getattr(KERNELS, kernel)[grid](
            *results, *(tensor for tensor, _ in read), *(stride for _, stride in read), rows, columns, **options
        )


def forward(gate: Tensor, up: Tensor) -> Tensor:
    output = torch.empty_like(gate, memory_format=torch.contiguous_format)
    _launch("forward", (output,), (gate, up))
    return output


def backward(grad_output: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    grad_up = torch.empty_like(gate, memory_format=torch.contiguous_format)
    _launch("backward", (grad_gate, grad_up), (grad_output, gate, up))
    return grad_gate, grad_up


IMPLEMENTATION = Implementation(takes_dtype, forward, backward)
