"""A workload made concrete: its tensors, the calls that are timed, and what the results must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.bench.contenders import Contender
from fastattn.cases import Arguments, Sampler, Suite, Workload

Results = dict[str, Tensor]

FORWARD, BOTH = "forward", "forward+backward"
DIRECTIONS = (FORWARD, BOTH)


class Trial:
    """One workload in one dtype: the same normally distributed inputs and output gradients for every contender."""

    def __init__(
        self, suite: Suite, workload: Workload, dtype: torch.dtype, device: str = "cpu", there: bool = False
    ) -> None:
        """there: tensors are drawn on the device (fastattn.cases.Sampler)."""
        self.suite, self.workload, self.dtype = suite, workload, dtype
        self.arguments = (
            workload.build(Sampler(f"{suite.name}/{workload.name}", device, dtype, there))
            if there
            else suite.arguments(workload, device, dtype)
        )
        self.differentiated = suite.differentiated(workload, self.arguments)
        with torch.no_grad():
            outputs = self._named(suite.peer(**self.arguments))
        sampler = Sampler(f"{suite.name}/{workload.name}/gradients", device, there=there)
        self.grad_outputs = {name: sampler.normal(*t.shape, dtype=t.dtype) for name, t in outputs.items()}

    def _named(self, outputs: Any) -> Results:
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        return dict(zip(self.suite.results, outputs, strict=False))

    def call(self, contender: Contender, direction: str) -> Callable[[], Results]:
        """What is timed: the forward pass without a graph, or the forward pass and its gradients."""
        if direction == FORWARD:
            arguments = contender.adapt(self.arguments)
            return lambda: self._forward(contender.function, arguments)
        leaves = {name: self.arguments[name].detach().requires_grad_() for name in self.differentiated}
        arguments = contender.adapt({**self.arguments, **leaves})
        return lambda: self._both(contender.function, arguments, leaves, self.grad_outputs)

    def _forward(self, function: Callable[..., Any], arguments: Arguments) -> Results:
        with torch.no_grad():
            return self._named(function(**arguments))

    def _both(
        self, function: Callable[..., Any], arguments: Arguments, leaves: Results, grad_outputs: Results
    ) -> Results:
        outputs = self._named(function(**arguments))
        if not leaves:
            return outputs
        grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), list(grad_outputs.values()))
        return {**outputs, **{f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}}

    def truth(self) -> tuple[Results, Callable[[Results], Results] | None]:
        """The true outputs and gradients in float64; and, when they are of some heads only, what picks those."""
        attention = self.suite.name == "attention"
        part = _some_heads(self.arguments) if attention else None
        # In float64 torch's own attention is as exact as the definition, and needs no S x S matrix.
        exact = self.suite.peer if attention else self.suite.truth
        arguments = self.arguments if part is None else part.arguments(self.arguments)
        gradients = self.grad_outputs if part is None else part.results(self.grad_outputs)
        wide = {name: _double(argument) for name, argument in arguments.items()}
        leaves = {name: wide[name].detach().requires_grad_() for name in self.differentiated}
        wide_gradients = {name: gradient.double() for name, gradient in gradients.items()}
        results = self._both(exact, {**wide, **leaves}, leaves, wide_gradients)
        return {name: t.detach() for name, t in results.items()}, None if part is None else part.results


def _double(argument: Any) -> Any:
    return argument.double() if isinstance(argument, Tensor) and argument.is_floating_point() else argument


#: Floating-point operations spent on the truth of an attention workload, about a second of float64 products.
TRUTH_FLOPS = 6e10


class _Heads:
    """Some heads of an attention problem, each a problem of its own: evenly spaced, first and last included."""

    def __init__(self, batch: Tensor, kv_heads: Tensor, groups: int) -> None:
        self.batch, self.kv_heads = batch, kv_heads
        self.heads = (kv_heads[:, None] * groups + torch.arange(groups, device=kv_heads.device)).reshape(-1)

    def _pick(self, tensor: Tensor, heads: Tensor) -> Tensor:
        return tensor.index_select(0, self.batch).index_select(1, heads)

    def arguments(self, arguments: Arguments) -> Arguments:
        picked = dict(arguments)
        picked["query"] = self._pick(arguments["query"], self.heads)
        for name in ("key", "value"):
            picked[name] = self._pick(arguments[name], self.kv_heads)
        mask = arguments.get("attn_mask")
        if mask is not None:
            assert mask.ndim == 4 and mask.shape[1] == 1, "workloads have masks that all heads share"
            picked["attn_mask"] = mask if mask.shape[0] == 1 else mask.index_select(0, self.batch)
        return picked

    def results(self, results: Results) -> Results:
        shared = ("grad_key", "grad_value")
        return {name: self._pick(t, self.kv_heads if name in shared else self.heads) for name, t in results.items()}


def _some_heads(arguments: Arguments) -> _Heads | None:
    """None when all heads are few enough."""
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    batch, heads, queries, dim = query.shape
    kv_heads, groups = key.shape[1], heads // key.shape[1]
    each = 2 * queries * key.shape[2] * (4 * dim + 3 * value.shape[3]) * groups
    affordable = max(int(TRUTH_FLOPS / each), 2)
    if affordable >= batch * kv_heads:
        return None
    of_batch = min(batch, max(affordable // kv_heads, 2 if affordable >= 4 else 1))
    of_heads = max(affordable // of_batch, 1)
    return _Heads(_spread(batch, of_batch, query.device), _spread(kv_heads, of_heads, query.device), groups)


def _spread(count: int, wanted: int, device: torch.device) -> Tensor:
    return torch.linspace(0, count - 1, min(wanted, count)).round().long().to(device)
