"""One case, one function, one verdict: forward and gradients against fp64 beside torch's own error."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastattn.ops
from fastattn.cases import Arguments, Case, Sampler, Suite
from fastattn.numerics import Error, error, geometric_mean, same_nonfinite, violation

Results = dict[str, Tensor]


class ConformanceError(AssertionError):
    """A result that breaks the contract or the accuracy law; the message lists everything that is wrong."""


@dataclass(frozen=True)
class Measurement:
    """How far one result ("output", "gradient of query", ...) and torch's are from the truth."""

    result: str
    dtype: torch.dtype
    ours: Error
    torchs: Error


@dataclass(frozen=True)
class Report:
    """Every measurement of a case and everything that is wrong with its results, in words."""

    measurements: tuple[Measurement, ...]
    violations: tuple[str, ...]


@functools.cache
def suites() -> dict[str, Suite]:
    """The suites of all ops by name, found by convention: SUITES in fastattn/ops/<op>/cases.py."""
    found: dict[str, Suite] = {}
    for op in pkgutil.iter_modules(fastattn.ops.__path__):
        module = importlib.import_module(f"fastattn.ops.{op.name}.cases")
        found |= {suite.name: suite for suite in module.SUITES}
    return found


def map_tensors(arguments: Arguments, change: Callable[[str, Tensor], Tensor]) -> Arguments:
    """The arguments with every tensor changed; a tensor that is passed twice stays one tensor."""
    changed: dict[int, Tensor] = {}

    def one(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(one(name, part) for part in value)
        if not isinstance(value, Tensor):
            return value
        if id(value) not in changed:
            changed[id(value)] = change(name, value)
        return changed[id(value)]

    return {name: one(name, value) for name, value in arguments.items()}


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def evaluate(
    function: Callable[..., Any],
    arguments: Arguments,
    differentiated: tuple[str, ...],
    results: tuple[str, ...],
    cotangents: Callable[[str, Tensor], Tensor],
) -> Results:
    """What a function returns, by name, and "gradient of <argument>" for the arguments differentiated.

    cotangents: the gradient that flows into a result, by its name and value. An argument that no result depends on
    has no entry.
    """

    def leaf(name: str, tensor: Tensor) -> Tensor:
        wanted = name in differentiated or any(arguments[other] is tensor for other in differentiated)
        return tensor.detach().requires_grad_(wanted)

    leaves = map_tensors(arguments, leaf)
    outputs = _as_tuple(function(**leaves))
    found = dict(zip(results, outputs, strict=False))
    flowing = {name: output for name, output in found.items() if output.requires_grad}
    if differentiated and flowing:
        gradients = torch.autograd.grad(
            list(flowing.values()),
            [leaves[name] for name in differentiated],
            [cotangents(name, output) for name, output in flowing.items()],
            allow_unused=True,
        )
        for name, gradient in zip(differentiated, gradients, strict=True):
            if gradient is not None:
                found[f"gradient of {name}"] = gradient
    return {name: tensor.detach() for name, tensor in found.items()}


@dataclass(frozen=True)
class _Expected:
    """One draw of a case: its arguments, the gradients that flow in, the truth and torch's results."""

    arguments: Arguments
    differentiated: tuple[str, ...]
    cotangents: dict[str, Tensor]
    truth: Results
    torchs: Results


@functools.lru_cache(maxsize=16)
def _expected(suite: Suite, case: Case, device: str, dtype: torch.dtype, draw: int) -> _Expected:
    arguments = suite.arguments(case, device, dtype, draw)
    differentiated = suite.differentiated(case, arguments)
    cotangents: dict[str, Tensor] = {}

    def sample(name: str, output: Tensor) -> Tensor:
        sampler = Sampler(f"{suite.name}/{case.name}/{draw}/{name}", device, output.dtype)
        cotangents[name] = sampler.normal(*output.shape)
        return cotangents[name]

    torchs = evaluate(suite.peer, arguments, differentiated, suite.results, sample)
    upcast = map_tensors(arguments, lambda _, t: t.double() if t.is_floating_point() else t)
    truth = evaluate(
        suite.truth, upcast, differentiated, suite.results, lambda name, output: cotangents[name].to(output.dtype)
    )
    return _Expected(arguments, differentiated, cotangents, truth, torchs)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits, NaN and the sign of zero included."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


def _run(function: Callable[..., Any], suite: Suite, expected: _Expected, twice: bool) -> tuple[Results, list[str]]:
    """A function's results on one draw, and what it did that it must not do."""

    def cotangents(name: str, output: Tensor) -> Tensor:
        given = expected.cotangents.get(name)
        fits = given is not None and given.shape == output.shape
        return given.to(output.dtype) if fits and given is not None else torch.zeros_like(output)

    arguments, differentiated = expected.arguments, expected.differentiated
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)}
    ours = evaluate(function, arguments, differentiated, suite.results, cotangents)
    wrong = [f"{name} was modified" for name, value in before.items() if not same_bits(value, arguments[name])]
    again = evaluate(function, arguments, differentiated, suite.results, cotangents) if twice else ours
    wrong += [f"{name} has other bits in a second run" for name in ours if not same_bits(ours[name], again[name])]
    for name in sorted(expected.truth.keys() ^ ours.keys()):
        wrong.append(f"{name} is missing" if name in expected.truth else f"{name} should not be there")
    for name in ours.keys() & expected.truth.keys():
        result, torchs = ours[name], expected.torchs[name]
        if result.shape != torchs.shape or result.dtype != torchs.dtype:
            wrong.append(
                f"{name} is {result.dtype} {tuple(result.shape)}, torch's is {torchs.dtype} {tuple(torchs.shape)}"
            )
        elif not same_nonfinite(result, expected.truth[name]):
            wrong.append(f"{name} is not NaN and infinite exactly where the truth is")
    return ours, wrong


