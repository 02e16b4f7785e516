"""Every op x backend x case x dtype: forward and gradients under the accuracy law, metadata, determinism.

Triton's interpreter is a mode of the whole process: under TRITON_INTERPRET=1 these tests are of the triton backend
alone, of core cases unless slow ones are wanted. On a machine with a GPU they are of that backend, too, on the GPU.
"""

import functools

import pytest
import torch

from fastattn import env, numerics, testing
from fastattn.backends import BACKENDS, probe
from fastattn.dispatch import explain

SUITES = testing.suites()
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


INTERPRETING = env.interpreting()
TESTED = ["triton"] if INTERPRETING else list(BACKENDS)


def device_of(backend):
    return "cuda" if backend == "triton" and not INTERPRETING and torch.cuda.is_available() else "cpu"


# Interpreted kernels take thousands of times as long.
SLOWLY = [pytest.mark.slow] if INTERPRETING else []


def effort(case, dtype=torch.bfloat16):
    """Marks for a case; float16 takes bfloat16's paths."""
    return SLOWLY if not (case.core and dtype != torch.float16) else []


def together(suite):
    """Where tests are spread over processes: those that share what they have computed stay in one."""
    return pytest.mark.xdist_group(suite.name)


# The backend varies fastest: the truth of a case is computed once for all of them.
ALL = [
    pytest.param(
        suite,
        case,
        dtype,
        backend,
        id=f"{suite.name}-{case.name.replace(' ', '_')}-{name_of(dtype)}-{backend}",
        marks=[*effort(case, dtype), together(suite)],
    )
    for suite in SUITES.values()
    for dtype in DTYPES
    for case in suite.cases
    for backend in TESTED
]


@functools.cache
def report(suite_name, case_name, dtype, backend):
    suite = SUITES[suite_name]
    case = next(case for case in suite.cases if case.name == case_name)
    return testing.examine(
        lambda **kwargs: suite.function(**kwargs, backend=backend), suite, case, dtype=dtype, device=device_of(backend)
    )


@pytest.mark.parametrize(("suite", "case", "dtype", "backend"), ALL)
def test_case(suite, case, dtype, backend, skip_unserved):
    skip_unserved(suite.function, suite.arguments(case, device_of(backend), dtype), backend)
    violations = report(suite.name, case.name, dtype, backend).violations
    assert not violations, "\n".join(violations)


@pytest.mark.parametrize("backend", TESTED)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=name_of)
@pytest.mark.parametrize("suite", [pytest.param(s, marks=together(s), id=s.name) for s in SUITES.values()])
@pytest.mark.parametrize("cases", [*(["core"] if INTERPRETING else []), pytest.param("all", marks=SLOWLY)])
def test_geometric_mean(suite, dtype, backend, cases):
    """Over all cases of an op the error is at most 1.1 x torch's."""
    reports = []
    for case in suite.cases:
        if cases == "core" and effort(case, dtype):
            continue
        arguments = suite.arguments(case, device_of(backend), dtype)
        if explain(suite.function, **arguments, backend=backend).reasons[backend] is None:
            reports.append(report(suite.name, case.name, dtype, backend))
    if not reports:
        pytest.skip(f"{backend}: {probe(backend) or 'interpreted only where slow tests are wanted'}")
    assert testing.geometric_mean_ratio(reports, dtype) <= numerics.GEOMETRIC_MEAN


@pytest.mark.parametrize(
    ("suite", "case"),
    [
        pytest.param(s, c, id=f"{s.name}-{c.name.replace(' ', '_')}", marks=effort(c))
        for s in SUITES.values()
        for c in s.cases
    ],
)
@pytest.mark.parametrize("backend", TESTED)
def test_metadata_is_what_the_fakes_promise(suite, case, backend):
    """dtype, shape and strides of every result; of gradients what reaches the caller."""
    dtype = torch.bfloat16
    arguments = suite.arguments(case, device_of(backend), dtype)
    reason = explain(suite.function, **arguments, backend=backend).reasons[backend]
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    promised = testing.metadata(suite, case, backend, dtype)
    found = testing.evaluate(
        lambda **kwargs: suite.function(**kwargs, backend=backend),
        arguments,
        suite.differentiated(case, arguments),
        suite.results,
        lambda _, output: torch.ones_like(output),
    )
    assert {name: (t.dtype, tuple(t.shape), t.stride()) for name, t in found.items()} == promised


@pytest.mark.parametrize("backend", [name for name in TESTED if name != "reference"])
def test_the_backend_serves_every_case(backend):
    """Float64 is the reference's; nothing else is skipped."""
    reason = BACKENDS[backend].reason_against(device_of(backend))
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    refused = {}
    for suite in SUITES.values():
        for case in suite.cases:
            for dtype in DTYPES[:3]:
                why = explain(
                    suite.function, **suite.arguments(case, device_of(backend), dtype), backend=backend
                ).reasons[backend]
                if why is not None:
                    refused[suite.name, case.name, name_of(dtype)] = why
    assert refused == {}
