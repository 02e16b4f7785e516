"""Gradients of gradients: every op's core cases against the definition in float64, autograd and torch.func."""

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import numerics, testing
from fastattn.cases import Sampler
from fastattn.testing.opcheck import available_backends

SUITES = testing.suites()
BACKENDS = available_backends("cpu")
sdpa = fastattn.scaled_dot_product_attention

CASES = [
    pytest.param(suite, case, id=f"{suite.name}-{case.name.replace(' ', '_')}")
    for suite in SUITES.values()
    for case in suite.cases
    if case.core and suite.differentiable and case.differentiable != ()
]


def weighted(tensors, seed):
    """A sum of everything in which every element counts differently."""
    total = 0.0
    for i, tensor in enumerate(tensors):
        weights = Sampler(f"{seed} {i}").normal(*tensor.shape)
        total = total + (tensor * weights.to(tensor.dtype)).to(torch.promote_types(tensor.dtype, torch.float32)).sum()
    return total


def second_derivatives(function, arguments, names):
    """d/d(arguments) of a weighted sum of the first derivatives, which depends on the incoming gradients as well."""
    leaves = {name: arguments[name].detach().clone().requires_grad_() for name in names}
    outputs = function(**{**arguments, **leaves})
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.requires_grad]
    outputs = [torch.where(torch.isfinite(o), o, 0.0) for o in outputs]  # lse of rows that see nothing
    # Squares: the gradients that flow in depend on the inputs, and the second derivative flows back through them.
    loss = weighted([o.square() for o in outputs], "outputs") + weighted(outputs, "more")
    first = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, allow_unused=True)
    first = [g for g in first if g is not None]
    second = torch.autograd.grad(weighted(first, "gradients"), list(leaves.values()), allow_unused=True)
    return {name: g for name, g in zip(names, second, strict=True) if g is not None}


def double(arguments):
    return {n: a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for n, a in arguments.items()}


def of_torch(suite, arguments, names):
    """By torch's own function, or by the definition where torch's has no second derivative."""
    try:
        return second_derivatives(suite.peer, arguments, names)
    except RuntimeError as error:
        if "not implemented" not in str(error):
            raise
        return second_derivatives(suite.truth, arguments, names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("suite", "case"), CASES)
def test_of_fused_kernels(suite, case, dtype, skip_without_native):
    ours, truth, torchs = [], [], []
    for draw in range(max(case.draws, 4)):
        arguments = suite.arguments(case, "cpu", dtype, draw)
        names = suite.differentiated(case, arguments)
        ours.append(second_derivatives(lambda **call: suite.function(**call, backend="cpu"), arguments, names))
        truth.append(second_derivatives(suite.truth, double(arguments), names))
        torchs.append(of_torch(suite, arguments, names))
    for name in truth[0]:
        result, true, torchs_result = (
            torch.cat([found[name].reshape(-1) for found in side]) for side in (ours, truth, torchs)
        )
        assert result.dtype == arguments[name].dtype
        errors = numerics.error(result, true), numerics.error(torchs_result, true)
        assert numerics.violation(*errors, result.dtype) is None, name


def of_sums(function, order):
    """The function's sum of squares, differentiated `order` times by torch.func, each time squared and summed."""

    def total(x):
        return function(x).square().sum()

    for _ in range(order):
        total = (lambda inner: lambda x: torch.func.grad(inner)(x).square().sum())(total)
    return total


