"""What every op promises beyond its values: autograd, autocast, torch.func, determinism, opcheck."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import numerics, testing
from fastattn.bench import measure
from fastattn.dispatch import OPS
from fastattn.testing.opcheck import available_backends, opcheck_samples

SUITES = testing.suites()
BACKENDS = available_backends("cpu")
SAMPLES = list(opcheck_samples("cpu"))
sdpa = fastattn.scaled_dot_product_attention


def case(suite, name):
    return next(c for c in SUITES[suite].cases if c.name == name)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Every backend that is available, forced for every call of the test."""
    with fastattn.use_backend(request.param):
        yield request.param


def qkv(*shape, dtype=torch.float32, requires_grad=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_(requires_grad) for _ in range(3)]


# One call of every op, on its own tensors: (function of the tensors, tensors).
def calls(dtype=torch.float32):
    s = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=s).to(dtype).requires_grad_()

    target = torch.tensor([1, 0, 6, 3])
    return {
        "attention": (
            lambda q, k, v: sdpa(q, k, v, is_causal=True),
            (draw(2, 3, 9, 8), draw(2, 3, 9, 8), draw(2, 3, 9, 8)),
        ),
        "attention mask lse": (
            lambda q, k, v, m: torch.cat([t.reshape(2, 3, 9, -1) for t in sdpa(q, k, v, m, return_lse=True)], -1),
            (draw(2, 3, 9, 8), draw(2, 3, 7, 8), draw(2, 3, 7, 5), draw(9, 7)),
        ),
        "layer_norm": (lambda x, w, b: fastattn.layer_norm(x, (10,), w, b), (draw(4, 10), draw(10), draw(10))),
        "layer_norm residual": (
            lambda x, r, w: sum(fastattn.layer_norm(x, (10,), w, residual=r, prenorm=True)),
            (draw(4, 10), draw(4, 10), draw(10)),
        ),
        "rms_norm": (lambda x, w: fastattn.rms_norm(x, (10,), w), (draw(4, 10), draw(10))),
        "linear": (fastattn.linear, (draw(2, 4, 10), draw(7, 10), draw(7))),
        "linear gelu": (lambda x, w: fastattn.linear(x, w, activation="gelu"), (draw(4, 10), draw(7, 10))),
        "linear relu": (lambda x, w, b: fastattn.linear(x, w, b, "relu"), (draw(4, 10), draw(7, 10), draw(7))),
        "add_layer_norm": (
            lambda x, r, w, b: sum(fastattn.add_layer_norm(x, r, (10,), w, b, dropout_p=0.5, seed=4)),
            (draw(4, 10), draw(4, 10), draw(10), draw(10)),
        ),
        "add_rms_norm": (
            lambda x, r, w: sum(fastattn.add_rms_norm(x, r, (10,), w, dropout_p=0.5, seed=4, weight_offset=1.0)),
            (draw(4, 10), draw(4, 10), draw(10)),
        ),
        "softmax": (lambda x: fastattn.softmax(x, -1), (draw(4, 10),)),
        "log_softmax": (lambda x: fastattn.log_softmax(x, 0), (draw(4, 10),)),
        "softmax mask": (lambda x, m: fastattn.softmax(x, -1, scale=0.5, mask=m), (draw(4, 10), draw(1, 10))),
        "log_softmax causal": (
            lambda x: fastattn.log_softmax(x, -1, is_causal=True).masked_fill(torch.ones(4, 10).triu(1).bool(), 0.0),
            (draw(4, 10),),
        ),
        "gelu": (lambda x, b: fastattn.gelu(x, bias=b), (draw(4, 10), draw(10))),
        "gelu tanh": (lambda x: fastattn.gelu(x, "tanh"), (draw(4, 10),)),
        "gelu sigmoid": (lambda x: fastattn.gelu(x, "sigmoid"), (draw(4, 10),)),
        "silu": (lambda x, b: fastattn.silu(x, bias=b), (draw(4, 10), draw(10))),
        "swiglu": (fastattn.swiglu, (draw(4, 10), draw(4, 10))),
        "cross_entropy": (lambda x: fastattn.cross_entropy(x, target, label_smoothing=0.1), (draw(4, 10),)),
        "linear_cross_entropy": (
            lambda x, w, b: fastattn.linear_cross_entropy(x, w, target, linear_bias=b, label_smoothing=0.1),
            (draw(4, 10), draw(7, 10), draw(7)),
        ),
        "linear_cross_entropy none": (
            lambda x, w: fastattn.linear_cross_entropy(x, w, target, reduction="none"),
            (draw(4, 10), draw(7, 10)),
        ),
        "cross_entropy z_loss softcap": (
            lambda x: fastattn.cross_entropy(x, target, z_loss=0.1, softcap=2.0),
            (draw(4, 10),),
        ),
        "cross_entropy none": (lambda x: fastattn.cross_entropy(x, target, reduction="none"), (draw(4, 10),)),
    }


