"""Poisoned and fenced memory: that they bite, and that no kernel is bitten."""

import os
import subprocess
import sys

import pytest
import torch

from fastattn import backends, testing
from fastattn.testing import GuardedOutputs, guarded, poisoned_memory

ISAS = [name for name, runs, _ in backends.native_module().cpu_isas() if runs] if not backends.probe("cpu") else []


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_poison_reaches_python_and_goes_away_again():
    with poisoned_memory():
        assert torch.isnan(torch.empty(1000)).all()
        assert (torch.empty(1000, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
    assert torch.are_deterministic_algorithms_enabled(), "the tests' own fixture is still on"


def test_poison_reaches_what_cpp_kernels_allocate(skip_without_native):
    """Allocations of a C++ op go through torch's dispatcher, where the filling happens: a mode sees them."""

    class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default):
                Allocations.seen += 1
                assert torch.isnan(out).all(), "not poisoned"
            return out

    kernel = torch.ops.fastattn.layer_norm_forward.cpu
    with poisoned_memory(), Allocations():
        kernel.redispatch(
            torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), torch.randn(30, 40), None, None, 1, 1e-5, 0.0
        )
    assert Allocations.seen >= 3  # output, mean, rstd


@pytest.mark.parametrize("at_end", [True, False])
def test_guarded_tensors_are_copies_with_the_same_strides(at_end):
    for tensor in (
        torch.randn(3, 5),
        torch.randn(4, 6, 7).transpose(0, 2),
        torch.randn(5, 1).expand(5, 9),
        torch.randn(9, 9)[2:, 3:-1],
        torch.tensor(3.0),
        torch.arange(7),
        torch.rand(3, 4) < 0.5,
        torch.zeros(0, 3),
    ):
        copy = guarded(tensor, at_end=at_end)
        assert torch.equal(copy, tensor) and copy.dtype == tensor.dtype
        if tensor.numel():
            assert copy.stride() == tensor.stride() and copy.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize(("at_end", "outside"), [(True, "x.data_ptr() + 12"), (False, "x.data_ptr() - 1")])
def test_one_byte_outside_kills(at_end, outside):
    code = (
        "import ctypes, torch\n"
        "from fastattn.testing import guarded\n"
        f"x = guarded(torch.zeros(3), at_end={at_end})\n"
        "ctypes.string_at(x.data_ptr(), 12)\n"
        "print('inside is fine', flush=True)\n"
        f"ctypes.string_at({outside}, 1)\n"
        "print('outside, too')\n"
    )
    result = run("-X", "faulthandler", "-c", code)
    assert result.stdout == "inside is fine\n" and result.returncode < 0


def test_guarded_outputs_are_used_and_full_of_nan(skip_without_native):
    mode = GuardedOutputs()
    x = torch.randn(5, 7)
    (output,) = (mode.run(torch.ops.fastattn.softmax_forward.cpu, x, 1, False, torch.float32),)
    assert mode.served == 1 and torch.allclose(output, torch.softmax(x, 1))
    with mode:
        assert torch.isnan(torch.empty(10)).all()


@pytest.mark.parametrize("isa", ISAS)
def test_no_kernel_leaves_its_tensors(isa):
    """Odd sizes, odd strides, every alignment: the core cases of every op in every dtype."""
    result = run("-X", "faulthandler", "-m", "fastattn.testing.bounds", "--core", FASTATTN_CPU_ISA=isa)
    assert result.returncode == 0, "\n".join([*result.stdout.splitlines()[-1:], result.stderr])
    assert result.stdout.startswith(f"isa {isa}\n")


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_no_kernel_leaves_its_tensors_in_any_case(isa):
    result = run("-X", "faulthandler", "-m", "fastattn.testing.bounds", FASTATTN_CPU_ISA=isa)
    assert result.returncode == 0, "\n".join([*result.stdout.splitlines()[-1:], result.stderr])


@pytest.mark.parametrize("suite", testing.suites().values(), ids=list(testing.suites()))
def test_results_are_the_same_straight_from_the_allocator(suite, skip_without_native):
    """As users get them: tests see results that came through the dispatcher."""
    from fastattn import _C

    for case in (case for case in suite.cases if case.core or "empty" in case.name or "no " in case.name):
        arguments = suite.arguments(case, "cpu", torch.float32)
        found = []
        for through_dispatcher in (True, False):
            before = _C.allocate_through_dispatcher(through_dispatcher)
            try:
                found.append(
                    testing.evaluate(
                        lambda **call: suite.function(**call, backend="cpu"),
                        arguments,
                        suite.differentiated(case, arguments),
                        suite.results,
                        lambda _, output: torch.ones_like(output),
                    )
                )
            finally:
                _C.allocate_through_dispatcher(before)
        seen, straight = found
        assert seen.keys() == straight.keys()
        for name in seen:
            assert testing.same_bits(seen[name], straight[name]), (case.name, name)
            assert seen[name].stride() == straight[name].stride(), (case.name, name)
