"""patch: the cross entropy in a model's loss_function is ours; all else about the loss is Transformers'."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers

import fastattn
from fastattn import testing
from fastattn.dispatch import BackendUnsupported
from fastattn.integrations.transformers import loss
from fastattn.integrations.transformers.loss import LossFunction

V, LENGTH = 61, 12
TEXT = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
CONFIGS = {
    "GPT2": {**TEXT, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
             "attn_pdrop": 0.0},
    "Llama": {**TEXT, **SIZES, "num_key_value_heads": 2, "num_labels": 5},
    "ModernBert": {**TEXT, **SIZES, "max_position_embeddings": 64},
    "T5": {**TEXT, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0},
}  # fmt: skip


def made(name):
    family = next(family for family in CONFIGS if name.startswith(family))
    config = getattr(transformers, f"{family}Config")(**CONFIGS[family])
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    if family != "T5" and not loss.asked_for(model):
        pytest.skip(f"transformers {transformers.__version__}: {name} does not ask for its loss_function")
    return model


def labels(seed, high=V, shape=(2, LENGTH)):
    """Some of which do not count."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(high, shape, generator=generator)
    return drawn.masked_fill(torch.rand(shape, generator=generator) < 0.3, -100)


def shifted(seed):
    return {"labels": labels(seed), "shift_labels": labels(seed + 50)}


def one_of_each(seed, high):
    """One that counts for each sequence."""
    return labels(seed, high, (2,)).clamp(min=0)


#: name: (model, arguments of a call beside its tokens)
CALLS = {
    "causal": ("GPT2LMHeadModel", lambda seed: {"labels": labels(seed)}),
    "by items": ("GPT2LMHeadModel", lambda seed: {"labels": labels(seed), "num_items_in_batch": 7}),
    "by items, a tensor": (
        "LlamaForCausalLM", lambda seed: {"labels": labels(seed), "num_items_in_batch": torch.tensor(9)},
    ),
    "shifted before": ("LlamaForCausalLM", shifted),
    "another ignored": ("LlamaForCausalLM", lambda seed: {"labels": labels(seed).clamp(min=0), "ignore_index": 0}),
    "masked": ("ModernBertForMaskedLM", lambda seed: {"labels": labels(seed)}),
    "of tokens": ("LlamaForTokenClassification", lambda seed: {"labels": labels(seed, 5)}),
    "of sequences": ("LlamaForSequenceClassification", lambda seed: {"labels": one_of_each(seed, 5)}),
    "answers": ("LlamaForQuestionAnswering", lambda seed: {
        "start_positions": one_of_each(seed, 15), "end_positions": one_of_each(seed + 9, 15),
    }),
}  # fmt: skip


def results(model, arguments):
    """Losses of a few calls, for a single one is right by luck, and all gradients."""
    model.zero_grad()
    losses = []
    for seed in range(8):
        tokens = torch.randint(3, V, (2, LENGTH), generator=torch.Generator().manual_seed(100 + seed))
        losses.append(model(input_ids=tokens, **arguments(seed)).loss)
        losses[-1].backward()
    return torch.stack(losses).detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def kernels(model, arguments):
    tokens = torch.arange(2 * LENGTH).reshape(2, LENGTH) + 3
    rows = fastattn.explain(model, input_ids=tokens, **arguments(0)).rows
    return {(row.kernel, row.path) for row in rows if row.op == "cross_entropy"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_losses_and_gradients_are_transformers(name, dtype, everything_double, hold_gradients, skip_without_native):
    kind, arguments = CALLS[name]
    model = made(kind).to(dtype)
    peer, peers = results(model, arguments)
    with everything_double():
        truth, truths = results(copy.deepcopy(model).double(), arguments)
    report = fastattn.patch(model)
    assert ("", kind, "fastattn's LossFunction") in {(e.path, e.module, e.what) for e in report.replaced}
    found, gradients = results(model, arguments)
    testing.assert_lawful(found, peer, truth)
    hold_gradients(gradients, peers, truths)
    assert kernels(model, arguments) == {("cpu", "")}
    fastattn.unpatch(model)
    assert type(model) is getattr(transformers, kind)
    assert torch.equal(results(model, arguments)[0], peer) and kernels(model, arguments) == {("torch", "")}


def test_it_stays_the_same_model(tmp_path):
    model = made("GPT2LMHeadModel")
    keys, held, bases = list(model.state_dict()), sorted(model.__dict__), type(model).__mro__
    assert type(model.transformer) is transformers.GPT2Model  # which has no loss
    fastattn.patch(model)
    assert list(model.state_dict()) == keys and sorted(model.__dict__) == held
    assert type(model).__name__ == "GPT2LMHeadModel" and type(model).config_class is bases[0].config_class
    assert type(model.transformer) is transformers.GPT2Model
    ids = torch.arange(8)[None]
    expected = model(ids, labels=ids).loss
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model) and torch.equal(twin(ids, labels=ids).loss, expected)
        fastattn.unpatch(twin)
        assert type(twin) is bases[0]
    model.save_pretrained(tmp_path)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert type(again) is bases[0] and isinstance(model, bases[0])
    fastattn.patch(again)
    assert torch.equal(again.eval()(ids, labels=ids).loss, expected)


