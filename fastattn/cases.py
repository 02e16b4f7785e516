"""What tests, benchmarks and the doctor know about an op: sample problems and workloads, as data.

Every op has fastattn/ops/<op>/cases.py with SUITES (usually one) and WORKLOADS. A suite ties the op's public function
to its truth (a formula in plain torch, fed float64) and to torch's peer. Arguments are always passed by the public
function's parameter names, so any library can be put under the same cases by a small adapter.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.numerics import ELEMENT_FACTOR, NORM_FACTOR, ROUNDINGS

Arguments = dict[str, Any]


class Sampler:
    """Draws the tensors of a case: the same values on every device and, up to rounding, in every dtype.

    seed: an int, or a name to make one from. dtype: of the tensors drawn unless a draw says otherwise. there: draws on
    the device itself, where the CPU would take too long; the values are then that device's.
    """

    def __init__(
        self,
        seed: int | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        there: bool = False,
    ) -> None:
        self.device, self.dtype = torch.device(device), dtype
        number = zlib.crc32(seed.encode()) if isinstance(seed, str) else seed
        self.generator = torch.Generator(self.device if there else "cpu").manual_seed(number)

    def _place(self, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        return tensor.to(self.device, self.dtype if dtype is None else dtype)

    def _draw(self, distribution: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        return distribution(shape, generator=self.generator, device=self.generator.device)

    def normal(self, *shape: int, mean: float = 0.0, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normally distributed, rounded to the sampler's dtype or the given one."""
        return self._place(self._draw(torch.randn, shape) * std + mean, dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Uniform in [low, high) before rounding."""
        return self._place(self._draw(torch.rand, shape) * (high - low) + low, dtype)

    def integers(self, *shape: int, low: int = 0, high: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Uniform integers in [low, high)."""
        drawn = torch.randint(low, high, shape, generator=self.generator, device=self.generator.device)
        return drawn.to(self.device, dtype)

    def chance(self, *shape: int, p: float = 0.5) -> Tensor:
        """bool, True with probability p."""
        return (self._draw(torch.rand, shape) < p).to(self.device)


@dataclass(frozen=True)
class Case:
    """A sample problem.

    build: the arguments of the public function. differentiable: names of the arguments whose gradients are compared;
    None: those of the suite's that the case has. norm_factor, element_factor, roundings: fastattn.numerics' law,
    larger only with a reason. excepted: the results ("gradient of sinks") that they are for; None: all. draws: how many
    times the tensors are drawn; errors are those of all draws together, so that a result of few elements is not
    measured against torch's luck. core: among the few that are run wherever running all takes too long.
    """

    name: str
    build: Callable[[Sampler], Arguments]
    differentiable: tuple[str, ...] | None = None
    norm_factor: float = NORM_FACTOR
    element_factor: float = ELEMENT_FACTOR
    roundings: float = ROUNDINGS
    reason: str = ""
    excepted: tuple[str, ...] | None = None
    draws: int = 1
    core: bool = False

    def __post_init__(self) -> None:
        law = (NORM_FACTOR, ELEMENT_FACTOR, ROUNDINGS)
        if (self.norm_factor, self.element_factor, self.roundings) != law and not self.reason:
            raise ValueError(f"case {self.name!r} bends the accuracy law without a reason")

    def granted(self, result: str) -> dict[str, float]:
        """What of the law is larger for a result: arguments of fastattn.numerics.violation."""
        if self.excepted is not None and result not in self.excepted:
            return {}
        return {
            "norm_factor": self.norm_factor, "element_factor": self.element_factor, "roundings": self.roundings
        }  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """A problem worth timing.

    build: the arguments of the public function, as for a case. forward_flops, backward_flops: multiplications and
    additions that the definition needs (masked-out work is not counted). forward_elements, backward_elements: tensor
    elements that a fused kernel must read or write at least once, all of the workload's dtype. quick: part of
    `fastattn bench <op> --quick`.
    """

    name: str
    build: Callable[[Sampler], Arguments]
    forward_flops: int
    backward_flops: int
    forward_elements: int
    backward_elements: int
    quick: bool = False

    def flops(self, *, backward: bool = False) -> int:
        """Of the forward pass, or of the backward pass alone."""
        return self.backward_flops if backward else self.forward_flops

    def bytes(self, dtype: torch.dtype, *, backward: bool = False) -> int:
        """Least memory traffic of the forward pass, or of the backward pass alone."""
        return (self.backward_elements if backward else self.forward_elements) * dtype.itemsize


def _placed(value: Any, device: torch.device) -> Any:
    """Tensors that a case writes down instead of drawing them are on the CPU."""
    if isinstance(value, tuple):
        return tuple(_placed(part, device) for part in value)
    return value.to(device) if isinstance(value, Tensor) and value.device.type != device.type else value


@dataclass(frozen=True)
class Suite:
    """A public function with its cases.

    truth: the definition, in plain torch and in its inputs' dtype; called with everything floating in float64.
    peer: torch's own function with the same meaning, or the definition in the inputs' dtype where torch has none.
    differentiable: arguments that have gradients. results: names of what the function returns, in order.
    workloads: what `fastattn bench <name>` runs; a suite without any is not in the bench. peers: more functions of the
    same meaning and arguments that the bench runs beside torch's, by name. reads: the workloads' memory traffic is
    nearly all reading (otherwise about half of it is writing), which decides the bandwidth it is held against.
    """

    name: str
    function: Callable[..., Any]
    truth: Callable[..., Any]
    peer: Callable[..., Any]
    differentiable: tuple[str, ...]
    results: tuple[str, ...]
    cases: tuple[Case, ...]
    workloads: tuple[Workload, ...] = ()
    peers: tuple[tuple[str, Callable[..., Any]], ...] = ()
    reads: bool = False

    def __post_init__(self) -> None:
        names = [case.name for case in self.cases]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"suite {self.name!r} has two cases named {', '.join(twice)}")

    def arguments(
        self, case: Case | Workload, device: torch.device | str, dtype: torch.dtype, draw: int = 0
    ) -> Arguments:
        """The arguments of a case or workload, always the same ones."""
        built = case.build(Sampler(f"{self.name}/{case.name}/{draw}", device, dtype))
        return {name: _placed(value, torch.device(device)) for name, value in built.items()}

    def differentiated(self, case: Case | Workload, arguments: Arguments) -> tuple[str, ...]:
        """Names of the arguments whose gradients count."""
        names = case.differentiable if isinstance(case, Case) else None
        if names is not None:
            return names
        return tuple(name for name in self.differentiable if isinstance(arguments.get(name), Tensor))
