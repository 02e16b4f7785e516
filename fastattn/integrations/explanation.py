"""fastattn.explain(model, *inputs): which kernel served which layer in one call of a model, and why not ours."""

from __future__ import annotations

import contextlib
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn import dispatch
from fastattn.dispatch import Bound, Explanation, observed
from fastattn.integrations.patching import judge
from fastattn.nn.served import Served, listening
from fastattn.ops.linear.op import OP as LINEAR
from fastattn.ops.linear.op import LinearProblem, short

#: torch's kernels that do what an op of ours does.
PEERS = {
    "_scaled_dot_product_flash_attention_for_cpu": "attention",
    "_scaled_dot_product_flash_attention": "attention",
    "_scaled_dot_product_efficient_attention": "attention",
    "_scaled_dot_product_cudnn_attention": "attention",
    "_flash_attention_forward": "attention",
    "_native_multi_head_attention": "attention",
    "_transformer_encoder_layer_fwd": "attention",
    "_safe_softmax": "softmax",
    "_softmax": "softmax",
    "_log_softmax": "softmax",
    "native_layer_norm": "layer_norm",
    "_fused_rms_norm": "rms_norm",
    "gelu": "gelu",
    "silu": "silu",
    "silu_": "silu",
    "addmm": "linear",
    "mm": "linear",
    "linear": "linear",
    "nll_loss_forward": "cross_entropy",
    "nll_loss2d_forward": "cross_entropy",
}


@dataclass(frozen=True)
class LayerCalls:
    """One kernel that ran in one module: how often, and why it was none of ours, "" where it was.

    path: of the module in the model; module: its class; op: the op of ours that there is for it; kernel: a backend of
    ours, or "torch".
    """

    path: str
    module: str
    op: str
    kernel: str
    why: str
    calls: int


@dataclass(frozen=True)
class ModelExplanation:
    """Which kernels one call of a model took, in the order of their first calls. Printed it is a table, in which layers
    that differ in their number only share a line.

    rows: what ran. left: (path, module, reason, calls) of calls that modules of ours left to torch or did part by part.
    """

    rows: tuple[LayerCalls, ...]
    left: tuple[tuple[str, str, str, int], ...]

    @property
    def served(self) -> dict[str, int]:
        """Calls by kernel."""
        counts: Counter[str] = Counter()
        for row in self.rows:
            counts[row.kernel] += row.calls
        return dict(counts)

    def __str__(self) -> str:
        if not self.rows:
            return "nothing ran that fastattn has a kernel for"
        total = sum(self.served.values())
        counts = ", ".join(f"{kernel} {calls}" for kernel, calls in sorted(self.served.items()))
        lines = [f"{total} calls of what fastattn has kernels for: {counts}"]
        groups: dict[tuple[str, ...], int] = {}
        for row in self.rows:
            key = (_numberless(row.path), row.module, row.op, row.kernel, row.why)
            groups[key] = groups.get(key, 0) + row.calls
        for (path, module, op, kernel, why), calls in groups.items():
            tail = f"  {why}" if why else ""
            lines.append(f"  {calls:5} x {op:14} {kernel:10} {path or '(the model)'} [{module}]{tail}")
        told = {(row.path, row.why) for row in self.rows}
        fallen: dict[tuple[str, str, str], int] = {}
        for path, module, reason, calls in self.left:
            if (path, reason) in told:
                continue
            key3 = (_numberless(path), module, reason)
            fallen[key3] = fallen.get(key3, 0) + calls
        for (path, module, reason), calls in fallen.items():
            lines.append(f"  fell back {calls} x: {path or '(the model)'} [{module}]: {reason}")
        return "\n".join(lines)


def _numberless(path: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)


