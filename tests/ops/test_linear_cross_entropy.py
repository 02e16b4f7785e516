"""linear_cross_entropy: what is refused, memory that does not grow with the rows, gradients that are used twice."""

import re

import pytest
import torch

import fastattn
from fastattn.backends import BACKENDS, probe
from fastattn.bench.measure import peak_memory


def f32(*shape, dtype=torch.float32, device="cpu"):
    shape = shape[0] if shape and isinstance(shape[0], tuple) else shape
    return torch.zeros(shape, dtype=dtype, device=device)


def head(input=(3, 8), weight=(7, 8), target=(0, 6, 3), **call):
    x = f32(*input) if isinstance(input, tuple) else input
    w = f32(*weight) if isinstance(weight, tuple) else weight
    t = torch.tensor(target) if isinstance(target, tuple) else target
    return lambda backend: fastattn.linear_cross_entropy(x, w, t, backend=backend, **call)


BAD = {
    "head of 3 dims": (head((2, 3, 8)), ValueError, r"input must be \(in,\) or \(N, in\), got \(2, 3, 8\)"),
    "head of other inputs": (
        head(weight=(7, 9)),
        ValueError,
        r"linear_weight must be \(C, 8\) or \(C, d1, \.\.\., 8\), got \(7, 9\)",
    ),
    "head without a batch at positions": (head((8,), (7, 2, 8)), ValueError, r"needs an input \(N, in\), got \(8,\)"),
    "head of another dtype": (
        head(weight=f32(7, 8, dtype=torch.bfloat16)),
        ValueError,
        r"linear_weight must be torch.float32 as the input, got torch.bfloat16",
    ),
    "head of a short bias": (
        head(linear_bias=f32(6)),
        ValueError,
        r"linear_bias must have shape \(7,\), got \(6,\)",
    ),
    "head of few targets": (head(target=(0, 1)), ValueError, r"class indices must have shape \(3,\), got \(2,\)"),
    "head of few probabilities": (
        head(target=f32(3, 6)),
        ValueError,
        r"class probabilities must have shape \(3, 7\), got \(3, 6\)",
    ),
    "head that ignores probabilities": (
        head(target=f32(3, 7), ignore_index=1),
        ValueError,
        r"ignore_index goes with class indices, not with class probabilities",
    ),
    "head of bool targets": (
        head(target=torch.zeros(3, dtype=torch.bool)),
        ValueError,
        r"target must hold integers or class probabilities, got torch.bool",
    ),
    "head of an unknown reduction": (head(reduction="median"), ValueError, r"reduction must be one of .*'median'"),
    "head of much smoothing": (head(label_smoothing=1.5), ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
    "head on another device": (
        head(target=torch.zeros(3, dtype=torch.int64, device="meta")),
        ValueError,
        r"target is on meta, input on cpu",
    ),
    "head beyond the address space": (
        head(f32(1, 8).expand(2**40, 8), f32(1, 8).expand(2**30, 8), torch.zeros(1, dtype=torch.int64).expand(2**40)),
        ValueError,
        r"logits of shape \(1099511627776, 1073741824\) is more than memory can address",
    ),
    "head's target out of range": (
        head(target=(0, 7, 3)),
        RuntimeError,
        r"linear_cross_entropy: target 7 at row 1 is not in \[0, 7\) and is not ignore_index \(-100\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_in_the_same_words_by_every_backend(name):
    call, kind, pattern = BAD[name]
    messages = set()
    for backend in (None, *(b for b in BACKENDS if probe(b) is None)):
        with pytest.raises(kind) as raised:
            call(backend)
        assert type(raised.value) is kind
        messages.add(str(raised.value).splitlines()[0])
    assert len(messages) == 1, f"different words: {messages}"
    assert re.search(pattern, messages.pop())


RAW_BAD = {
    "head of few targets": lambda: torch.ops.fastattn.linear_cross_entropy_forward.cpu(
        f32(3, 8), f32(7, 8), None, torch.zeros(2, dtype=torch.int64), None, -100, 0.0, 1, False, False, False
    ),
    "head of a target out of range": lambda: torch.ops.fastattn.linear_cross_entropy_backward.cpu(
        *(f32(3), f32(3, 8), f32(7, 8), None, torch.tensor([0, 7, 1]), None, f32(3), f32(0), f32(0), f32(0)),
        *(-100, 0.0, 0, True, True, False),
    ),
    "head of gradients that do not fit": lambda: torch.ops.fastattn.linear_cross_entropy_backward.cpu(
        *(f32(()), f32(3, 8), f32(7, 8), None, torch.tensor([0, 6, 1]), None, f32(3), f32(3, 7), f32(7, 8), f32(0)),
        *(-100, 0.0, 1, True, True, False),
    ),
}


@pytest.mark.parametrize("name", RAW_BAD)
def test_the_bindings_check_for_themselves(name, skip_without_native):
    with pytest.raises(RuntimeError):
        RAW_BAD[name]()


def test_memory_does_not_grow_with_the_rows(skip_without_native):
    """Logits of 104 MiB at a time, and gradients in their place; all of them would be 410 MB."""
    x, w = torch.randn(2048, 16, requires_grad=True), torch.randn(50000, 16, requires_grad=True)
    target = torch.randint(50000, (2048,))

    def step():
        return torch.autograd.grad(fastattn.linear_cross_entropy(x, w, target, backend="cpu"), (x, w))

    step()
    _, extra = peak_memory(step)
    if extra is None:
        pytest.skip("resident memory is not counted here")
    assert extra < 200e6


@pytest.mark.parametrize("backend", [b for b in BACKENDS if probe(b) is None])
def test_gradients_computed_ahead_are_scaled_and_kept(backend, hold_to):
    """A loss that is scaled, and a graph that is used twice."""
    x, w = torch.randn(9, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    target = torch.randint(7, (9,))
    loss = fastattn.linear_cross_entropy(x, w, target, backend=backend)
    once = torch.autograd.grad(loss * 3.0, (x, w), retain_graph=True)
    twice = torch.autograd.grad(loss * 3.0, (x, w))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))

    def exact(x, w):
        return torch.nn.functional.cross_entropy(x @ w.t(), target) * 3.0

    hold_to(lambda x, w: torch.autograd.grad(exact(x, w), (x, w)), (x, w), once)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if probe(b) is None])
def test_a_gradient_may_be_overwritten_while_the_graph_is_kept(backend):
    """A loss with a gradient of 1: what was computed ahead is handed out only when it is not needed again."""
    x, w = torch.randn(9, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    loss = fastattn.linear_cross_entropy(x, w, torch.randint(7, (9,)), backend=backend)
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    copies = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()
    loss.backward(retain_graph=True)
    x.grad.mul_(2.0)
    w.grad.mul_(2.0)
    loss.backward()
    assert all(torch.equal(t.grad, 2.0 * copy + copy) for t, copy in zip((x, w), copies, strict=True))


def test_ignored_targets_are_ignored(hold_to):
    """As torch's documentation says; its own function without options counts them."""
    x, w = torch.randn(6, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    target = torch.tensor([1, 2, 3, 3, 3, 0])
    kept = target != 3

    def exact(x, w):
        return torch.nn.functional.cross_entropy(x[kept] @ w.t(), target[kept])

    loss = fastattn.linear_cross_entropy(x, w, target, ignore_index=3)
    hold_to(exact, (x, w), [loss, *torch.autograd.grad(loss, (x, w))], torch.ones(()))
