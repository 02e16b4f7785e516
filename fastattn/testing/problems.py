"""Which problems' kernels are compiled for which GPUs, without one; and how to call an op without computing anything.

A problem is a workload or case of an op's cases.py, or one that is made here where these leave a size, a dtype or a
feature out that changes what is compiled. Tensors are uninitialised memory, and torch's own arithmetic on them is left
out: only launches matter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn.cases import Arguments, Sampler, Suite
from fastattn.dispatch import Op
from fastattn.ops.attention.samples import additive_mask, bool_mask, bshd_order, of_shape
from fastattn.testing.conformance import evaluate, suites

EVERY = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
#: The generations that have tables of their own.
MAIN = ("sm_80", "sm_90", "gfx942")
ONE = ("sm_90",)
#: Suites whose kernels multiply matrices: elsewhere float16 is bfloat16 with another cast.
PRODUCTS = ("decode", "linear", "linear_cross_entropy")
#: Suites whose kernels are another's with another function in them: float32's is to be compiled, too.
SHARED = ("silu",)
#: Workloads of sizes that are no multiple of 16.
ODD = ("3072x384->65",)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Problem:
    """A call of a suite's function, forward and backward.

    targets: what it is compiled for. aligned: shapes are multiples of 16 and rows lie as they come from torch, so that
    memory is to be accessed 16 bytes at a time. quick: part of `make test`, where it is compiled for these targets.
    features: on every one of its targets it is compiled for what it asks for, not for its tile sizes alone.
    """

    suite: Suite
    name: str
    build: Callable[[Sampler], Arguments]
    dtype: torch.dtype
    targets: tuple[str, ...]
    aligned: bool = False
    quick: tuple[str, ...] = ()
    features: bool = False

    @property
    def title(self) -> str:
        """In words."""
        return f"{self.suite.name}, {self.name}, {str(self.dtype).removeprefix('torch.')}"

    def run(self) -> int:
        """Calls the op on the triton backend, forward and backward; returns the largest head dim, 0 without heads."""
        with Hollow():
            arguments = self.build(HollowSampler(f"{self.suite.name}/{self.name}", dtype=self.dtype))
            dims = [arguments[name].shape[-1] for name in ("query", "key", "value", "key_cache", "value_cache")
                    if isinstance(arguments.get(name), Tensor)]  # fmt: skip
            evaluate(
                lambda **given: self.suite.function(**given, backend="triton"),
                arguments,
                tuple(name for name in self.suite.differentiable if isinstance(arguments.get(name), Tensor)),
                self.suite.results,
                lambda _, output: torch.empty_like(output),
            )
        return max(dims, default=0)


class HollowSampler(Sampler):
    """Draws nothing: floating tensors and large masks are whatever memory holds; integers are real."""

    def _hollow(self, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def normal(self, *shape: int, mean: float = 0.0, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return self._hollow(shape, dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return self._hollow(shape, dtype)

    def chance(self, *shape: int, p: float = 0.5) -> Tensor:
        return self._hollow(shape, torch.bool)


class Hollow(TorchDispatchMode):
    """Within the block torch's operations on large floating tensors give uninitialised results of the right shape."""

    LARGE = 1 << 14

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [v for v in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        large = any(t.is_floating_point() and t.numel() > self.LARGE for t in tensors)
        if not large or func.is_view or func is torch.ops.aten.detach.default:
            return func(*args, **kwargs)
        schema = func._schema
        if schema.is_mutable:
            written = [
                value
                for argument, value in zip(schema.arguments, args, strict=False)
                if argument.alias_info is not None and argument.alias_info.is_write
            ] + [kwargs[a.name] for a in schema.arguments if a.is_out and a.name in kwargs]
            return written[0] if len(written) == 1 else tuple(written)

        def on(device: str) -> Callable[[Any], Any]:
            def move(value: Any) -> Any:
                if isinstance(value, Tensor):
                    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
                return value

            return move

        tree_map = torch.utils._pytree.tree_map
        if "device" in kwargs and kwargs["device"] is not None:
            kwargs = {**kwargs, "device": torch.device("meta")}
        return tree_map(on("cpu"), func(*tree_map(on("meta"), args), **tree_map(on("meta"), kwargs)))


@functools.cache
def op_of(suite: Suite) -> Op:
    """The op that a suite's function calls."""
    prepare: Callable[..., tuple[Op, Any]] = suite.function.prepare  # type: ignore[attr-defined]
    return prepare(**suite.arguments(suite.cases[0], "cpu", torch.float32))[0]


def problems() -> Iterator[Problem]:
    """All of them, in no particular order of importance."""
    for suite in suites().values():
        yield from {"attention": _attention, "attention_varlen": _varlen}.get(suite.name, _rows)(suite)


def _attention(suite: Suite) -> Iterator[Problem]:
    def of(name: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype, targets: tuple[str, ...],
           quick: tuple[str, ...] = (), **call: Any) -> Problem:  # fmt: skip
        build = of_shape(shape, **call)
        return Problem(suite, name, build, dtype, targets, aligned=True, quick=quick, features=True)

    # As published: batch x length = 16k, heads x dim = 2048.
    for dim in (64, 128, 256):
        shape = (4, 2048 // dim, 4096, 4096, dim)
        quick = ("sm_80", "sm_90", "gfx942") if dim == 128 else ()
        yield of(f"D{dim} causal", shape, BF16, MAIN if dim == 64 else EVERY, quick, is_causal=True)
        if dim == 128:
            yield of(f"D{dim}", shape, BF16, ONE)
    yield of("D64 causal", (4, 32, 4096, 4096, 64), FP32, ("sm_80", "sm_90"), ONE, is_causal=True)
    yield of("D128 causal", (4, 16, 4096, 4096, 128), FP32, ONE, is_causal=True)
    yield of("D128 causal", (4, 16, 4096, 4096, 128), FP16, ONE, is_causal=True)
    yield of("D128 causal, short", (4, 16, 512, 512, 128), BF16, ONE, is_causal=True)
    yield of("D128 causal, long", (1, 16, 32768, 32768, 128), BF16, ONE, is_causal=True)
    for dim in (80, 512):
        yield of(f"D{dim} causal", (2, 8, 1024, 1024, dim), BF16, ONE, is_causal=True)
    features: dict[str, dict[str, Any]] = {
        "grouped, sequence first": {"kv_heads": 2, "draw": bshd_order, "is_causal": True},
        "window": {"window": (256, 0)},
        "bool mask": {"mask": bool_mask},
        "mask": {"mask": additive_mask},
        "dropout": {"dropout_p": 0.1, "seed": 5, "is_causal": True},
    }
    for name, call in features.items():
        yield of(f"D64 {name}", (1, 8, 1024, 1024, 64), BF16, ONE, **call)
        if name == "mask":
            yield of(f"D128 {name}", (1, 8, 1024, 1024, 128), BF16, ("sm_80", "gfx942"), **call)
    for case in suite.cases:
        if case.name in ("everything at once", "sinks 40 of 300 bottom_right", "documents 40 of 300 bottom_right"):
            yield Problem(suite, case.name, case.build, BF16, ONE, features=True)


def _varlen(suite: Suite) -> Iterator[Problem]:
    for workload in suite.workloads[:1]:
        yield Problem(suite, workload.name, workload.build, BF16, ONE, aligned=True, features=True)
    for case in suite.cases:
        if case.name == "dropout":
            yield Problem(suite, case.name, case.build, BF16, ONE, features=True)


def _rows(suite: Suite) -> Iterator[Problem]:
    for number, workload in enumerate(suite.workloads):
        first = number == 0
        for dtype in (BF16, FP32, FP16) if first and suite.name in PRODUCTS else (BF16, FP32) if first else (BF16,):
            targets = ONE if dtype != BF16 else EVERY if first else MAIN
            quick = ("sm_90", "gfx942") if first and dtype == BF16 else ()
            aligned = workload.name not in ODD
            features = dtype == FP32 and suite.name in SHARED
            yield Problem(
                suite, workload.name, workload.build, dtype, targets, aligned=aligned, quick=quick, features=features
            )
    for name, build in ALIGNED.get(suite.name, {}).items():
        yield Problem(suite, name, build, BF16, ONE, aligned=True, features=True)
    for case in suite.cases:
        if case.core:
            yield Problem(suite, case.name, case.build, BF16, ONE)


def _masked_softmax(s: Sampler, draw: Callable[..., Tensor]) -> Arguments:
    return {"input": s.normal(8, 12, 512, 512), "dim": -1, "mask": draw(8, 1, 512, 512)}


def _linear(s: Sampler, activation: str) -> Arguments:
    return {"input": s.normal(1024, 768), "weight": s.normal(3072, 768), "bias": s.normal(3072),
            "activation": activation}  # fmt: skip


#: Features that the workloads leave out, of sizes like theirs.
ALIGNED: dict[str, dict[str, Callable[[Sampler], Arguments]]] = {
    "softmax": {
        "8x12x512x512 bool mask": lambda s: _masked_softmax(s, s.chance),
        "8x12x512x512 mask": lambda s: _masked_softmax(s, s.normal),
    },
    "linear": {f"1024x768->3072 {name}": functools.partial(_linear, activation=name) for name in ("gelu", "relu")},
}
