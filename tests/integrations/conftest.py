"""What a model on our kernels is held to: its output and all gradients keep the law against the model as it was."""

import copy

import pytest
import torch
from torch.overrides import TorchFunctionMode

from fastattn import testing


class EverythingDouble(TorchFunctionMode):
    """Where models ask for float32 in the midst of things (softmax, norms, rotary tables) they get float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        double = {torch.float32: torch.float64}
        args = [double.get(a, a) if isinstance(a, torch.dtype) else a for a in args]
        kwargs = {k: double.get(a, a) if isinstance(a, torch.dtype) else a for k, a in kwargs.items()}
        return func(*args, **kwargs)

    def __enter__(self):
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *raised):
        torch.set_default_dtype(torch.float32)
        return super().__exit__(*raised)


def assert_gradients_lawful(gradients, peers, truths):
    """All gradients of a model, by name, as one result for each dtype."""
    assert gradients.keys() == peers.keys() == truths.keys()
    assert all(g.dtype == peers[n].dtype for n, g in gradients.items())
    # Each counts as much as any other; those that are zero by structure (of biases of keys) do not.
    sizes = {n: g.norm() for n, g in truths.items()}
    largest = max(sizes.values())
    kept = [n for n in truths if sizes[n] > 1e-9 * largest]
    for dtype in {gradients[n].dtype for n in kept}:
        result, peer, truth = (
            torch.cat([(g[n].double() / sizes[n]).flatten() for n in kept if gradients[n].dtype == dtype])
            for g in (gradients, peers, truths)
        )
        testing.assert_lawful(result.to(dtype), peer.to(dtype), truth)


def computed(model, inputs):
    """(output, gradients of floating inputs and of parameters by name); the output's gradient is small integers."""
    inputs = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    leaves = {f"input {i}": t for i, t in enumerate(inputs) if t.requires_grad}
    leaves |= {name.removeprefix("_orig_mod."): parameter for name, parameter in model.named_parameters()}
    output = model(*inputs)
    flowing = (torch.arange(output.numel()) % 7 - 3).view_as(output).to(output.dtype)
    gradients = torch.autograd.grad(output, list(leaves.values()), flowing, allow_unused=True)
    return output.detach(), {n: g for n, g in zip(leaves, gradients, strict=True) if g is not None}


@pytest.fixture(scope="session")
def everything_double():
    """A context manager: in it models compute all that they compute in float64."""
    return EverythingDouble


@pytest.fixture(scope="session")
def hold_gradients():
    """Call with gradients by name: the model's, torch's and those in float64."""
    return assert_gradients_lawful


@pytest.fixture(scope="session")
def law():
    """Call with (model, *inputs), as it is, under torch; what comes back takes a model, the same one by default, and
    holds what it computes of the inputs to the law. The truth is a copy in float64."""

    def measure(model, *inputs):
        peer, peers = computed(model, inputs)
        with torch.autocast("cpu", enabled=False), EverythingDouble():
            exact = [t.double() if t.is_floating_point() else t for t in inputs]
            truth, truths = computed(copy.deepcopy(model).double(), exact)

        def hold(other=model):
            output, gradients = computed(other, inputs)
            testing.assert_lawful(output, peer, truth)
            assert_gradients_lawful(gradients, peers, truths)

        return hold

    return measure


@pytest.fixture(scope="session")
def hold_runs():
    """Call with (run, ours, theirs): the tensor that run(model) returns keeps the law, whatever it does with the model.
    The truth is the run of a copy of theirs in float64."""

    def hold(run, ours, theirs):
        exact = copy.deepcopy(theirs).double()
        found, peer = run(ours), run(theirs)
        with EverythingDouble():
            truth = run(exact)
        testing.assert_lawful(found.detach(), peer.detach(), truth.detach())

    return hold


@pytest.fixture(scope="session")
def classes():
    """Call with a model: the classes of its modules."""
    return lambda model: [type(module) for module in model.modules()]