CALLS = list(calls())


def doubled(tensors):
    return [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in tensors]


def assert_same(backend, found, expected, exact):
    """The same bits; of the reference, which torch's transforms see through to torch's own kernels, whose sums take
    another order for other strides and batches, the law, with `expected` for the peer and exact() for the truth."""
    if backend == "reference":
        for result, peer, truth in zip(found, expected, exact(), strict=True):
            testing.assert_lawful(result.detach(), peer.detach(), truth.detach())
    else:
        assert all(testing.same_bits(a.detach(), b.detach()) for a, b in zip(found, expected, strict=True))


# ---- torch.library ----


@pytest.mark.parametrize(("op", "args", "kwargs"), [pytest.param(*s, id=f"{s[0]}-{i}") for i, s in enumerate(SAMPLES)])
def test_opcheck(op, args, kwargs):
    torch.library.opcheck(op, args, kwargs)


def test_opcheck_sees_every_op():
    seen = {str(op).removeprefix("fastattn.") for op, _, _ in SAMPLES}
    assert seen == {f"{name}{suffix}.{b}" for name, op in OPS.items() for suffix in op.suffixes for b in BACKENDS}


# ---- autograd ----


@pytest.mark.parametrize("name", CALLS)
def test_only_what_asks_for_it_gets_a_gradient(backend, name):
    function, tensors = calls()[name]
    whole = torch.autograd.grad(function(*tensors).sum(), tensors)
    for i, kept in enumerate(tensors):
        alone = [t.detach().requires_grad_(t is kept) for t in tensors]
        function(*alone).sum().backward()
        assert [t.grad is not None for t in alone] == [t is kept for t in tensors]
        assert testing.same_bits(alone[i].grad, whole[i])


@pytest.mark.parametrize("name", CALLS)
def test_gradients_that_flow_in_may_have_any_strides(backend, name):
    function, tensors = calls()[name]
    output = function(*tensors)
    views = [torch.randn(()).expand(output.shape), torch.randn(output.shape[-1:]).expand(output.shape)]
    if output.ndim >= 2:
        views.append(torch.randn(output.transpose(0, -1).shape).transpose(0, -1))
        views.append(torch.randn(*output.shape[:-1], 2 * output.shape[-1])[..., ::2])
    for view in views:
        dense, strided = (
            torch.autograd.grad(output, tensors, flow, retain_graph=True) for flow in (view.contiguous(), view)
        )

        def exact(view=view):
            inputs = doubled(tensors)
            return torch.autograd.grad(function(*inputs), inputs, view.double())

        assert_same(backend, strided, dense, exact)