def examine(
    function: Callable[..., Any],
    suite: Suite,
    case: Case,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Report:
    """Runs a case forward and backward, twice, and holds the results to the contract and the accuracy law.

    function: takes the suite's arguments by name. dtype: of the tensors drawn. Checked are dtypes, shapes, positions
    of NaN and infinities, errors against fp64 beside torch's, that inputs are left alone and that the second run
    gives the same bits.
    """
    expected = [_expected(suite, case, str(device), dtype, draw) for draw in range(case.draws)]
    ours, violations = [], []
    for draw, one in enumerate(expected):
        results, wrong = _run(function, suite, one, twice=draw == 0)
        ours.append(results)
        violations += wrong
    measurements = []
    if not violations:
        for name in sorted(ours[0]):
            together = [torch.cat([r[name].reshape(-1) for r in results]) for results in (
                ours, [e.truth for e in expected], [e.torchs for e in expected]
            )]  # fmt: skip
            result, truth, torchs = together
            # A float64 parameter's gradient is no better than the float32 that a float32 problem is computed in.
            rounded = torch.float32 if result.dtype == torch.float64 != dtype else result.dtype
            measurement = Measurement(name, rounded, error(result, truth), error(torchs, truth))
            measurements.append(measurement)
            broken = violation(measurement.ours, measurement.torchs, rounded, **case.granted(name))
            if broken is not None:
                violations.append(f"{name}: {broken}")
    return Report(tuple(measurements), tuple(violations))


def check(
    function: Callable[..., Any],
    suite: Suite,
    case: Case,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Report:
    """`examine`, raising ConformanceError when anything is wrong."""
    report = examine(function, suite, case, dtype=dtype, device=device)
    if report.violations:
        lines = "\n  ".join(report.violations)
        raise ConformanceError(f"{suite.name}, case {case.name!r}, {dtype}:\n  {lines}")
    return report


def assert_lawful(result: Tensor, peer: Tensor, truth: Tensor) -> None:
    """ConformanceError unless a result keeps the accuracy law, given the peer's result and the truth in float64."""
    if result.shape != peer.shape or result.dtype != peer.dtype:
        raise ConformanceError(f"{result.dtype} {tuple(result.shape)} and not {peer.dtype} {tuple(peer.shape)}")
    if not same_nonfinite(result, truth):
        raise ConformanceError("not NaN and infinite exactly where the truth is")
    broken = violation(error(result, truth), error(peer, truth), result.dtype)
    if broken is not None:
        raise ConformanceError(broken)


def geometric_mean_ratio(reports: Iterable[Report], dtype: torch.dtype) -> float:
    """Geometric mean of our norm error over torch's, which the law wants to be at most 1.1.

    Of the results in the problem's dtype only: float32 statistics of a 16-bit problem would flatter it.
    """
    pairs = [(m.ours, m.torchs) for report in reports for m in report.measurements if m.dtype == dtype]
    return geometric_mean(pairs, dtype)