PLAIN = {
    "attention": (
        lambda x: sdpa(x, x * 0.5, x + 1.0, is_causal=True),
        lambda x: (
            (x @ (x * 0.5).mT / 8**0.5).masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf).softmax(-1) @ (x + 1.0)
        ),
        (2, 1, 5, 8),
    ),
    "layer_norm": (  # written out: the third derivative of torch 2.13's own is wrong
        lambda x: fastattn.layer_norm(x, (8,), x[0]),
        lambda x: (x - x.mean(-1, True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * x[0],
        (5, 8),
    ),
    "rms_norm": (lambda x: fastattn.rms_norm(x, (8,), x[0]), lambda x: F.rms_norm(x, (8,), x[0]), (5, 8)),
    "softmax": (lambda x: fastattn.softmax(x, -1), lambda x: x.softmax(-1), (5, 8)),
    "gelu": (lambda x: fastattn.gelu(x, bias=x[0]), lambda x: F.gelu(x + x[0]), (5, 8)),
    "gelu sigmoid": (
        lambda x: fastattn.gelu(x, "sigmoid", bias=x[0]),
        lambda x: F.silu(1.702 * (x + x[0])) / 1.702,
        (5, 8),
    ),
    "silu": (lambda x: fastattn.silu(x, bias=x[0]), lambda x: F.silu(x + x[0]), (5, 8)),
    "swiglu": (lambda x: fastattn.swiglu(x, x + 1.0), lambda x: F.silu(x) * (x + 1.0), (5, 8)),
    "cross_entropy": (
        lambda x: fastattn.cross_entropy(x, torch.arange(5), label_smoothing=0.1),
        lambda x: F.cross_entropy(x, torch.arange(5), label_smoothing=0.1),
        (5, 8),
    ),
}


def gradient(function, order):
    return torch.func.grad(of_sums(function, order))


TRANSFORMS = {
    "second derivative": lambda function: gradient(function, 1),
    "third derivative": lambda function: gradient(function, 2),
    "vmap": lambda function: lambda x: torch.vmap(gradient(function, 1))(torch.stack([x, x * 0.5])),
    "Hessian": lambda function: torch.func.jacrev(torch.func.jacrev(of_sums(function, 0))),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", PLAIN)
def test_of_torch_func(name, transform, backend):
    """grad of grad, of grad, under vmap; Hessians as jacrev of jacrev."""
    function, plain, shape = PLAIN[name]
    transform = TRANSFORMS[transform]
    ours, torchs, truth = [], [], []
    for draw in range(8):  # few elements each
        x = Sampler(f"{name} {draw}").normal(*shape)
        with fastattn.use_backend(backend):
            ours.append(transform(function)(x))
        torchs.append(transform(plain)(x))
        truth.append(transform(plain)(x.double()))
    result, torchs_result, true = (torch.stack(found) for found in (ours, torchs, truth))
    assert numerics.violation(numerics.error(result, true), numerics.error(torchs_result, true), result.dtype) is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_what_graphs_hold(backend):
    """The op that exported programs call differentiates twice, too, when it runs outside of a compiled graph."""
    q, k, v = (Sampler("graphs").normal(2, 3, 6, 8).requires_grad_() for _ in range(3))
    op = getattr(torch.ops.fastattn.attention, backend)

    def function(q, k, v):
        return op(q, k, v, None, None, 0.3, True, False, 0.0)[0]

    def twice(function, *leaves):
        first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(weighted(first, "graphs"), leaves)

    expected = twice(lambda q, k, v: sdpa(q, k, v, is_causal=True, scale=0.3, backend=backend), q, k, v)
    for a, b in zip(twice(function, q, k, v), expected, strict=True):
        assert testing.same_bits(a, b)


def test_dropout_is_the_same_mask_again(skip_without_native):
    """Both backends draw the mask from (seed, offset) alone: first and second derivatives see one function."""
    draws = Sampler("dropout")
    arguments = {name: draws.normal(2, 3, 20, 8) for name in ("query", "key", "value")}

    def found(backend, arguments):
        def attend(**call):
            return sdpa(**call, dropout_p=0.4, seed=7, return_lse=True, backend=backend)

        return second_derivatives(attend, arguments, tuple(arguments))

    ours, references, truth = (
        found("cpu", arguments),
        found("reference", arguments),
        found("reference", double(arguments)),
    )
    for name in arguments:
        errors = numerics.error(ours[name], truth[name]), numerics.error(references[name], truth[name])
        assert numerics.violation(*errors, torch.float32) is None, name


class Critic(torch.nn.Module):
    """Attention, a norm and a head on the reals, from either namespace."""

    def __init__(self, ops):
        super().__init__()
        self.ops = ops
        torch.manual_seed(3)
        self.qkv, self.head = torch.nn.Linear(16, 48), torch.nn.Linear(16, 1)
        self.weight, self.bias = torch.nn.Parameter(torch.ones(16)), torch.nn.Parameter(torch.zeros(16))

    def forward(self, x):
        h = self.ops.layer_norm(x, (16,), self.weight, self.bias)
        q, k, v = self.qkv(h).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # torch's fused one has no second
            x = x + self.ops.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(x).mean((1, 2))


def test_training_with_a_gradient_penalty(skip_without_native):
    """Gulrajani et al. 2017: the penalty on the norm of the input's gradient is a second derivative of the weights."""

    def losses(ops, dtype=torch.float32):
        critic = Critic(ops).to(dtype)
        optimizer = torch.optim.SGD(critic.parameters(), lr=0.02)
        found = []
        for step in range(5):
            x = Sampler(f"penalty {step}").normal(4, 7, 16).to(dtype).requires_grad_()
            score = critic(x)
            (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
            loss = score.mean() + 10.0 * (slope.flatten(1).norm(dim=1) - 1.0).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        return torch.stack(found)

    with fastattn.use_backend("cpu"):
        ours = losses(fastattn)
    truth = losses(F, torch.float64)
    assert ours[-1] < ours[0]
    assert numerics.violation(numerics.error(ours, truth), numerics.error(losses(F), truth), torch.float32) is None