@pytest.mark.parametrize("name", CALLS)
def test_backward_can_be_repeated_and_then_not(backend, name):
    function, tensors = calls()[name]
    output = function(*tensors).sum()
    first = torch.autograd.grad(output, tensors, retain_graph=True)
    second = torch.autograd.grad(output, tensors)
    assert all(testing.same_bits(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(output, tensors)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_without_gradients(backend, name, context):
    function, tensors = calls()[name]
    with context():
        output = function(*tensors)
    assert not output.requires_grad
    assert testing.same_bits(output.clone(), function(*tensors).detach())


@pytest.mark.parametrize("name", CALLS)
def test_double_backward_of_the_reference(name):
    function, tensors = calls(torch.float64)[name]
    with fastattn.use_backend("reference"):
        assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_double_backward_of_attention_with_everything():
    q, k, v = (t.double().requires_grad_() for t in qkv(1, 4, 5, 3))
    mask = torch.randn(5, 5, dtype=torch.float64).requires_grad_()

    def function(q, k, v, mask):
        k, v = k[:, :2], v[:, :2]
        return sdpa(
            q, k, v, mask, 0.3, True, 0.7, True, causal_alignment="bottom_right", return_lse=True, seed=3,
            backend="reference",
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (q, k, v, mask), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (q, k, v, mask), fast_mode=True)


@pytest.mark.parametrize("name", CALLS)
def test_create_graph_alone_is_no_second_derivative(name, skip_without_native):
    """The fused kernels' own gradients, until somebody differentiates again."""
    function, tensors = calls()[name]
    with fastattn.use_backend("cpu"):
        output = function(*tensors)
        kept = torch.autograd.grad(output, tensors, torch.ones_like(output), create_graph=True)
        again = function(*tensors)
        assert all(
            testing.same_bits(a.detach(), b)
            for a, b in zip(kept, torch.autograd.grad(again, tensors, torch.ones_like(again)), strict=True)
        )


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_reproduces_the_dropout_mask(backend, reentrant):
    q, k, v = qkv(2, 2, 40, 8, requires_grad=True)

    def function(q, k, v):
        return sdpa(q, k, v, dropout_p=0.4) * 2.0

    torch.manual_seed(5)
    plain = torch.autograd.grad(function(q, k, v).sum(), (q, k, v))
    torch.manual_seed(5)
    checkpoint(function, q, k, v, use_reentrant=reentrant).sum().backward()
    assert all(testing.same_bits(t.grad, g) for t, g in zip((q, k, v), plain, strict=True))


def test_the_same_tensor_twice(backend):
    (x, *_) = qkv(2, 3, 11, 8, requires_grad=True)
    one = torch.autograd.grad(sdpa(x, x, x, is_causal=True).square().sum(), x)[0]
    apart = [x.detach().clone().requires_grad_() for _ in range(3)]
    parts = torch.autograd.grad(sdpa(*apart, is_causal=True).square().sum(), apart)
    assert testing.same_bits(one, sum(parts))
    y = torch.randn(5, 8, requires_grad=True)
    total = torch.autograd.grad(fastattn.layer_norm(y, (8,), residual=y).square().sum(), y)[0]
    a, b = y.detach().clone().requires_grad_(), y.detach().clone().requires_grad_()
    parts = torch.autograd.grad(fastattn.layer_norm(a, (8,), residual=b).square().sum(), (a, b))
    assert testing.same_bits(total, sum(parts))


def test_lse_is_the_natural_logarithm_of_the_denominator(backend):
    q, k, v = qkv(2, 3, 7, 8, dtype=torch.bfloat16)
    output, lse = sdpa(q, k, v, is_causal=True, return_lse=True, causal_alignment="bottom_right", scale=0.5)
    scores = (q.double() @ k.double().mT * 0.5).masked_fill(~torch.ones(7, 7).tril().bool(), -torch.inf)
    assert lse.dtype == torch.float32 and lse.shape == (2, 3, 7) and output.dtype == torch.bfloat16
    truth = scores.logsumexp(-1)
    errors = numerics.error(lse, truth), numerics.error(scores.float().logsumexp(-1), truth)
    assert numerics.violation(*errors, torch.float32) is None
    dead = torch.zeros(7, 7, dtype=torch.bool)
    dead[2] = True
    output, lse = sdpa(q, k, v, dead, return_lse=True)
    assert (lse == -torch.inf).sum() == 2 * 3 * 6 and torch.isfinite(lse[:, :, 2]).all()
    assert (output[:, :, [0, 1, 3, 4, 5, 6]] == 0).all()


def test_values_without_columns():
    """Nothing to compute, and it is computed: dims that the cpu backend leaves to the reference."""
    q, k, _ = qkv(2, 3, 7, 8)
    empty = sdpa(q, k, torch.zeros(2, 3, 7, 0), backend="reference")
    assert empty.shape == (2, 3, 7, 0)


# ---- memory ----


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": True}], ids=["full", "causal", "padding"])
def test_extra_memory_of_attention_grows_with_the_length_and_not_its_square(options, skip_without_native):
    """Forward, backward and all results at 32k: a twentieth of one S x S matrix of scores."""

    def extra(length):
        leaves = qkv(1, 1, length, 64, requires_grad=True)
        call = dict(options)
        if "attn_mask" in call:
            call["attn_mask"] = (torch.arange(length) < length // 2).view(1, 1, 1, length)

        def both():
            return torch.autograd.grad(sdpa(*leaves, **call, backend="cpu").sum(), leaves)

        return measure.peak_memory(both)[1]

    extra(64)
    found = {length: extra(length) for length in (8192, 32768)}
    if found[8192] is None:
        pytest.skip("the system does not tell peak memory")
    assert found[32768] < 4.5 * found[8192]
    assert found[32768] < 32768 * 32768 * 4 / 16


# ---- determinism ----


def larger_calls():
    """Enough work that it is shared out among threads."""
    q, k, v = qkv(1, 3, 500, 64, requires_grad=True)
    x, w = torch.randn(1500, 300, requires_grad=True), torch.randn(300, requires_grad=True)
    logits, target = torch.randn(300, 3000, requires_grad=True), torch.randint(3000, (300,))
    mask = torch.randn(1, 3, 500, 1, requires_grad=True)
    return {
        "attention": (lambda q, k, v: sdpa(q, k, v, is_causal=True), (q, k, v)),
        "attention mask": (lambda q, k, v, m: sdpa(q, k, v, m.expand(1, 3, 500, 500)), (q, k, v, mask)),
        "attention dropout": (lambda q, k, v: sdpa(q, k, v, dropout_p=0.2, seed=1), (q, k, v)),
        "attention bfloat16": (
            lambda q, k, v: sdpa(q, k, v),
            tuple(t.detach().bfloat16().requires_grad_() for t in (q, k, v)),
        ),
        "layer_norm": (lambda x, w: fastattn.layer_norm(x, (300,), w, w), (x, w)),
        "rms_norm": (lambda x, w: fastattn.rms_norm(x, (300,), w), (x, w)),
        "add_layer_norm": (
            lambda x, w: sum(fastattn.add_layer_norm(x, x.detach(), (300,), w, w, dropout_p=0.1, seed=3)),
            (x, w),
        ),
        "softmax": (lambda x: fastattn.softmax(x, -1), (x,)),
        "linear": (
            lambda x, w: fastattn.linear(x, w, activation="gelu"),
            (x, torch.randn(700, 300).requires_grad_()),
        ),
        "linear bfloat16": (
            lambda x, w, b: fastattn.linear(x, w, b),
            tuple(torch.randn(s).bfloat16().requires_grad_() for s in ((1500, 301), (130, 301), (130,))),
        ),
        "softmax of columns": (lambda x: fastattn.softmax(x, 0), (x,)),
        "gelu": (lambda x, w: fastattn.gelu(x, bias=w), (x, w)),
        "silu": (lambda x, w: fastattn.silu(x, bias=w), (x, w)),
        "swiglu": (lambda x: fastattn.swiglu(*x.chunk(2, -1)), (x,)),
        "cross_entropy": (lambda x: fastattn.cross_entropy(x, target), (logits,)),
    }


@pytest.mark.parametrize("name", list(larger_calls()))
def test_thread_counts_give_the_same_bits(name, skip_without_native):
    function, tensors = larger_calls()[name]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            with fastattn.use_backend("cpu"):
                output = function(*tensors)
                found.append((output.detach(), *torch.autograd.grad(output.square().sum(), tensors)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(testing.same_bits(a, b) for a, b in zip(found[0], other, strict=True))


def test_neighbours_in_the_batch_do_not_matter(skip_without_native):
    q, k, v = qkv(5, 3, 70, 64)
    x, logits = torch.randn(50, 300), torch.randn(50, 3000)
    target = torch.randint(3000, (50,))
    with fastattn.use_backend("cpu"):
        whole = sdpa(q, k, v, is_causal=True)
        assert all(
            testing.same_bits(whole[i : i + 1], sdpa(q[i : i + 1], k[i : i + 1], v[i : i + 1], is_causal=True))
            for i in range(5)
        )
        assert testing.same_bits(fastattn.softmax(x, -1)[7:9], fastattn.softmax(x[7:9], -1))
        assert testing.same_bits(fastattn.layer_norm(x, (300,))[7:9], fastattn.layer_norm(x[7:9], (300,)))
        assert testing.same_bits(fastattn.linear(x, x)[7:9], fastattn.linear(x[7:9], x))
        losses = fastattn.cross_entropy(logits, target, reduction="none")
        assert testing.same_bits(losses[7:9], fastattn.cross_entropy(logits[7:9], target[7:9], reduction="none"))


def test_calls_from_several_threads_at_once(backend):
    expected = {name: function(*tensors) for name, (function, tensors) in calls().items()}
    wrong = []

    def work():
        for _ in range(20):
            for name, (function, tensors) in calls().items():
                output = function(*tensors)
                output.sum().backward()
                if not testing.same_bits(output.detach(), expected[name].detach()):
                    wrong.append(name)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def exactly(argument):
    """A kernel's argument in float64."""
    if isinstance(argument, torch.Tensor):
        return argument.double() if argument.is_floating_point() else argument
    return torch.float64 if argument in (torch.float32, torch.bfloat16, torch.float16) else argument


@pytest.mark.parametrize(
    "suite_name",
    [
        "attention",
        "layer_norm",
        "rms_norm",
        "add_layer_norm",
        "add_rms_norm",
        "linear",
        "linear_cross_entropy",
        "cross_entropy",
        "softmax",
        "gelu",
        "silu",
        "swiglu",
    ],
)
def test_any_forward_feeds_any_backward(suite_name, skip_without_native):
    """Saved statistics mean the same everywhere: from either's, both backwards keep the law."""
    suite = SUITES[suite_name]
    name = {"attention": "lse mask", "add_layer_norm": "dropout 0.1", "add_rms_norm": "dropout 0.1"}.get(
        suite_name, suite.cases[5].name
    )
    for forward, backward in (("reference", "cpu"), ("cpu", "reference")):
        recorded = testing.recorded_calls(suite, case(suite_name, name), forward)
        for op, args in recorded[1:]:
            packet = getattr(torch.ops.fastattn, op._schema.name.removeprefix("fastattn::"))
            plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
            own, other, truth = (
                result if isinstance(result, tuple) else (result,)
                for result in (
                    getattr(packet, forward)(*plain),
                    getattr(packet, backward)(*plain),
                    packet.reference(*map(exactly, plain)),
                )
            )
            for mine, theirs, exact in zip(other, own, truth, strict=True):
                testing.assert_lawful(mine, theirs, exact)


# ---- autocast ----

AUTOCAST = {
    "attention": (lambda x: sdpa(x, x, x), lambda x: F.scaled_dot_product_attention(x, x, x)),
    "layer_norm": (lambda x: fastattn.layer_norm(x, (8,)), lambda x: F.layer_norm(x, (8,))),
    "rms_norm": (lambda x: fastattn.rms_norm(x, (8,)), lambda x: F.rms_norm(x, (8,))),
    "linear": (lambda x: fastattn.linear(x, x[0, 0]), lambda x: F.linear(x, x[0, 0])),
    "add_layer_norm": (lambda x: fastattn.add_layer_norm(x, x, (8,))[0], lambda x: F.layer_norm(x + x, (8,))),
    "softmax": (lambda x: fastattn.softmax(x, -1), lambda x: F.softmax(x, -1)),
    "log_softmax": (lambda x: fastattn.log_softmax(x, -1), lambda x: F.log_softmax(x, -1)),
    "gelu": (lambda x: fastattn.gelu(x), lambda x: F.gelu(x)),
    "silu": (lambda x: fastattn.silu(x), lambda x: F.silu(x)),
    "swiglu": (lambda x: fastattn.swiglu(x, x), lambda x: F.silu(x) * x),
    "linear_cross_entropy": (
        lambda x: fastattn.linear_cross_entropy(x[0, 0], x[0, 1], torch.arange(5)),
        lambda x: F.cross_entropy(F.linear(x[0, 0], x[0, 1]), torch.arange(5)),
    ),
    "cross_entropy": (
        lambda x: fastattn.cross_entropy(x[0, 0], torch.arange(5)),
        lambda x: F.cross_entropy(x[0, 0], torch.arange(5)),
    ),
}


@pytest.mark.parametrize("name", AUTOCAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_torchs_dtypes(name, dtype, lower):
    ours, torchs = AUTOCAST[name]
    torch.manual_seed(0)
    drawn = [torch.randn(1, 2, 5, 8).to(dtype).requires_grad_() for _ in range(16)]  # a loss is one number
    with torch.autocast("cpu", lower), fastattn.use_backend(None):
        mine, theirs = ([function(x) for x in drawn] for function in (ours, torchs))
    assert mine[0].dtype == theirs[0].dtype and mine[0].shape == theirs[0].shape
    truth = [torchs(x.double()) for x in drawn]
    testing.assert_lawful(*(torch.stack(results).detach() for results in (mine, theirs, truth)))
    mine[0].float().sum().backward()
    assert drawn[0].grad.dtype == dtype


def test_autocast_casts_attention_as_by_hand(backend):
    q, k, v = qkv(2, 3, 17, 8)
    mask = torch.randn(17, 17)
    with torch.autocast("cpu", torch.bfloat16):
        cast = sdpa(q, k.bfloat16(), v, mask)
    by_hand = sdpa(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask.bfloat16())
    assert testing.same_bits(cast, by_hand)


# ---- torch.func ----


@pytest.mark.parametrize("name", CALLS)
def test_func_grad_is_autograds(backend, name):
    function, tensors = calls()[name]

    def autograds(tensors):
        return torch.autograd.grad(function(*tensors).square().sum(), tensors)

    plain = tuple(t.detach() for t in tensors)
    found = torch.func.grad(lambda *ts: function(*ts).square().sum(), argnums=tuple(range(len(plain))))(*plain)
    assert_same(backend, found, autograds(tensors), lambda: autograds(doubled(tensors)))


@pytest.mark.parametrize("name", CALLS)
def test_vmap_and_vmap_of_grad(backend, name):
    """Over every argument at once, and over the first alone; gradients of each element."""
    function, tensors = calls()[name]
    plain = [t.detach() for t in tensors]
    for mapped in (len(plain), 1):
        many = [torch.stack([t, t * 0.5, t - 1.0]) if i < mapped else t for i, t in enumerate(plain)]
        in_dims = tuple(0 if i < mapped else None for i in range(len(plain)))
        rows = [[t[n] if i < mapped else t for i, t in enumerate(many)] for n in range(3)]
        gradient = torch.func.grad(lambda *ts: function(*ts).square().sum())
        for call in (function, gradient):

            def by_loop(convert, rows=rows, call=call):
                return [torch.stack([call(*convert(row)) for row in rows])]

            found = [torch.vmap(call, in_dims)(*many)]
            assert_same(backend, found, by_loop(list), lambda by_loop=by_loop: by_loop(doubled))


def test_vmap_over_other_dims_and_twice(backend):
    tensors = qkv(3, 2, 4, 6, 8)

    def causal(q, k, v):
        return sdpa(q, k, v, is_causal=True)

    found = torch.vmap(causal, in_dims=(1, 1, 1), out_dims=1)(*tensors)
    assert_same(backend, [found], [causal(*tensors)], lambda: [causal(*doubled(tensors))])
    twice = torch.vmap(torch.vmap(sdpa))(*tensors)
    assert_same(backend, [twice], [sdpa(*tensors)], lambda: [sdpa(*doubled(tensors))])


@pytest.mark.parametrize("name", ["attention", "layer_norm", "softmax", "cross_entropy"])
def test_jacobians(backend, name):
    function, tensors = calls()[name]
    plain = [t.detach()[:1] if t.ndim == 4 else t.detach() for t in tensors]

    def jacobian(transform, first, *rest):
        return [transform(lambda x: function(x, *rest))(first)]

    def autograds(of_first):
        return lambda x: torch.autograd.functional.jacobian(of_first, x)

    found, expected = (jacobian(transform, *plain) for transform in (torch.func.jacrev, autograds))
    assert_same(backend, found, expected, lambda: jacobian(autograds, *doubled(plain)))


def test_hessians_of_the_reference():
    x = torch.randn(4, 6, dtype=torch.float64)

    def function(x):
        return fastattn.softmax(x, -1, backend="reference").square().sum()

    def plain(x):
        return torch.softmax(x, -1).square().sum()

    found, expected = (torch.func.jacrev(torch.func.jacrev(f))(x) for f in (function, plain))
    testing.assert_lawful(found, expected, expected)


def test_randomness_under_vmap(backend):
    """torch.vmap's own word decides whether dropout may differ between elements."""
    q, k, v = qkv(4, 1, 2, 30, 8)

    def function(q, k, v):
        return sdpa(q, k, v, dropout_p=0.5)

    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(function)(q, k, v)
    same = torch.vmap(function, randomness="same")(q[:1].expand_as(q), k[:1].expand_as(k), v[:1].expand_as(v))
    assert all(torch.equal(same[0], other) for other in same[1:])


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("gradients", [True, False])
def test_derivatives_in_forward_mode_are_refused_and_not_lost(gradients):
    x = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    with forward_ad.dual_level(), torch.set_grad_enabled(gradients):
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        for call in (
            lambda x: fastattn.softmax(x, -1),
            lambda x: fastattn.layer_norm(x, (8,)),
            lambda x: fastattn.scaled_dot_product_attention(x, x, x),
            lambda x: fastattn.gelu(x),
        ):
            with pytest.raises(RuntimeError, match="no derivative in forward mode"):
                call(dual)
            call(x)
        found = forward_ad.unpack_dual(fastattn.softmax(dual, -1, backend="reference")).tangent
        assert torch.equal(found, forward_ad.unpack_dual(torch.softmax(dual, -1)).tangent)
    with pytest.raises(NotImplementedError, match="jvp"):  # torch's own words
        torch.func.jvp(lambda x: fastattn.softmax(x, -1), (x,), (x,))
