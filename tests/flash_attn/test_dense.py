"""flash_attn_func and its packed forms, argument by argument, against a formula of their own."""

import inspect
import math

import pytest
import torch

from fastattn import flash_attn, philox, testing
from fastattn.cases import Case, Suite
from fastattn.flash_attn import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from fastattn.ops.attention.samples import NEAR_KEYS_FIRST, UNFUSED_PEER
from fastattn.testing.opcheck import available_backends

BACKENDS = available_backends("cpu")
TAIL = {
    "dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0,
    "alibi_slopes": None, "deterministic": False, "return_attn_probs": False,
}  # fmt: skip


def formula(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
            alibi_slopes=None, keep=None, **_):  # fmt: skip
    """(output, lse, probabilities) in the dtype of q."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scale = 1 / math.sqrt(q.shape[3]) if softmax_scale is None else softmax_scale
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    distance = torch.arange(k.shape[1]) - (torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1])
    if alibi_slopes is not None:
        slopes = alibi_slopes.expand(q.shape[0], q.shape[2])[:, :, None, None].to(q.dtype)
        scores = scores - slopes * distance.abs()
    left, right = window_size[0], 0 if causal else window_size[1]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        hidden |= distance < -left
    if right >= 0:
        hidden |= distance > right
    scores = scores.masked_fill(hidden, -torch.inf)
    dead = hidden.all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)
    kept = weights if keep is None else weights * keep / (1 - dropout_p)
    return torch.einsum("bhij,bjhd->bihd", kept, v), torch.logsumexp(scores, -1), weights


def keep_mask(seed, p, *shape):
    """What dropout keeps after manual_seed(seed)."""
    if not p:
        return None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return philox.keep_mask(philox.draw(torch.device("cpu")), p, *shape)


def definition(query, key, value, dropout_p=0.0, **call):
    keep = keep_mask(3, dropout_p, query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    output, lse, weights = formula(query, key, value, dropout_p, keep=keep, **call)
    probabilities = weights if keep is None else torch.where(keep, weights, -weights)
    return output, lse.to(torch.float64 if query.dtype == torch.float64 else torch.float32), probabilities.detach()


def case(name, queries, unlike_law=UNFUSED_PEER, **call):
    def build(s):
        drawn = {"query": s.normal(2, queries, 4, 16), "key": s.normal(2, 19, 2, 16), "value": s.normal(2, 19, 2, 24)}
        slopes = {k: s.uniform(*v, dtype=torch.float32) for k, v in call.items() if k == "alibi_slopes"}
        return {**drawn, **call, **slopes}

    # The core is what kernels in Triton's interpreter, which takes its time, are asked.
    core = (name, queries) in (("everything", 7), ("dropout", 19), ("causal window", 30))
    return Case(f"{name}, {queries} queries", build, draws=3, core=core, **unlike_law)


CALLS = {
    "plain": {},
    "causal": {"causal": True},
    "scale": {"softmax_scale": 0.3},
    "window": {"window_size": (4, 3)},
    "one-sided window": {"window_size": (5, -1)},
    "causal window": {"causal": True, "window_size": (6, 9)},
    "softcap": {"softcap": 2.0, "causal": True},
    "a softcap below 0": {"softcap": -1.0},
    "slopes": {"alibi_slopes": (4,), "causal": True, "unlike_law": NEAR_KEYS_FIRST},
    "slopes of each element": {"alibi_slopes": (2, 4), "deterministic": True, "unlike_law": NEAR_KEYS_FIRST},
    "dropout": {"dropout_p": 0.3, "causal": True},
    "everything": {"dropout_p": 0.2, "softcap": 3.0, "alibi_slopes": (4,), "window_size": (7, 2),
                   "unlike_law": NEAR_KEYS_FIRST},
}  # fmt: skip
SUITE = Suite(
    "flash_attn_func", flash_attn_func, definition, definition, ("query", "key", "value"),
    ("output", "lse", "probabilities"),
    tuple(case(name, queries, **call) for name, call in CALLS.items() for queries in (7, 19, 30)),
)  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "case", "dtype"),
    [
        (backend, case, dtype)
        for backend in BACKENDS
        for case in SUITE.cases
        for dtype in (torch.float32, torch.bfloat16)
        if backend != "triton" or (case.core and dtype == torch.float32)
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_against_a_formula(case, backend, dtype):
    """Outputs, lse, probabilities and gradients; fewer, as many and more queries than keys (dead rows)."""

    def function(query, key, value, **call):
        torch.manual_seed(3)
        return flash_attn_func(query, key, value, **call, return_attn_probs=True, backend=backend)

    testing.check(function, SUITE, case, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropped_probabilities_are_negative_and_dead_rows_nothing(backend):
    torch.manual_seed(3)
    q, k, v = torch.randn(2, 9, 4, 16), torch.randn(2, 5, 4, 16), torch.randn(2, 5, 4, 16)
    torch.manual_seed(3)
    output, lse, probabilities = flash_attn_func(q, k, v, 0.4, causal=True, return_attn_probs=True, backend=backend)
    assert torch.equal(torch.signbit(probabilities), ~keep_mask(3, 0.4, 2, 4, 9, 5))
    assert (lse[:, :, :4] == -torch.inf).all() and not output[:, :4].any() and not probabilities[:, :, :4].any()
    assert lse[:, :, 4:].isfinite().all()
    sums = [p.abs().sum(-1)[:, :, 4:] for p in (probabilities, formula(q, k, v, causal=True)[2])]
    testing.assert_lawful(*sums, torch.ones(2, 4, 5, dtype=torch.float64))


@pytest.mark.parametrize("function", [flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func])
def test_signatures_are_flash_attentions(function):
    parameters = inspect.signature(function).parameters
    positional = {name: p.default for name, p in parameters.items() if p.kind is not p.KEYWORD_ONLY}
    tensors = {"flash_attn_func": ["q", "k", "v"], "flash_attn_kvpacked_func": ["q", "kv"]}
    given = tensors.get(function.__name__, ["qkv"])
    assert list(positional) == [*given, *TAIL]
    assert {name: positional[name] for name in TAIL} == TAIL


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_forms_are_the_plain_one(backend):
    call = {"causal": True, "softcap": 4.0, "backend": backend}
    qkv = torch.randn(2, 11, 3, 4, 16, requires_grad=True)
    q, k, v = (part.detach().clone().requires_grad_() for part in qkv.unbind(2))
    expected = flash_attn_func(q, k, v, **call)
    grad = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, (q, k, v), grad)
    output = flash_attn_qkvpacked_func(qkv, **call)
    assert torch.equal(output, expected)
    assert torch.equal(torch.autograd.grad(output, qkv, grad)[0], torch.stack(grads, 2))
    kv = torch.stack((k, v), 2).detach().requires_grad_()
    output = flash_attn_kvpacked_func(q, kv, **call)
    assert torch.equal(output, expected)
    assert torch.equal(torch.autograd.grad(output, kv, grad)[0], torch.stack(grads[1:], 2))


def test_results_lie_as_flash_attentions():
    q, kv = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 4, 8)
    assert flash_attn_kvpacked_func(q, kv).is_contiguous()
    assert flash_attn_func(q, *kv.unbind(2)).is_contiguous()


def test_lse_has_a_gradient():
    q, k, v = (torch.randn(1, 6, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    lse = flash_attn_func(q, k, v, return_attn_probs=True)[1]
    expected = torch.autograd.grad(formula(q, k, v)[1].sum(), q)[0]
    testing.assert_lawful(torch.autograd.grad(lse.sum(), q)[0], expected, expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_compiled(dropout_p):
    torch._dynamo.reset()
    qkv = torch.randn(2, 9, 3, 2, 16, requires_grad=True)

    def call(qkv):
        return flash_attn_qkvpacked_func(qkv, dropout_p, causal=True)

    torch.manual_seed(1)
    expected = call(qkv)
    torch.manual_seed(1)
    output = torch.compile(call, fullgraph=True, backend="aot_eager")(qkv)
    assert torch.equal(output, expected)
    assert torch.equal(torch.autograd.grad(output.sum(), qkv)[0], torch.autograd.grad(expected.sum(), qkv)[0])


def tensors(heads=2, kv_heads=2, **changes):
    shapes = {"q": (2, 3, heads, 8), "k": (2, 5, kv_heads, 8), "v": (2, 5, kv_heads, 8)}
    return {name: torch.randn(changes.get(name, shape)) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (tensors(q=(3, 2, 8)), r"flash_attn_func: q, k and v must be \(B, S, H, D\) with one B"),
        (tensors(q=(1, 3, 2, 8)), r"must be \(B, S, H, D\) with one B, got \(1, 3, 2, 8\)"),
        (tensors(heads=3), r"query heads \(3\) must be a multiple of the key heads \(2\)"),
        (tensors(v=(2, 4, 2, 8)), "key and value must have one length"),
        (tensors(k=(2, 5, 2, 9)), "one head dim, got 8 and 9"),
        ({**tensors(), "dropout_p": 1.5}, r"dropout_p must be in \[0, 1\], got 1.5"),
        ({**tensors(), "softmax_scale": math.nan}, "scale must be finite"),
        ({**tensors(), "softcap": math.nan}, "softcap must be 0 or"),
        ({**tensors(), "window_size": (-2, 0)}, "window must hold numbers of at least 0, or -1"),
        ({**tensors(), "alibi_slopes": torch.ones(3)}, r"alibi_slopes must have shape \(2,\) or \(2, 2\)"),
        ({**tensors(), "v": torch.randn(2, 5, 2, 8).half()}, "one dtype and device"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        flash_attn_func(**arguments)


def test_packed_tensors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"qkv must be \(B, S, 3, H, D\), got \(2, 5, 2, 4, 8\)"):
        flash_attn_qkvpacked_func(torch.randn(2, 5, 2, 4, 8))
    with pytest.raises(ValueError, match=r"kv must be \(B, S, 2, H, D\), got \(2, 5, 4, 8\)"):
        flash_attn_kvpacked_func(torch.randn(2, 5, 4, 8), torch.randn(2, 5, 4, 8))


def test_everything_is_exported():
    assert all(hasattr(flash_attn, name) for name in flash_attn.__all__)
