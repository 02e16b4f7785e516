"""Samples for torch.library.opcheck: every torch op that the library registers, called as dispatch calls it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn import backends
from fastattn.cases import Case, Suite
from fastattn.dispatch import OPS, Bound
from fastattn.testing.conformance import Results, evaluate, map_tensors, suites

#: Cases whose arguments make the samples: few, because opcheck takes a second for each.
SAMPLED = {
    "attention": ("lse mask", "dropout causal", "everything at once"),
    "attention_varlen": ("gqa", "sinks"),
    "decode": ("everything", "lengths, rows of the cache"),
    "rotary": ("halves packed", "neighbours offsets"),
    "layer_norm": ("prenorm", "no affine"),
    "rms_norm": ("prenorm", "no weight"),
    "linear": ("gelu, bias", "relu, no bias", "vector weight"),
    "linear_cross_entropy": ("mean smoothing bias weight", "none bias", "probabilities sum smoothing"),
    "softmax": ("to float32", "dim 1, wide inside", "mask of heads", "causal top_left 33x70"),
    "log_softmax": ("7 columns", "bool mask"),
    "gelu": ("none 33 columns bias", "tanh 3 columns"),
    "silu": ("33 columns bias", "3 columns"),
    "swiglu": ("33 columns, packed",),
    "cross_entropy": ("mean smoothing weight ignoring 3", "probabilities none smoothing weight", "z_loss softcap mean"),
}


@contextlib.contextmanager
def _as_compiled() -> Iterator[None]:
    """Within the block eager calls take the way of compiled ones: through the ops with the autograd formula."""
    with mock.patch.object(Bound, "run", lambda self, *args: self.public(*args)):
        yield


class _Recorder(TorchDispatchMode):
    """Notes every fastattn op that runs: (overload, arguments)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastattn":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def available_backends(device: str) -> list[str]:
    """Backends that can serve tensors on this kind of device here."""
    return [name for name, backend in backends.BACKENDS.items() if backend.reason_against(device) is None]


def _on_ones(suite: Suite, case: Case, backend: str, arguments: dict[str, Any]) -> Results:
    """Results and gradients of a case on a backend, every result's gradient being ones."""

    def function(**kwargs: Any) -> Any:
        return suite.function(**kwargs, backend=backend)

    differentiated = suite.differentiated(case, arguments)
    return evaluate(function, arguments, differentiated, suite.results, lambda _, output: torch.ones_like(output))


def recorded_calls(
    suite: Suite, case: Case, backend: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[tuple[Any, tuple[Any, ...]]]:
    """(torch op, arguments) of what a case runs on a backend: the op with the autograd formula, the raw backward."""
    with _as_compiled(), _Recorder() as recorder:
        _on_ones(suite, case, backend, suite.arguments(case, device, dtype))
    return recorder.calls


def raw_forward(public: Any) -> Any:
    """<op>_forward.<backend>, given <op>.<backend>."""
    name = public._schema.name.removeprefix("fastattn::")
    return getattr(getattr(torch.ops.fastattn, f"{name}_forward"), public._overloadname)


def _detached(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.detach() if isinstance(a, Tensor) else a for a in args)


def _leaves(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args)


def opcheck_samples(device: torch.device | str = "cpu") -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """(op, args, kwargs) for torch.library.opcheck: all ops of all backends that are available on the device.

    The ops with an autograd formula come with arguments that require gradients, the raw forward and backward ops,
    which have none, with plain ones.
    """
    where = torch.device(device)
    for suite in suites().values():
        chosen = [case for case in suite.cases if case.name in SAMPLED.get(suite.name, ())] or suite.cases[:1]
        for backend in available_backends(where.type):
            for case in chosen:
                for op, args in recorded_calls(suite, case, backend, device=str(where)):
                    if op._schema.name.removeprefix("fastattn::") in OPS:
                        yield raw_forward(op), _detached(args), {}
                        yield op, _leaves(args), {}
                    else:
                        yield op, _detached(args), {}


def metadata(suite: Suite, case: Case, backend: str, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """(dtype, shape, strides) that the contract promises for every result and gradient of a case, from the fakes."""
    with FakeTensorMode() as mode, _as_compiled():
        arguments = map_tensors(suite.arguments(case, "cpu", dtype), lambda _, tensor: mode.from_tensor(tensor))
        found = _on_ones(suite, case, backend, arguments)
        return {name: (t.dtype, tuple(t.shape), t.stride()) for name, t in found.items()}
