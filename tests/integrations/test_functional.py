"""accelerate(): what it serves, what it leaves, that it is gone afterwards, whatever happened inside."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import dispatch, testing
from fastattn.integrations import functional

NAMES = list(functional._OURS)


def x(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def calls(dtype=torch.float32):
    """name -> (arguments, keywords, places of the differentiated ones)"""
    torch.manual_seed(0)
    sides = [x(2, 4, 9, 16, dtype=dtype) for _ in range(3)]
    return {
        "scaled_dot_product_attention": (sides, {"attn_mask": torch.rand(9, 9) > 0.3, "scale": 0.3}),
        "layer_norm": ([x(6, 32, dtype=dtype), (32,), x(32, dtype=dtype), x(32, dtype=dtype), 1e-6], {}),
        "rms_norm": ([x(6, 32, dtype=dtype), (32,), x(32, dtype=dtype)], {}),
        "softmax": ([x(6, 32, dtype=dtype), -1], {}),
        "log_softmax": ([x(6, 32, dtype=dtype), 0], {"dtype": torch.float32}),
        "cross_entropy": ([x(6, 32, dtype=dtype), torch.arange(6)], {"label_smoothing": 0.1, "reduction": "sum"}),
        "gelu": ([x(6, 32, dtype=dtype)], {"approximate": "tanh"}),
        "silu": ([x(6, 32, dtype=dtype)], {}),
        "linear": ([x(640, 64, dtype=dtype), x(64, 64, dtype=dtype), x(64, dtype=dtype)], {}),
    }


def run(name, arguments, keywords):
    output = getattr(F, name)(*arguments, **keywords)
    leaves = [a for a in arguments if torch.is_tensor(a) and a.requires_grad]
    return [output, *torch.autograd.grad(output.sum(), leaves)]


@pytest.mark.parametrize("name", NAMES)
def test_served(name, skip_without_native):
    arguments, keywords = calls()[name]
    expected = run(name, arguments, keywords)
    with fastattn.accelerate() as report:
        found = run(name, arguments, keywords)
    if name == "linear" and report.counts.left:
        assert "torch's product is the faster one" in str(report)
    else:
        assert report.counts.served == {name: 1} and not report.counts.left
    exact = [a.detach().double().requires_grad_() if torch.is_tensor(a) and a.requires_grad else a for a in arguments]
    truth = run(name, exact, {**keywords, "dtype": torch.float64} if "dtype" in keywords else keywords)
    for result, peer, true in zip(found, expected, truth, strict=True):
        testing.assert_lawful(result, peer, true)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_gives_the_same_dtypes(name, skip_without_native):
    arguments, keywords = calls(torch.bfloat16)[name]
    with torch.autocast("cpu", torch.bfloat16):
        expected = getattr(F, name)(*arguments, **keywords)
        with fastattn.accelerate():
            found = getattr(F, name)(*arguments, **keywords)
    assert found.dtype == expected.dtype


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_served_is_torchs_and_counted(name):
    arguments, keywords = calls(torch.float64)[name]
    if name == "log_softmax":
        keywords = {}
    expected = run(name, arguments, keywords)
    with fastattn.accelerate() as report:
        found = run(name, arguments, keywords)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not report.counts.served
    assert list(report.counts.left) == [(name, "has no kernel for torch.float64: float32, bfloat16, float16")]


@pytest.mark.parametrize(
    ("name", "call", "reason"),
    [
        ("softmax", lambda: F.softmax(torch.randn(3, 4)), "without a dim"),
        ("cross_entropy", lambda: F.cross_entropy(torch.randn(3, 4), torch.arange(3), size_average=False), "reduce"),
        ("scaled_dot_product_attention",
         lambda: F.scaled_dot_product_attention(*(torch.randn(1, 1, 2, 600) for _ in range(3))), "head dims are 1 to"),
        ("rms_norm", lambda: F.rms_norm(torch.randn(3, 4).bfloat16(), (4,), torch.ones(4)), "torch's to choose"),
        ("gelu", lambda: torch.func.vmap(F.gelu)(torch.randn(3, 4)), "transform of torch.func"),
        ("gelu", lambda: F.gelu(torch.randn(3, 4, device="meta")), "no kernels for meta"),
        ("silu", lambda: F.silu(torch.randn(3), inplace=True), "in place"),
        ("softmax", lambda: torch.jit.trace(lambda t: F.softmax(t, -1), torch.randn(3)), "torch.jit"),
        ("linear", lambda: F.linear(torch.randn(64), torch.randn(64, 64)), "faster"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_left_with_a_reason(name, call, reason, skip_without_native):
    with fastattn.accelerate() as report:
        call()
    assert [of for of, why in report.counts.left if reason in why] == [name], str(report)


def test_errors_are_torchs():
    with fastattn.accelerate(), pytest.raises(RuntimeError, match="normalized_shape"):
        F.layer_norm(torch.randn(3, 4), (5,))


def test_forward_mode_is_torchs():
    import torch.autograd.forward_ad as ad

    with fastattn.accelerate(), ad.dual_level():
        dual = ad.make_dual(torch.randn(3), torch.ones(3))
        assert ad.unpack_dual(F.gelu(dual)).tangent is not None


# ---- coming and going ----


def torchs():
    return {name: getattr(F, name) for name in NAMES}


TORCHS = torchs()


def test_restored_whatever_happens():
    with pytest.raises(ZeroDivisionError), fastattn.accelerate():
        assert F.gelu is functional.gelu
        _ = 1 / 0
    assert torchs() == TORCHS

    @fastattn.accelerate()
    def recursive(depth):
        assert F.gelu is functional.gelu
        if depth:
            recursive(depth - 1)
        elif depth == 0:
            raise KeyError

    with pytest.raises(KeyError):
        recursive(3)
    assert torchs() == TORCHS


def test_nested_and_from_threads():
    with fastattn.accelerate():
        with fastattn.accelerate():
            pass
        assert F.gelu is functional.gelu
    assert torchs() == TORCHS
    inside, release = threading.Barrier(5), threading.Event()
    seen = []

    def work():
        with fastattn.accelerate():
            inside.wait()
            release.wait()
            seen.append(F.linear is functional.linear)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    inside.wait()
    assert F.linear is functional.linear  # process-wide
    release.set()
    for thread in threads:
        thread.join()
    assert seen == [True] * 4 and torchs() == TORCHS


def test_what_others_put_there_meanwhile_stays(monkeypatch):
    def theirs(input, **_):
        return input

    with fastattn.accelerate():
        monkeypatch.setattr(F, "gelu", theirs)
    assert F.gelu is theirs
    monkeypatch.undo()
    F.gelu = TORCHS["gelu"]
    assert torchs() == TORCHS


def test_functions_that_were_bound_inside_are_torchs_outside():
    with fastattn.accelerate():
        layer = torch.nn.TransformerEncoderLayer(16, 2, 32, activation=F.gelu)
    assert layer.activation is functional.gelu
    copied = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    values = torch.randn(3, 4)
    before = functional.left_to_torch.counts()
    assert torch.equal(copied.activation(values), TORCHS["gelu"](values))
    assert functional.left_to_torch.counts() == before


def test_a_forced_backend_is_forced():
    """And plain torch inside of it does not come back here."""
    arguments = {name: call for name, call in calls().items() if name != "cross_entropy"}
    with fastattn.use_backend("reference"), fastattn.accelerate() as report:
        dispatch.reset_served()
        for name, (positional, keywords) in arguments.items():
            getattr(F, name)(*positional, **keywords)
    assert dispatch.served() == {"reference": len(arguments)} and not report.counts.left


# ---- models ----


def test_modules(skip_without_native):
    torch.manual_seed(0)
    model = torch.nn.TransformerDecoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    target, memory = torch.randn(2, 9, 64), torch.randn(2, 7, 64)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(9)
    padding = torch.arange(7) >= torch.tensor([7, 4])[:, None]
    call = {"tgt_mask": mask, "memory_key_padding_mask": padding}
    expected = model(target, memory, **call)
    with fastattn.accelerate() as report:
        found = model(target, memory, **call)
    exact = {"tgt_mask": mask.double(), "memory_key_padding_mask": padding}
    truth = copy.deepcopy(model).double()(target.double(), memory.double(), **exact)
    testing.assert_lawful(found.detach(), expected.detach(), truth.detach())
    assert report.counts.served["scaled_dot_product_attention"] == 2 and report.counts.served["layer_norm"] == 3


def test_jagged_and_causal():
    rows = torch.randn(12, 2, 8)
    side = torch.nested.nested_tensor_from_jagged(rows, torch.tensor([0, 5, 12])).transpose(1, 2)
    with fastattn.accelerate() as report:
        output = F.scaled_dot_product_attention(side, side, side, is_causal=True)
    assert output.shape == side.shape and report.counts.served == {"scaled_dot_product_attention": 1}


def test_compiled_inside_and_outside(skip_without_native):
    """The graph is made anew on the way in and out, and holds ours in between; nesting costs no compilation."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append({str(n.target) for n in graph.graph.nodes if n.op == "call_function"})
        return graph.forward

    def call(q, w, target):
        y = F.gelu(F.layer_norm(F.scaled_dot_product_attention(q, q, q, is_causal=True), (16,), w))
        y = F.rms_norm(F.softmax(F.linear(y, w.outer(w)), -1), (16,))
        return F.cross_entropy(y.flatten(0, 2), target)

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    arguments = torch.randn(1, 2, 5, 16), x(16), torch.arange(10)
    expected = compiled(*arguments)
    truth = call(*(t.double() for t in arguments[:2]), arguments[2])
    with fastattn.accelerate():
        testing.assert_lawful(compiled(*arguments).detach(), expected.detach(), truth.detach())
        with fastattn.accelerate():
            compiled(*arguments)
    assert torch.equal(compiled(*arguments), expected)
    outside, inside = graphs
    assert not any("fastattn" in name for name in outside)
    ops = {name.split(".")[1] for name in inside if name.startswith("fastattn")}
    # Whose linear is the faster one differs between machines.
    assert ops - {"linear"} == {"attention", "layer_norm", "rms_norm", "softmax", "gelu", "cross_entropy"}


def test_explained():
    with fastattn.accelerate():
        F.gelu(torch.randn(3, dtype=torch.float64))
        text = str(fastattn.explain(fastattn.gelu, torch.randn(3)))
        assert "torch.nn.functional.gelu comes here" in text and "left to torch" in text
    assert "comes here" not in str(fastattn.explain(fastattn.gelu, torch.randn(3)))