def test_compiled(skip_without_native):
    model, ids, graphs = made("LlamaForCausalLM"), torch.arange(8)[None], []
    fastattn.patch(model)

    def backend(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    found = torch.compile(model, backend=backend, fullgraph=True)(ids, labels=ids)
    assert torch.equal(found.loss, model(ids, labels=ids).loss)
    assert "fastattn.cross_entropy.cpu" in graphs[0]


def test_within_accelerate(skip_without_native):
    model, ids = made("GPT2LMHeadModel"), torch.arange(8)[None]
    fastattn.patch(model)
    expected = model(ids, labels=ids).loss
    with fastattn.accelerate():
        assert torch.equal(model(ids, labels=ids).loss, expected)


def test_what_is_not_served_is_torchs(skip_without_native):
    model, ids, of_all = made("LlamaForSequenceClassification").double(), torch.arange(8)[None], torch.tensor([3])
    expected = model(ids, labels=of_all).loss
    fastattn.patch(model)
    with fastattn.accelerate() as served:
        assert torch.equal(model(ids, labels=of_all).loss, expected)
    assert ("cross_entropy", "has no kernel for torch.float64: float32, bfloat16, float16") in served.counts.left
    assert torch.equal(model(ids, labels=of_all).loss, expected)
    left = {(path, why) for path, _, why, _ in fastattn.explain(model, ids, labels=of_all).left}
    assert ("", "has no kernel for torch.float64: float32, bfloat16, float16") in left
    fastattn.patch(model, strict=True, exclude=["?*"])
    for module in model.modules():
        if module is not model:
            fastattn.unpatch(module)
    with pytest.raises(BackendUnsupported, match=r"LlamaForSequenceClassification: has no kernel for torch\.float64"):
        model(ids, labels=of_all)


def doubled(logits, labels, **_):
    return 2 * F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class OwnLoss(transformers.GPT2LMHeadModel):
    @property
    def loss_function(self):
        return doubled


def test_losses_of_ones_own_stay():
    model, ids = made("GPT2LMHeadModel"), torch.arange(8)[None]
    model.loss_function = doubled
    own = OwnLoss(model.config)
    own.load_state_dict(model.state_dict())
    for one in (model, own):
        assert [entry.what for entry in fastattn.patch(one).left] == ["its loss_function is one of its own"]
        assert not isinstance(one, LossFunction)
        assert torch.equal(one(ids, labels=ids).loss, doubled(one(ids).logits, ids))


def test_a_loss_that_is_set_later_is_the_loss():
    model, ids = made("GPT2LMHeadModel"), torch.arange(8)[None]
    fastattn.patch(model)
    model.loss_function = doubled
    assert torch.equal(model(ids, labels=ids).loss, doubled(model(ids).logits, ids))


def test_models_that_do_not_ask_for_it_are_left_alone():
    for name in ("T5ForConditionalGeneration", "T5EncoderModel"):
        model = made(name)
        if name == "T5ForConditionalGeneration" and loss.asked_for(model):
            pytest.skip(f"transformers {transformers.__version__}: T5 asks for its loss_function")
        report = fastattn.patch(model)
        assert "" not in {entry.path for entry in (*report.replaced, *report.left)}
        assert not isinstance(model, LossFunction)
