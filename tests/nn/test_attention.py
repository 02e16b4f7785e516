"""MultiheadAttention against torch's: every argument, outputs, probabilities, gradients of everything."""

import itertools

import pytest
import torch
from torch import nn

import fastattn.nn
from fastattn.dispatch import BackendUnsupported, reset_served, served
from fastattn.nn.served import listening

N, L, S, E, H = 2, 9, 12, 32, 4
CAUSAL = nn.Transformer.generate_square_subsequent_mask


def pair(**options):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, H, **options)
    if theirs.in_proj_bias is not None:
        nn.init.normal_(theirs.in_proj_bias)
        nn.init.normal_(theirs.out_proj.bias)
    return fastattn.nn.MultiheadAttention(E, H, **options), theirs


def inputs(batch_first=False, batched=True, *, kdim=E, vdim=E, same=False, queries=L, keys=S):
    generator = torch.Generator().manual_seed(1)

    def draw(length, width):
        shape = (length, width) if not batched else (N, length, width) if batch_first else (length, N, width)
        return torch.randn(shape, generator=generator)

    query = draw(queries, E)
    if same == "self":
        return [query] * 3
    key = draw(keys, kdim)
    return [query, key, key] if same == "memory" else [query, key, draw(keys, vdim)]


def padding(keys=S, batched=True):
    mask = torch.arange(keys) >= torch.tensor([[keys - 5], [keys]])
    return mask if batched else mask[0]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("same", [False, "memory", "self"])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs(hold_to_torch, batch_first, same, need_weights, dtype):
    ours, theirs = pair(batch_first=batch_first)
    reset_served()
    hold_to_torch(ours, theirs, inputs(batch_first, same=same), {"need_weights": need_weights}, dtype)
    assert served().get("cpu", 0) > 0