class _Recorder(TorchDispatchMode):
    """Counts kernels by the module that is running."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.running: list[nn.Module] = [model]
        self.counts: Counter[tuple[str, str, str, str, str]] = Counter()
        self.left: Counter[tuple[str, str, str]] = Counter()
        # Why the module that is running left its call to torch.
        self.reasons: dict[int, str] = {}
        self.kernels = self.depth = 0

    def where(self) -> tuple[str, nn.Module]:
        """The innermost running module that is part of the model."""
        for module in reversed(self.running):
            if id(module) in self.paths:
                return self.paths[id(module)], module
        return "", self.running[0]

    def count(self, op: str, kernel: str, why: str) -> None:
        path, module = self.where()
        self.counts[path, type(module).__name__, op, kernel, why] += 1

    # ---- our kernels ----

    @contextlib.contextmanager
    def around(self, bound: Bound, problem: Any) -> Iterator[None]:
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
        self.kernels += 1
        why = ""
        if bound.backend == "reference" and problem is not None:
            wish = bound.op.preference(problem)
            why = str(wish) if wish is not None and wish.backend == "reference" else bound.op.refusals(problem)
            why = "forced" if dispatch.forced_backend() else why
        self.count(bound.op.name, bound.backend, why)

    def heard(self, module: Any, reason: str) -> None:
        self.left[self.paths.get(id(module), ""), type(module).__name__, reason] += 1
        self.reasons[id(module)] = reason

    # ---- torch's ----

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.kernels
        result = func(*args, **(kwargs or {}))
        peer = PEERS.get(func.overloadpacket.__name__) if func.namespace == "aten" else None
        # A kernel of ours may be what is registered under torch's name, or a kernel of ours is made of torch's.
        if peer is not None and self.kernels == before and not self.depth:
            self.count(peer, "torch", self.why_torchs(peer, args))
        return result

    def why_torchs(self, op: str, args: Any) -> str:
        _, module = self.where()
        if isinstance(module, Served):
            reason = self.reasons.get(id(module))
            if reason is not None:
                return reason
            return _why_product(*args[-2:]) if op == "linear" else "its module computes more than this"
        verdict = judge(module)
        if verdict.form is not None:
            return "not patched: fastattn.patch(model)"
        return verdict.why or "called as a function: fastattn.accelerate()"

    # ---- modules ----

    def enter(self, module: nn.Module, args: Any) -> None:
        self.running.append(module)
        self.reasons.pop(id(module), None)

    def leave(self, module: nn.Module, args: Any, result: Any) -> None:
        while self.running.pop() is not module:
            pass


def _why_product(a: Any, b: Any) -> str:
    """Why torch's product of matrices (M, K) and (K, N) is the choice of a module of ours."""
    if short(a, b.t(), a.dtype):
        return "a short product"
    wish = LINEAR.preference(
        LinearProblem(a.device.type, a.dtype, a.shape[0], a.shape[1], b.shape[1], b.dtype, False, None)
    )
    return str(wish or "no kernel of ours")


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """Compiled modules run as they were written: what a graph calls is seen by nobody."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def explain_model(model: nn.Module, *args: Any, **kwargs: Any) -> ModelExplanation:
    """Calls model(*args, **kwargs) once and says which kernel served each of its layers, and why none of ours did.

    The call is like any other: it draws random numbers, changes buffers in training, and raises what the model raises;
    its result is dropped. Only the forward pass runs. Compiled modules run uncompiled. The report covers what fastattn
    has kernels for: attention, norms, softmax, cross entropy, GELU, SiLU, SwiGLU, linear layers.
    """
    recorder = _Recorder(model)
    handles = [register_module_forward_pre_hook(recorder.enter)]
    handles.append(register_module_forward_hook(recorder.leave, always_call=True))
    try:
        with _uncompiled(), observed(recorder.around), listening(recorder.heard), recorder:
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    rows = tuple(LayerCalls(*row, calls) for row, calls in recorder.counts.items())
    return ModelExplanation(rows, tuple((*place, calls) for place, calls in recorder.left.items()))


def explain(target: Any, *args: Any, **kwargs: Any) -> Explanation | ModelExplanation:
    """What serves a call of an op, or of every layer of a model.

    target: a public op such as fastattn.scaled_dot_product_attention: which backend would serve
        `target(*args, **kwargs)`, and why not the others; nothing is computed. Or a torch.nn.Module: it is called once
        with the arguments, and the report says which kernel each layer took, how often, and why it was torch's
        (`explain_model`).

    Returns: an Explanation or a ModelExplanation; print it. TypeError: target is neither.
    """
    if isinstance(target, nn.Module):
        return explain_model(target, *args, **kwargs)
    return dispatch.explain(target, *args, **kwargs)
