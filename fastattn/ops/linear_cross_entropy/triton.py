"""linear_cross_entropy on the triton backend: torch's products on a chunk of rows at a time, and one kernel between
them that turns logits into losses and gradients.

Logits are float32, and so are all sums. Gradients of 16-bit problems' logits are rounded to 16 bits for their products;
in float16, whose range is small, they are those of a loss that is neither divided nor scaled, which is done afterwards.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastattn.dispatch import Implementation, takes_dtype
from fastattn.gpu import devices, tuning
from fastattn.gpu.deferred import Deferred
from fastattn.gpu.rows import as_rows
from fastattn.losses import check_targets

KERNELS = Deferred("fastattn.ops.linear_cross_entropy.triton_kernels")
ROWS_AT_LEAST = 128  # of a chunk: fewer are not worth reading the weight for


@functools.cache
def _widening_products() -> bool:
    """Whether torch has products of 16-bit matrices with float32 results: on CUDA."""
    return torch.version.cuda is not None


def _product(result: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """result = a @ b, or += a @ b; result is float32."""
    if a.dtype != torch.float32 and a.is_cuda and _widening_products():
        if add:
            torch.ops.aten.addmm.dtype_out(result, a, b, torch.float32, out=result)
        else:
            torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=result)
    elif add:
        result.addmm_(a.float(), b.float())
    else:
        torch.mm(a.float(), b.float(), out=result)


class _Chunks:
    """A problem in chunks of rows, whose logits take bounded memory."""

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
    ) -> None:
        self.rows, self.inner = input.shape
        self.classes = weight.shape[0]
        self.device = input.device
        on = devices.target_of(self.device)
        if on.interpreted:  # on a GPU kernels stay within memory, and say so under FASTATTN_DEBUG
            check_targets("linear_cross_entropy", target, self.classes, ignore_index)
        self.input, self.weight, self.bias = input, weight.to(input.dtype), bias
        self.probabilities = target.is_floating_point()
        self.target, self.target_stride = as_rows(target) if self.probabilities else (target.contiguous(), 1)
        self.class_weight, self.ignore_index, self.label_smoothing = class_weight, ignore_index, label_smoothing
        limit = tuning.options("linear_cross_entropy", "chunk", on)["ELEMENTS"]
        most = max(limit // max(self.classes, 1), ROWS_AT_LEAST)
        equal = -(-self.rows // max(-(-self.rows // most), 1))
        self.size = min(-(-equal // ROWS_AT_LEAST) * ROWS_AT_LEAST, self.rows)  # whole tiles of the products
        self.kernel, self.together, options = tuning.row_kernel(
            "linear_cross_entropy", "rows", "long", on, self.classes
        )
        self.options = {**options, **devices.assertions(on)}

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def divisor(self) -> Tensor:
        """What the mean divides by."""
        if self.probabilities:
            return torch.full((), float(self.rows), device=self.device)
        counts = self.target != self.ignore_index
        if self.class_weight is None or self.classes == 0:
            return counts.sum().to(torch.float32)
        return self.class_weight[self.target.clamp(0, self.classes - 1)].masked_fill(~counts, 0.0).sum()

    def run(
        self,
        losses: Tensor | None,
        lse: Tensor,
        factor: Tensor,
        wanted: tuple[bool, bool, bool],
        afterwards: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses and lse of all rows, unless losses is None, and the gradients that are wanted, float32.

        lse is not touched, either, if losses is None. factor: of the gradients of logits, one for each row or one for
        all; afterwards: what gradients are multiplied by in the end.
        """
        shapes = ((self.rows, self.inner), (self.classes, self.inner), (self.classes,))
        found = [self.empty(*shape) if w else self.empty(0) for shape, w in zip(shapes, wanted, strict=True)]
        grad_input, grad_weight, grad_bias = found
        if self.rows == 0 or self.classes == 0:
            for tensor in found:
                tensor.zero_()
            if losses is not None:
                losses.zero_()
                lse.fill_(-torch.inf)
            return grad_input, grad_weight, grad_bias
        with devices.on(self.input):
            logits = self.empty(self.size, self.classes)
            narrow = any(wanted) and self.input.dtype != torch.float32
            grads = self.empty(self.size, self.classes, dtype=self.input.dtype) if narrow else logits
            for first in range(0, self.rows, self.size):
                stop = min(first + self.size, self.rows)
                x = self.input[first:stop]
                of_x, of_logits = logits[: stop - first], grads[: stop - first]
                _product(of_x, x, self.weight.t())
                self._losses_and_gradients(first, stop, of_x, of_logits if any(wanted) else None, losses, lse, factor)
                if wanted[0]:
                    _product(grad_input[first:stop], of_logits, self.weight)
                if wanted[1]:
                    _product(grad_weight, of_logits.t(), x, add=first > 0)
                if wanted[2]:
                    sums = of_logits.sum(0, dtype=torch.float32)
                    grad_bias = sums if first == 0 else grad_bias.add_(sums)
            if afterwards is not None:
                for tensor in (grad_input, grad_weight, grad_bias):
                    tensor.mul_(afterwards)
        return grad_input, grad_weight, grad_bias

    def _losses_and_gradients(
        self,
        first: int,
        stop: int,
        logits: Tensor,
        grads: Tensor | None,
        losses: Tensor | None,
        lse: Tensor,
        factor: Tensor,
    ) -> None:
        """Of the rows of a chunk."""
        count, each = stop - first, factor.ndim == 1
        getattr(KERNELS, self.kernel)[(-(-count // self.together),)](
            logits, grads, lse if losses is None else losses[first:stop], lse[first:stop], self.bias,
            self.target[first:stop], self.class_weight, factor[first:stop] if each else factor, self.target_stride,
            count, self.classes, self.ignore_index, self.label_smoothing,
            LOSSES=losses is not None, FACTORS=each, PROBABILITIES=self.probabilities,
            SMOOTH=self.label_smoothing > 0.0, **self.options,
        )  # fmt: skip

    def scaled(self, factor: Tensor) -> tuple[Tensor, Tensor | None]:
        """The factor as `run` takes it: (of gradients of logits, of gradients in the end)."""
        if self.input.dtype != torch.float16:
            return factor, None
        if factor.ndim == 0:
            return torch.ones_like(factor), factor
        if factor.numel() == 0:
            return factor, None
        largest = factor.abs().amax()
        largest = torch.where(largest > 0.0, largest, 1.0)
        return factor / largest, largest


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, lse, gradients of a reduced loss that were asked for)."""
    p = _Chunks(input, weight, bias, target, class_weight, ignore_index, label_smoothing)
    wanted = (input_grad, weight_grad, bias_grad)
    losses, lse = p.empty(p.rows), p.empty(p.rows)
    total = p.divisor() if reduction == 1 else None
    share = torch.ones((), device=p.device) if total is None else total.reciprocal()
    factor, afterwards = p.scaled(share)
    gradients = p.run(losses, lse, factor, wanted, None if total is None else afterwards)
    if reduction == 0:
        return losses, lse, *gradients
    loss = losses.sum()
    return loss if total is None else loss / total, lse, *gradients


def backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    lse: Tensor,
    ahead_input: Tensor,
    ahead_weight: Tensor,
    ahead_bias: Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What was computed ahead, scaled; or everything once more."""
    wanted = (input_grad, weight_grad, bias_grad and bias is not None)
    dtypes = (input.dtype, weight.dtype, input.dtype if bias is None else bias.dtype)
    ahead = (ahead_input, ahead_weight, ahead_bias)
    shapes = (input.shape, weight.shape, weight.shape[:1])
    if reduction != 0 and all(a.shape == s for a, s, w in zip(ahead, shapes, wanted, strict=True) if w):
        found = tuple(
            torch.mul(a, grad, out=torch.empty_like(a, dtype=d)) if w else a.new_empty((0,), dtype=d)
            for a, d, w in zip(ahead, dtypes, wanted, strict=True)
        )
        return found[0], found[1], found[2]
    p = _Chunks(input, weight, bias, target, class_weight, ignore_index, label_smoothing)
    factor, afterwards = p.scaled(grad / p.divisor() if reduction == 1 else grad)
    gradients = p.run(None, lse, factor, wanted, afterwards)
    of_input, of_weight, of_bias = (g.to(d) for g, d in zip(gradients, dtypes, strict=True))
    return of_input, of_weight, of_bias


IMPLEMENTATION = Implementation(takes_dtype, forward, backward)
