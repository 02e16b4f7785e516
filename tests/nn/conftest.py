"""What every module is held to: outputs and all gradients keep the law against torch's module; float64 is the truth."""

import copy

import pytest
import torch

from fastattn import testing


def run(module, inputs, arguments, seed):
    """(outputs, gradients by name) of module(*inputs, **arguments); floating inputs want gradients."""
    leaves = {}
    for name, value in {**{f"input {i}": value for i, value in enumerate(inputs)}, **arguments}.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and id(value) not in map(id, leaves.values()):
            value.requires_grad_()
            leaves[name] = value
    result = module(*inputs, **arguments)
    outputs = [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in outputs]
    torch.autograd.backward(outputs, grads)
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    gradients |= {name: parameter.grad for name, parameter in module.named_parameters()}
    return outputs, gradients


def converted(values, dtype):
    """Copies in a dtype; the same tensor twice stays the same tensor twice."""
    memo = {}

    def one(value):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        return memo.setdefault(id(value), value.detach().to(dtype).clone())

    return {k: one(v) for k, v in values.items()} if isinstance(values, dict) else [one(v) for v in values]


def sides(ours, theirs, dtype):
    """(module, inputs' dtype) of ours, which gets torch's state, of torch's and of the truth: torch's in float64."""
    ours.load_state_dict(theirs.state_dict())
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    return (ours, dtype), (theirs, dtype), (copy.deepcopy(theirs).double(), torch.float64)


def lawful(name, result, peer, truth):
    assert (result is None) == (peer is None), name
    if result is not None:
        try:
            testing.assert_lawful(result.detach(), peer.detach(), truth.detach())
        except testing.ConformanceError as error:
            raise testing.ConformanceError(f"{name}: {error}") from error


@pytest.fixture
def hold_to_torch():
    """Call with (ours, torch's module, inputs, arguments, dtype): same state, and results that keep the law."""

    def check(ours, theirs, inputs, arguments=None, dtype=torch.float32):
        found = []
        values = converted(list(inputs) + list((arguments or {}).values()), dtype)
        for module, kind in sides(ours, theirs, dtype):
            given = converted(values, kind)
            named = dict(zip((arguments or {}), given[len(inputs) :], strict=True))
            found.append(run(module, given[: len(inputs)], named, 7))
        (outputs, gradients), (their_outputs, their_gradients), (truths, true_gradients) = found
        for i, results in enumerate(zip(outputs, their_outputs, truths, strict=True)):
            lawful(f"output {i}", *results)
        assert gradients.keys() == their_gradients.keys()
        for name, gradient in gradients.items():
            lawful(f"gradient of {name}", gradient, their_gradients[name], true_gradients[name])

    return check


@pytest.fixture
def hold_calls():
    """Call with (call, ours, torch's module, *inputs): same state, and what call(module, *inputs) returns, a tensor or
    several, keeps the law in float32."""

    def check(call, ours, theirs, *inputs):
        found = []
        for module, dtype in sides(ours, theirs, torch.float32):
            results = call(module, *converted(inputs, dtype))
            found.append([results] if isinstance(results, torch.Tensor) else results)
        for i, results in enumerate(zip(*found, strict=True)):
            lawful(f"result {i}", *results)

    return check