@pytest.mark.parametrize("options", [
    {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True},
    {"kdim": 20}, {"vdim": 24}, {"kdim": 20, "vdim": 24, "bias": False, "add_bias_kv": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_options(hold_to_torch, options, batch_first, masked, need_weights):
    ours, theirs = pair(batch_first=batch_first, **options)
    tensors = inputs(batch_first, kdim=options.get("kdim", E), vdim=options.get("vdim", E))
    arguments = {"need_weights": need_weights}
    if masked:
        arguments |= {"key_padding_mask": padding(), "attn_mask": torch.rand(L, S) < 0.3}
        arguments["attn_mask"][:, 0] = False
    hold_to_torch(ours, theirs, tensors, arguments)


def masks():
    torch.manual_seed(3)
    hidden = torch.rand(L, S) < 0.3
    hidden[:, 0] = False
    each = (torch.rand(N * H, L, S) < 0.3) & (torch.arange(S) > 0)
    bias, biases = torch.randn(L, S), torch.randn(N * H, L, S)
    inf = hidden.float().masked_fill(hidden, -torch.inf)
    pad_bias = torch.zeros(N, S).masked_fill(padding(), -torch.inf)
    yield from {
        "bool": {"attn_mask": hidden},
        "bool of each head": {"attn_mask": each},
        "additive": {"attn_mask": bias},
        "additive of each head": {"attn_mask": biases},
        "additive, -inf": {"attn_mask": inf},
        "padding": {"key_padding_mask": padding()},
        "additive padding": {"key_padding_mask": pad_bias},
        "bool and padding": {"attn_mask": hidden, "key_padding_mask": padding()},
        "bool of each head and padding": {"attn_mask": each, "key_padding_mask": padding()},
        "additive and additive padding": {"attn_mask": bias, "key_padding_mask": pad_bias},
    }.items()


@pytest.mark.parametrize(
    ("name", "arguments"), list(masks()), ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize("average", [None, False, True])
def test_masks(hold_to_torch, name, arguments, average):
    ours, theirs = pair(batch_first=True)
    weights = {"need_weights": average is not None, "average_attn_weights": bool(average)}
    hold_to_torch(ours, theirs, inputs(True), {**arguments, **weights})


@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_bool_mask_with_additive_padding(hold_to_torch):
    ours, theirs = pair()
    arguments = {"attn_mask": torch.ones(L, S, dtype=torch.bool).triu(1), "key_padding_mask": torch.randn(N, S)}
    hold_to_torch(ours, theirs, inputs(), {**arguments, "need_weights": False})


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_causal_hint(hold_to_torch, padded, need_weights):
    ours, theirs = pair(batch_first=True)
    arguments = {"attn_mask": CAUSAL(L) < 0, "is_causal": True, "need_weights": need_weights}
    if padded:
        arguments["key_padding_mask"] = padding(L)
    hold_to_torch(ours, theirs, inputs(True, same="self"), arguments)


def test_a_mask_that_wants_gradients_gets_them_in_spite_of_the_causal_hint():
    ours, _ = pair(batch_first=True)
    mask = CAUSAL(L).requires_grad_()
    ours(*inputs(True, same="self"), attn_mask=mask, is_causal=True, need_weights=False)[0].sum().backward()
    assert mask.grad.tril().ne(0).any()


@pytest.mark.parametrize("need_weights", [False, True])
def test_added_keys_are_seen_in_spite_of_the_causal_hint(need_weights):
    ours, _ = pair(batch_first=True, add_bias_kv=True)
    tensors = inputs(True, same="self")
    hinted = ours(*tensors, attn_mask=CAUSAL(L), is_causal=True, need_weights=need_weights)[0]
    assert torch.equal(hinted, ours(*tensors, attn_mask=CAUSAL(L), need_weights=need_weights)[0])


@pytest.mark.parametrize("masked", [None, "shared", "each"])
@pytest.mark.parametrize(("need_weights", "average"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched(hold_to_torch, masked, need_weights, average, batch_first):
    ours, theirs = pair(batch_first=batch_first)
    arguments = {"need_weights": need_weights, "average_attn_weights": average}
    if masked:
        mask = torch.randn(L, S) if masked == "shared" else torch.randn(H, L, S)
        arguments |= {"attn_mask": mask, "key_padding_mask": torch.zeros(S).masked_fill(padding()[0], -torch.inf)}
    hold_to_torch(ours, theirs, inputs(batched=False), arguments)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"kdim": E + 1, "batch_first": True}], ids=str)
def test_inference_equals_training(hold_calls, need_weights, options):
    """torch's fast path for inference has no counterpart: what there is, is fast."""
    ours, theirs = pair(**options)
    tensors = inputs(options.get("batch_first", False), kdim=options.get("kdim", E))

    def inference(module, *tensors):
        with torch.inference_mode():
            return module.eval()(*tensors, need_weights=need_weights)[0]

    hold_calls(inference, ours, theirs, *tensors)
    assert torch.equal(inference(ours, *tensors), ours.train()(*tensors, need_weights=need_weights)[0])


@pytest.mark.parametrize("need_weights", [False, True])
def test_rows_that_see_nothing_are_zero_and_have_no_gradient(need_weights):
    ours, _ = pair(batch_first=True)
    query, key, value = (t.requires_grad_() for t in inputs(True))
    hidden = torch.zeros(N, S, dtype=torch.bool)
    hidden[1] = True
    output, weights = ours(query, key, value, key_padding_mask=hidden, need_weights=need_weights)
    assert torch.equal(output[1], ours.out_proj.bias.expand(L, E))
    if need_weights:
        assert weights[1].eq(0).all()
    output.sum().backward()
    assert all(t.grad[1].eq(0).all() for t in (query, key, value)) and key.grad[0].abs().sum() > 0


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_is_of_probabilities_and_of_training_only(need_weights):
    torch.manual_seed(0)
    ours = fastattn.nn.MultiheadAttention(E, H, dropout=0.5, batch_first=True)
    x = torch.randn(4, 64, E)
    exact = ours.eval()(x, x, x, need_weights=False)[0]
    ours.train()
    drawn = [ours(x, x, x, need_weights=need_weights) for _ in range(64)]
    assert not torch.equal(drawn[0][0], drawn[1][0])
    mean = torch.stack([output for output, _ in drawn]).mean(0)
    assert (mean - exact).norm() < 0.2 * (drawn[0][0] - exact).norm()
    if need_weights:
        assert 0.4 < torch.stack([w for _, w in drawn]).eq(0).float().mean() ** (1 / H) < 0.6
    torch.manual_seed(5)
    again = ours(x, x, x, need_weights=need_weights)[0]
    torch.manual_seed(5)
    assert torch.equal(ours(x, x, x, need_weights=need_weights)[0], again)


@pytest.mark.parametrize("need_weights", [False, True])
def test_autocast(hold_calls, need_weights):
    def call(module, *tensors):
        return module(*tensors, need_weights=need_weights)

    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 alone
        hold_calls(call, *pair(batch_first=True), *inputs(True))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_compiled_in_one_graph(hold_to_torch, need_weights, batch_first):
    ours, theirs = pair(batch_first=batch_first)
    ours.compile(fullgraph=True, backend="aot_eager")
    arguments = {"need_weights": need_weights, "key_padding_mask": padding(L)}
    hold_to_torch(ours, theirs, inputs(batch_first, same="self"), arguments)


def test_state_and_classes():
    ours, theirs = pair(add_bias_kv=True)
    assert isinstance(ours, nn.MultiheadAttention)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.manual_seed(11)
    a = fastattn.nn.MultiheadAttention(E, H, dtype=torch.bfloat16, device="cpu")
    torch.manual_seed(11)
    b = nn.MultiheadAttention(E, H, dtype=torch.bfloat16, device="cpu")
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert fastattn.nn.MultiheadAttention(E, H, device="meta").in_proj_weight.is_meta


BAD = {
    "embedding": lambda m, q, k, v: m(q[..., :-1], k, v),
    "values of other keys": lambda m, q, k, v: m(q, k, v[:-1]),
    "dimensions": lambda m, q, k, v: m(q[None], k, v),
    "mask shape": lambda m, q, k, v: m(q, k, v, attn_mask=torch.zeros(L, S + 1)),
    "mask dtype": lambda m, q, k, v: m(q, k, v, attn_mask=torch.zeros(L, S, dtype=torch.int64)),
    "padding shape": lambda m, q, k, v: m(q, k, v, key_padding_mask=torch.zeros(N, S + 1)),
    "hint without mask": lambda m, q, k, v: m(q, k, v, is_causal=True, need_weights=False),
    "dtype": lambda m, q, k, v: m(q.double(), k.double(), v.double()),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_torchs_errors(name):
    errors = []
    for module in pair():
        with pytest.raises((RuntimeError, AssertionError)) as caught:
            BAD[name](module, *inputs())
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


def test_float64_is_torchs_and_strict_modules_say_no():
    ours, theirs = (module.double() for module in pair())
    ours.load_state_dict(theirs.state_dict())
    tensors = [t.double() for t in inputs()]
    heard = []
    with listening(lambda module, reason: heard.append((module, reason))):
        assert torch.equal(ours(*tensors)[0], theirs(*tensors)[0])
    assert heard == [(ours, "has no kernel for torch.float64: float32, bfloat16, float16")]
    ours.fastattn_strict = True
    with pytest.raises(BackendUnsupported, match="float64"):
        ours(*tensors)


def test_a_forced_backend_is_forced():
    ours, _ = pair()
    tensors = inputs()
    reset_served()
    with fastattn.use_backend("reference"):
        ours(*tensors, need_weights=False)
    assert set(served()) == {"reference"}


def test_heads_wider_than_the_kernels_take_are_torchs():
    torch.manual_seed(0)
    ours = fastattn.nn.MultiheadAttention(1040, 2, batch_first=True)
    x, heard = torch.randn(1, 3, 1040), []
    with listening(lambda module, reason: heard.append(reason)):
        ours(x, x, x, need_weights=False)
    assert len(heard) == 1 and "512" in heard[0]


def test_second_derivative(hold_calls):
    def of_gradient(module, *tensors):
        tensors = [t.requires_grad_() for t in tensors]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            output = module(*tensors, need_weights=False)[0]
            gradient = torch.autograd.grad(output.square().sum(), tensors[0], create_graph=True)[0]
            return torch.autograd.grad(gradient.square().sum(), tensors)

    hold_calls(of_gradient, *pair(batch_first=True), *inputs(True))


def test_every_combination_of_flags_agrees_with_torch(hold_to_torch):
    """What is not compared case by case above: layouts, weights, masks and added keys, all with all."""
    flags = itertools.product([False, True], repeat=5)
    for batch_first, bias_kv, zero, need_weights, padded in flags:
        ours, theirs = pair(batch_first=batch_first, add_bias_kv=bias_kv, add_zero_attn=zero)
        arguments = {"need_weights": need_weights, "attn_mask": torch.ones(L, L, dtype=torch.bool).triu(1)}
        if padded:
            arguments["key_padding_mask"] = padding(L)
        hold_to_torch(ours, theirs, inputs(batch_first, same="self"), arguments)
