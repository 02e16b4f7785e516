"""Transformer layers and stacks against torch's."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn.nn
from fastattn.dispatch import reset_served, served
from fastattn.nn.served import listening

N, L, S, E, H, FF = 2, 9, 11, 32, 4, 48
CAUSAL = nn.Transformer.generate_square_subsequent_mask

LAYERS = {
    "encoder": (fastattn.nn.TransformerEncoderLayer, nn.TransformerEncoderLayer),
    "decoder": (fastattn.nn.TransformerDecoderLayer, nn.TransformerDecoderLayer),
}


def drawn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stirred(module):
    """Initial biases are 0 and scales 1, which would hide what is done with them."""
    torch.manual_seed(2)
    for parameter in module.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5, 0.2)
    return module


def pair(kind, **options):
    torch.manual_seed(0)
    options = {"dim_feedforward": FF, "dropout": 0.0, **options}
    ours, theirs = LAYERS[kind]
    return ours(E, H, **options), stirred(theirs(E, H, **options))


def inputs(kind, batch_first):
    shapes = [(N, L, E), (N, S, E)] if batch_first else [(L, N, E), (S, N, E)]
    return [drawn(*shape, seed=i) for i, shape in enumerate(shapes)][: 1 if kind == "encoder" else 2]


def in_inference(module, *tensors):
    with torch.inference_mode():
        return module.eval()(*tensors)


def padding(length=L):
    return torch.arange(length) >= torch.tensor([[length - 4], [length]])


OPTIONS = [
    {}, {"batch_first": True}, {"norm_first": True}, {"norm_first": True, "batch_first": True, "activation": "gelu"},
    {"activation": F.silu}, {"activation": nn.GELU("tanh")}, {"bias": False}, {"layer_norm_eps": 0.1},
]  # fmt: skip


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: str(options).split(" at 0x")[0])
@pytest.mark.parametrize("masked", [False, True])
def test_layers(hold_to_torch, kind, options, masked):
    ours, theirs = pair(kind, **options)
    arguments = {}
    if masked and kind == "encoder":
        arguments = {"src_mask": CAUSAL(L) < 0, "src_key_padding_mask": padding()}
    elif masked:
        arguments = {"tgt_mask": CAUSAL(L) < 0, "tgt_is_causal": True, "memory_key_padding_mask": padding(S)}
    hold_to_torch(ours, theirs, inputs(kind, options.get("batch_first", False)), arguments)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("norm_first", [False, True])
def test_layers_in_bfloat16(hold_to_torch, kind, norm_first):
    ours, theirs = pair(kind, norm_first=norm_first, batch_first=True)
    hold_to_torch(ours, theirs, inputs(kind, True), dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", LAYERS)
def test_unbatched(hold_to_torch, kind):
    ours, theirs = pair(kind)
    hold_to_torch(ours, theirs, [t[:, 0].clone() for t in inputs(kind, False)])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("norm_first", [False, True])
def test_inference_is_ours_too(hold_calls, kind, norm_first):
    """torch has a kernel of its own for encoder layers in inference; ours is the same path as in training."""
    ours, theirs = pair(kind, norm_first=norm_first, batch_first=True)
    tensors = inputs(kind, True)
    hold_calls(in_inference, ours, theirs, *tensors)
    trained = ours.train()(*tensors)
    reset_served()
    assert torch.equal(in_inference(ours, *tensors), trained)
    assert set(served()) == {"cpu"} and served()["cpu"] >= 3


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("norm_first", [False, True])
def test_dropout_is_of_training_only(hold_calls, kind, norm_first):
    ours, theirs = pair(kind, norm_first=norm_first, dropout=0.5, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    tensors = inputs(kind, True)
    a, b = ours(*tensors), ours(*tensors)
    assert not torch.equal(a, b)
    torch.manual_seed(3)
    again = ours(*tensors)
    torch.manual_seed(3)
    assert torch.equal(ours(*tensors), again)
    hold_calls(lambda module, *tensors: module.eval()(*tensors), ours, theirs, *tensors)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("part", ["self_attn", "linear1", "norm2", "dropout1"])
def test_hooks_of_parts_are_called(hold_calls, kind, training, part):
    ours, theirs = (module.train(training) for module in pair(kind, batch_first=True))
    calls, heard = [], []
    handle = getattr(ours, part).register_forward_hook(lambda *args: calls.append(part))
    with torch.no_grad(), listening(lambda module, reason: heard.append(reason)):
        hold_calls(nn.Module.__call__, ours, theirs, *inputs(kind, True))
    assert calls == [part]
    assert part == "self_attn" or any(part in reason for reason in heard)
    handle.remove()
    ours(*inputs(kind, True))
    assert calls == [part]


@pytest.mark.parametrize("kind", LAYERS)
def test_parts_that_were_replaced_are_called(hold_calls, kind):
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    ours, theirs = pair(kind, batch_first=True)
    for module in (ours, theirs):
        module.linear1.__class__ = Doubled
        module.norm2 = nn.RMSNorm(E)
    tensors = inputs(kind, True)
    hold_calls(nn.Module.__call__, ours, theirs, *tensors)
    with torch.no_grad():  # where torch's own layer forgets about replaced parts
        hold_calls(nn.Module.__call__, ours.eval(), theirs.train(), *tensors)


def stacks(**options):
    options = {"dim_feedforward": FF, "dropout": 0.0, "batch_first": True, **options}
    torch.manual_seed(0)
    theirs = stirred(nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, **options), 2, nn.LayerNorm(E)))
    ours = fastattn.nn.TransformerEncoder(
        fastattn.nn.TransformerEncoderLayer(E, H, **options), 2, fastattn.nn.LayerNorm(E)
    )
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padded_batches_are_packed_for_inference(activation, dtype):
    ours, theirs = (module.to(dtype).eval() for module in stacks(activation=activation))
    x, heard = drawn(N, L, E).to(dtype), []
    reset_served()
    with torch.inference_mode(), listening(lambda module, reason: heard.append(reason)):
        found = ours(x, src_key_padding_mask=padding())
        expected = theirs(x, src_key_padding_mask=padding())
        truth = copy.deepcopy(theirs).double()(x.double(), src_key_padding_mask=padding())
    assert heard == [] and set(served()) == {"cpu"}
    assert found[0, -4:].eq(ours.norm.bias).all()  # as torch's: padding comes out as zeros, then normalised
    fastattn.testing.assert_lawful(found, expected, truth)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_that_are_torchs(hold_calls):
    ours, theirs = (module.eval() for module in stacks())
    ours.layers[0].self_attn.register_forward_hook(lambda *args: None)
    heard = []

    def of_nested(layer, *rows):
        return in_inference(layer, torch.nested.nested_tensor(list(rows))).values()

    with listening(lambda module, reason: heard.append((type(module).__name__, reason))):
        for mine, other in zip(ours.layers, theirs.layers, strict=True):
            hold_calls(of_nested, mine, other, drawn(3, E), drawn(5, E))
    assert heard[0] == ("TransformerEncoderLayer", "self_attn has hooks, or is not fastattn's")
    assert {reason for _, reason in heard[1:]} == {"nested tensors are torch's"}


@pytest.mark.parametrize("causal", [None, True])
def test_encoder_stack(hold_to_torch, causal):
    ours, theirs = stacks(norm_first=True)
    hold_to_torch(ours, theirs, [drawn(N, L, E)], {"mask": CAUSAL(L) < 0, "is_causal": causal})


@pytest.mark.parametrize("batch_first", [False, True])
def test_transformer(hold_to_torch, batch_first):
    options = {"num_encoder_layers": 1, "num_decoder_layers": 2, "dim_feedforward": FF, "dropout": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(4)
        ours = fastattn.nn.Transformer(E, H, batch_first=batch_first, **options)
        torch.manual_seed(4)
        theirs = nn.Transformer(E, H, batch_first=batch_first, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert type(ours.decoder.layers[1].multihead_attn) is fastattn.nn.MultiheadAttention
    assert type(ours.encoder.norm) is fastattn.nn.LayerNorm
    source, target = inputs("decoder", batch_first)
    arguments = {"tgt_mask": CAUSAL(S) < 0, "src_key_padding_mask": padding(), "memory_key_padding_mask": padding()}
    hold_to_torch(ours, stirred(theirs), [source, target], arguments)


def test_custom_parts_of_a_transformer_stay_what_they_are():
    mine = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, batch_first=True), 1)
    model = fastattn.nn.Transformer(E, H, 1, 1, FF, 0.1, "relu", mine, batch_first=True)
    assert model.encoder is mine and type(mine.layers[0]) is nn.TransformerEncoderLayer
    assert type(model.decoder.layers[0]) is fastattn.nn.TransformerDecoderLayer


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("norm_first", [False, True])
def test_compiled_in_one_graph(hold_to_torch, kind, norm_first):
    ours, theirs = pair(kind, norm_first=norm_first, batch_first=True, activation="gelu")
    ours.compile(fullgraph=True, backend="aot_eager")
    hold_to_torch(ours, theirs, inputs(kind, True))


@pytest.mark.parametrize("kind", LAYERS)
def test_autocast(hold_calls, kind):
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 alone
        hold_calls(nn.Module.__call__, *pair(kind, batch_first=True), *inputs(kind, True))


@pytest.mark.parametrize("kind", LAYERS)
def test_exported(kind):
    ours, _ = pair(kind, batch_first=True)
    program = torch.export.export(ours.eval(), tuple(inputs(kind, True)))
    names = {str(node.target) for node in program.graph.nodes}
    assert "fastattn.attention.cpu" in names and "fastattn.add_layer_norm.cpu" in names
    assert torch.equal(program.module()(*inputs(kind, True)), ours(*inputs(kind, True)))
