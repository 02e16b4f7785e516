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


@pytest.fixture
def hold_to_torch():
    """Call with (ours, torch's module, inputs, arguments, dtype): same state, and results that keep the law."""

    def check(ours, theirs, inputs, arguments=None, dtype=torch.float32):
        ours.load_state_dict(theirs.state_dict())
        found = []
        for module, kind in ((ours, dtype), (theirs, dtype), (copy.deepcopy(theirs), torch.float64)):
            module = module.to(kind)
            pairs = list(inputs) + list((arguments or {}).values())
            values = converted(pairs, kind)
            given = dict(zip((arguments or {}), values[len(inputs) :], strict=True))
            found.append(run(module, values[: len(inputs)], given, 7))
        (outputs, gradients), (their_outputs, their_gradients), (truths, true_gradients) = found
        for mine, other, truth in zip(outputs, their_outputs, truths, strict=True):
            testing.assert_lawful(mine.detach(), other.detach(), truth.detach())
        assert gradients.keys() == their_gradients.keys()
        for name, gradient in gradients.items():
            other = their_gradients[name]
            assert (gradient is None) == (other is None), name
            if gradient is not None:
                try:
                    testing.assert_lawful(gradient, other, true_gradients[name])
                except testing.ConformanceError as error:
                    raise testing.ConformanceError(f"gradient of {name}: {error}") from error

    return check
