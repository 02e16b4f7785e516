"""What every test runs under: poisoned memory, numbers of its own, quiet threads; and the table of skips at the end."""

import os
import zlib
from collections import Counter

# Tests share the machine's cores with each other's compilers: waiting threads must not spin. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from fastattn import backends, env, testing
from fastattn.gpu import devices


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every uninitialised tensor is full of NaN, those that C++ ops allocate too."""
    with testing.poisoned_memory():
        yield


@pytest.fixture(autouse=True)
def same_numbers(request):
    """A test draws the same numbers whatever ran before it in its process, and no two tests the same ones."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def skip_without_native():
    """Skips, with the cpu backend's own reason, where the native module is not there."""
    reason = backends.probe("cpu")
    if reason is not None:
        pytest.skip(f"cpu: {reason}")


@pytest.fixture
def hold_to():
    """Call with (exact, leaves, found, grads): `found`, the results of something and then the gradients of its leaves,
    keeps the law beside `exact`, which is called in the leaves' dtype, for the peer, and in float64, for the truth.

    grads: of the results; without them `found` is the results alone.
    """

    def check(exact, leaves, found, *grads):
        sides = []
        for dtype in (leaves[0].dtype, torch.float64):
            inputs = [t.detach().to(dtype).requires_grad_() for t in leaves]
            results = exact(*inputs)
            results = [results] if isinstance(results, torch.Tensor) else list(results)
            given = [grad.to(result.dtype) for grad, result in zip(grads, results, strict=False)]
            sides.append(results + list(torch.autograd.grad(results, inputs, given) if given else ()))
        for result, peer, truth in zip(found, *sides, strict=True):
            testing.assert_lawful(result.detach(), peer.detach(), truth.detach())

    return check


def pytest_configure(config):
    torch.set_num_threads(min(torch.get_num_threads(), 4))
    if env.interpreting():
        backends.probe("triton")  # repairs the interpreter, for kernels that tests define as for ours


def pytest_collection_modifyitems(config, items):
    """What belongs to the run in the other of Triton's two modes is not part of this one."""
    here, there = ("interpreted", "compiled") if env.interpreting() else ("compiled", "interpreted")
    elsewhere = [item for item in items if item.get_closest_marker(there)]
    if elsewhere:
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if not item.get_closest_marker(there)]
    reason = devices.triton_reason()
    for item in items if reason is not None else ():
        if item.get_closest_marker(here):
            item.add_marker(pytest.mark.skip(reason=f"triton: {reason}"))


def record_skip(request, backend: str, reason: str) -> None:
    """Notes a case that a backend does not serve, for the table, and skips; reports carry it between processes."""
    request.node.user_properties.append(("unserved", (backend, reason)))
    pytest.skip(f"{backend}: {reason}")


@pytest.fixture
def skip_unserved(request):
    """Call with (function, arguments, backend): skips, with its reason, what the backend cannot serve."""

    def check(function, arguments, backend):
        from fastattn.dispatch import explain

        reason = explain(function, **arguments, backend=backend).reasons[backend]
        if reason is not None:
            record_skip(request, backend, reason)

    return check


def pytest_terminal_summary(terminalreporter, config):
    properties = [p for report in terminalreporter.getreports("skipped") for p in report.user_properties]
    skips = Counter(tuple(value) for name, value in properties if name == "unserved")
    if not skips and not any("test_conformance" in str(r.nodeid) for r in terminalreporter.getreports("passed")):
        return
    terminalreporter.section("cases that a backend does not serve")
    for name in backends.BACKENDS:
        rows = [(reason, count) for (backend, reason), count in sorted(skips.items()) if backend == name]
        if not rows:
            terminalreporter.line(f"{name:12}none")
        for reason, count in rows:
            terminalreporter.line(f"{name:12}{count:5}  {reason}")
