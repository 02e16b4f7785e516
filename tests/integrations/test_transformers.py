"""Models of Transformers on fastattn, through the registration that people call, held to their eager attention.

The law (fastattn.numerics) decides: the truth is the eager model in float64, all of it, and eager float32 the peer.
"""

import contextlib
import copy
import importlib
import pickle
import sys
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install fastattn[test]")

from fastattn import testing  # noqa: E402
from fastattn.integrations import transformers as integration  # noqa: E402
from fastattn.integrations.transformers import (  # noqa: E402
    BandMask,
    PackedMask,
    attention,
    keep_padding,
    masks,
    skip_padding,
)

MAJOR = int(transformers.__version__.split(".")[0])
V = 61
TEXT = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**TEXT, **SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64}
HEADS = {**DECODER, "num_key_value_heads": 4}
ENCODER = {**TEXT, **SIZES, "max_position_embeddings": 64}
QUIET = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
GPT = {**TEXT, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48}
SEQ2SEQ = {
    **TEXT, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "num_beams": 1,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 2,
}  # fmt: skip
VISION = {**SIZES, "image_size": 24, "patch_size": 8}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12,
          "first_k_dense_replace": 2}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

#: name: (kind of model, its auto class, arguments of its config)
MODELS = {
    "gpt2": ("causal", "AutoModelForCausalLM", GPT),
    "opt": ("causal", "AutoModelForCausalLM", {**ENCODER, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt_neox": ("causal", "AutoModelForCausalLM", {**ENCODER, "rotary_pct": 0.5}),
    "llama": ("causal", "AutoModelForCausalLM", DECODER),
    "mistral": ("causal", "AutoModelForCausalLM", {**DECODER, "sliding_window": 5}),
    "mixtral": ("causal", "AutoModelForCausalLM", {**DECODER, **EXPERTS}),
    "qwen2": ("causal", "AutoModelForCausalLM", {**DECODER, "use_sliding_window": True, "sliding_window": 5,
                                                 "max_window_layers": 1}),
    "qwen3": ("causal", "AutoModelForCausalLM", {**DECODER, "head_dim": 8}),
    "gemma": ("causal", "AutoModelForCausalLM", {**DECODER, "head_dim": 8}),
    "gemma2": ("causal", "AutoModelForCausalLM", {**DECODER, "head_dim": 8, "sliding_window": 5,
                                                  "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("causal", "AutoModelForCausalLM", {**DECODER, "head_dim": 8, "sliding_window": 5,
                    "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}),
    "deepseek_v3": ("causal", "AutoModelForCausalLM", {**HEADS, **LATENT}),
    "phi": ("causal", "AutoModelForCausalLM", {**HEADS, "partial_rotary_factor": 0.5}),
    "phi3": ("causal", "AutoModelForCausalLM", {**DECODER, "sliding_window": 5}),
    "falcon": ("causal", "AutoModelForCausalLM", {**TEXT, "hidden_size": 32, "num_hidden_layers": 2,
                                                  "num_attention_heads": 4}),
    "stablelm": ("causal", "AutoModelForCausalLM", DECODER),
    "cohere": ("causal", "AutoModelForCausalLM", DECODER),
    "olmo2": ("causal", "AutoModelForCausalLM", DECODER),
    "granite": ("causal", "AutoModelForCausalLM", {**DECODER, "attention_multiplier": 0.3}),
    "starcoder2": ("causal", "AutoModelForCausalLM", {**DECODER, "sliding_window": 5}),
    "smollm3": ("causal", "AutoModelForCausalLM", DECODER),
    "gpt_oss": ("causal", "AutoModelForCausalLM", {**DECODER, **EXPERTS, "head_dim": 8, "sliding_window": 5,
                "layer_types": ["sliding_attention", "full_attention"]}),
    "llama4_text": ("causal", "AutoModelForCausalLM", {**DECODER, **EXPERTS, "head_dim": 8, "attention_chunk_size": 4,
                    "intermediate_size_mlp": 48, "num_experts_per_tok": 1, "moe_layers": [],
                    "layer_types": ["chunked_attention", "full_attention"]}),
    "minimax_m3_vl_text": ("causal", "AutoModelForCausalLM", {**DECODER, **EXPERTS, "head_dim": 8, "rotary_dim": 4,
                           "dense_intermediate_size": 48, "shared_intermediate_size": 48, "index_n_heads": 2,
                           "index_head_dim": 8, "index_block_size": 3, "index_topk_blocks": 2,
                           "layer_types": ["minimax_m3_sparse", "full_attention"],
                           "mlp_layer_types": ["dense", "sparse"]}),
    "deepseek_v32": ("causal", "AutoModelForCausalLM", {**HEADS, **LATENT, "index_n_heads": 2, "index_head_dim": 8,
                     "index_topk": 3}),
    "bert": ("encoder", "AutoModelForMaskedLM", ENCODER),
    "roberta": ("encoder", "AutoModelForMaskedLM", ENCODER),
    "distilbert": ("encoder", "AutoModelForMaskedLM", {**TEXT, "dim": 32, "hidden_dim": 48, "n_layers": 2,
                                                       "n_heads": 4, "max_position_embeddings": 64}),
    "albert": ("encoder", "AutoModelForMaskedLM", {**ENCODER, "embedding_size": 16, "inner_group_num": 1}),
    "electra": ("encoder", "AutoModelForMaskedLM", {**ENCODER, "embedding_size": 16}),
    "modernbert": ("encoder", "AutoModelForMaskedLM", {**ENCODER, "global_attn_every_n_layers": 2,
                                                       "local_attention": 6}),
    "bart": ("seq2seq", "AutoModelForSeq2SeqLM", {**SEQ2SEQ, "max_position_embeddings": 64}),
    "t5": ("seq2seq", "AutoModelForSeq2SeqLM", {**TEXT, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2,
                                                "num_heads": 4, "decoder_start_token_id": 0}),
    "whisper": ("speech", "AutoModelForSpeechSeq2Seq", {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 10,
                                                        "max_target_positions": 64}),
    "vit": ("vision", "AutoModelForImageClassification", {**VISION, "num_labels": 5}),
    "clip": ("clip", "AutoModel", {"projection_dim": 16, "text_config": {**ENCODER, "eos_token_id": 2},
                                   "vision_config": VISION}),
}  # fmt: skip
#: Models that choose among attention classes of their own.
OWN_CLASSES = {"falcon"}
#: Models whose layers choose keys by the places of a batch's tokens, padding included.
INDEXED = {"deepseek_v32", "minimax_m3_vl_text"}
#: Models with what the kernel for caches has not: a position bias, keys that are listed.
NO_CACHE_KERNEL = {"t5", *INDEXED}
#: Models that generate from left-padded prompts in no implementation: MiniMax M3 takes places for positions, and real
#: queries then see nothing.
NO_LEFT_PADDING = {"minimax_m3_vl_text"}


def names(*kinds):
    return [name for name, (kind, _, _) in MODELS.items() if kind in kinds and name not in OWN_CLASSES]


CAUSAL = names("causal")
ALL = names("causal", "encoder", "seq2seq", "speech", "vision", "clip")


@pytest.fixture(autouse=True)
def registered():
    integration.register()
    yield
    integration.unregister()


@pytest.fixture
def calls(monkeypatch):
    """(query, mask, options) of all calls of the attention function's two ways into our kernels."""
    seen = []
    whole, decode = attention._attended, attention._decoded

    def attended(query, key, value, mask, *rest):
        seen.append(("attention", query.shape, mask))
        return whole(query, key, value, mask, *rest)

    def decoded(query, key, value, mask, *rest):
        seen.append(("decode", query.shape, mask))
        return decode(query, key, value, mask, *rest)

    monkeypatch.setattr(attention, "_attended", attended)
    monkeypatch.setattr(attention, "_decoded", decoded)
    return seen


def config_of(name, **changes):
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = transformers.CONFIG_MAPPING[name](**{**MODELS[name][2], **changes})
    config._experts_implementation = "eager"  # the grouped products of 5.x have no float64
    return config


def pair(name, **changes):
    """The same model twice, with eager attention and with ours. Weights are large enough for masks to matter."""
    config = config_of(name, **changes)
    auto = getattr(transformers, MODELS[name][1])
    torch.manual_seed(0)
    eager = auto.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    module = importlib.import_module(type(eager).__module__)
    if "ALL_ATTENTION_FUNCTIONS" not in vars(module):
        pytest.skip(f"transformers {transformers.__version__}: {name} chooses among attention classes of its own")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in eager.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    ours = auto.from_config(copy.deepcopy(config), attn_implementation="fastattn").eval()
    ours.load_state_dict(eager.state_dict())
    return eager, ours


def tokens(*shape, seed=2):
    return torch.randint(3, V, shape, generator=torch.Generator().manual_seed(seed))


def padded(side, length=11, lengths=(11, 6, 9)):
    """(ids, attention_mask) of sequences of these lengths."""
    place = torch.arange(length)[None]
    counts = torch.tensor(lengths)[:, None]
    keep = place < counts if side == "right" else place >= length - counts
    return torch.where(keep, tokens(len(lengths), length), 0), keep.long()


def inputs_of(name, side):
    """(arguments of the model, which positions of its outputs count)"""
    kind = MODELS[name][0]
    generator = torch.Generator().manual_seed(3)
    if kind in ("vision", "clip"):
        pixels = torch.randn(3, 3, 24, 24, generator=generator)
        if kind == "vision":
            return {"pixel_values": pixels}, None
        ids, keep = padded("right")
        ids[torch.arange(3), keep.sum(1) - 1] = 2  # CLIP pools where the sequence ends
        return {"input_ids": ids, "attention_mask": keep, "pixel_values": pixels}, None
    if kind == "speech":
        ids, keep = padded("right", 7, (7, 4, 5))
        features = torch.randn(3, 8, 20, generator=generator)
        return {"input_features": features, "decoder_input_ids": ids, "decoder_attention_mask": keep}, keep.bool()
    ids, keep = padded(side)
    if kind == "seq2seq":
        targets, seen = padded("right", 7, (7, 4, 5))
        given = {"decoder_input_ids": targets, "decoder_attention_mask": seen}
        return {"input_ids": ids, "attention_mask": keep, **given}, seen.bool()
    return {"input_ids": ids, "attention_mask": keep}, keep.bool()


def doubled(values):
    return {k: v.double() if v.is_floating_point() else v for k, v in values.items()}


def results(model, arguments, counts):
    """(outputs that count, gradients by name) for a fixed gradient of the outputs."""
    model.zero_grad()
    options = {"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}
    found = model(**arguments, **options)
    output = found.logits if "logits" in found else torch.cat([found.text_embeds, found.image_embeds])
    output = output if counts is None else output[counts]
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(4)).to(output.dtype)
    (output * weight).sum().backward()
    return output.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def hold_to_eager(everything_double, hold_gradients):
    """Call with (eager, ours, arguments, counts): outputs and all gradients keep the law."""

    def check(eager, ours, arguments, counts):
        output, gradients = results(ours, arguments, counts)
        peer, peers = results(eager, arguments, counts)
        with everything_double():
            truth, truths = results(copy.deepcopy(eager).double(), doubled(arguments), counts)
        testing.assert_lawful(output, peer, truth)
        hold_gradients(gradients, peers, truths)

    return check


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ALL)
def test_outputs_and_all_gradients_are_eager_attentions(name, side, calls, hold_to_eager):
    eager, ours = pair(name)
    arguments, counts = inputs_of(name, side)
    hold_to_eager(eager, ours, arguments, counts)
    assert calls, "our attention was not called"
    if MODELS[name][0] == "causal":
        assert all(isinstance(mask, BandMask) for _, _, mask in calls), "a causal mask reached us as a matrix"


@pytest.mark.parametrize("name", CAUSAL)
def test_without_padding(name, calls, hold_to_eager):
    eager, ours = pair(name)
    hold_to_eager(eager, ours, {"input_ids": tokens(2, 11)}, None)
    assert all(isinstance(mask, BandMask) and (mask.ids is None or name == "llama4_text") for _, _, mask in calls)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", [*CAUSAL, *names("seq2seq", "speech")])
def test_greedy_tokens_are_eager_attentions(name, cache, calls):
    eager, ours = pair(name)
    arguments, _ = inputs_of(name, "left")
    if name in NO_LEFT_PADDING:
        arguments = {"input_ids": tokens(3, 11)}
    if MODELS[name][0] != "causal":
        arguments = {k: v for k, v in arguments.items() if not k.startswith("decoder")}
    settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "num_beams": 1}
    if cache == "static":
        if MAJOR < 5 and name == "deepseek_v3":
            pytest.skip("static caches of 4.x have one head dim for keys and values")
        settings["cache_implementation"] = "static"
    try:
        expected = eager.generate(**arguments, **settings)
    except ValueError as error:
        if "does not support `cache_implementation" not in str(error):
            raise
        pytest.skip(f"transformers {transformers.__version__}: {error}")
    assert torch.equal(ours.generate(**arguments, **settings), expected)
    assert expected.shape[1] >= 9
    steps = [kind for kind, shape, mask in calls if shape[2] == 1]
    assert steps, "no step of one query"
    if name not in NO_CACHE_KERNEL:
        assert set(steps) == {"decode"}


def test_models_with_classes_of_their_own_say_so():
    """Falcon chooses among classes by the name of the implementation, and knows its own only."""
    config = config_of("falcon")
    with pytest.raises((KeyError, ValueError), match="fastattn"):
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation="fastattn")


@pytest.mark.parametrize("name", ["mpt", "mpnet"])
def test_models_with_attention_of_their_own_run_eager(name):
    """They add the mask to their scores, whatever the implementation is called."""
    config = transformers.CONFIG_MAPPING[name](**{**ENCODER, "d_model": 32, "n_layers": 2, "n_heads": 4})
    models = []
    for implementation in ("eager", "fastattn"):
        torch.manual_seed(0)
        models.append(transformers.AutoModel.from_config(copy.deepcopy(config), attn_implementation=implementation))
    ids, keep = padded("right")
    masks._takes.clear()
    with torch.no_grad():
        expected = models[0].eval()(ids, attention_mask=keep)[0]
        if MAJOR < 5:
            found = models[1].eval()(ids, attention_mask=keep)[0]
        else:
            with pytest.warns(UserWarning, match=f"{name} has attention of its own"):
                found = models[1].eval()(ids, attention_mask=keep)[0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2"])
def test_packed_sequences_by_position_ids(name, calls, hold_to_eager):
    if MAJOR < 5:
        pytest.skip("Transformers looks for packed sequences in position_ids from 5.0 in all of these")
    eager, ours = pair(name)
    arguments = {"input_ids": tokens(2, 11), "position_ids": torch.tensor([[*range(4), *range(7)]] * 2)}
    hold_to_eager(eager, ours, arguments, None)
    assert all(isinstance(mask, BandMask) and mask.ids is not None for _, _, mask in calls)


def test_masks_that_the_user_made(hold_to_eager):
    mask = torch.zeros(2, 1, 11, 11)
    mask.masked_fill_(~torch.ones(11, 11, dtype=torch.bool).tril(2), torch.finfo(torch.float32).min)
    hold_to_eager(*pair("llama"), {"input_ids": tokens(2, 11), "attention_mask": mask}, None)


def test_long_prompts_in_pieces(hold_runs):
    """Chunked prefill: queries in the middle of a cache that is filled to there (dynamic) or longer (static)."""
    eager, ours = pair("mistral")
    ids = tokens(2, 11)
    sizes = {"max_cache_len": 20, **({"max_batch_size": 2} if MAJOR < 5 else {})}
    for make in (
        lambda m: transformers.DynamicCache(**({} if MAJOR < 5 else {"config": m.config})),
        lambda m: transformers.StaticCache(config=m.config, **sizes),
    ):

        def run(model, make=make):
            cache = make(model)
            with torch.no_grad():
                pieces = [
                    model(ids[:, a:b], past_key_values=cache, cache_position=torch.arange(a, b)).logits
                    if MAJOR < 5 else model(ids[:, a:b], past_key_values=cache).logits
                    for a, b in ((0, 4), (4, 9), (9, 11))
                ]  # fmt: skip
            return torch.cat(pieces, dim=1)

        hold_runs(run, ours, eager)


@pytest.mark.parametrize("reentrant", [False, True])
def test_training_with_dropout_and_checkpointing(reentrant):
    """The same seed gives the same gradients, recomputed layers or not; another seed gives others."""
    _, model = pair("gpt2", attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0)
    model.train()
    ids, keep = padded("right")
    labels = torch.where(keep.bool(), ids, -100)

    def gradient(seed):
        torch.manual_seed(seed)
        model.zero_grad()
        model(ids, attention_mask=keep, labels=labels, use_cache=False).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    first, again, other = gradient(1), gradient(1), gradient(2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert torch.equal(first, gradient(1))


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral", "bert", "gemma2"])
def test_compiled_whole(name, padding, calls, hold_runs):
    """fullgraph, with the same masks as uncompiled; before 5.0, where positions are tensors, with explicit ones."""
    eager, model = pair(name)
    ids, keep = padded("right")
    arguments = {"input_ids": ids, "attention_mask": keep if padding else None}
    where = keep.bool() if padding else torch.ones_like(keep, dtype=torch.bool)
    with torch.no_grad():
        model(**arguments)
        eager_kinds = [(type(mask), getattr(mask, "ids", None) is None) for _, _, mask in calls]
        calls.clear()
        torch._dynamo.reset()
        graph = []

        def backend(module, _):
            graph.extend(node for node in module.graph.nodes if "fastattn" in str(node.target))
            return module

        compiled = torch.compile(model, fullgraph=True, backend=backend)
        hold_runs(lambda model: model(**arguments)[0][where], compiled, eager)
    assert len(graph) == len(eager_kinds) == 2
    assert MAJOR < 5 or all(node.args[3] is None for node in graph), "a matrix reached the kernels"


def test_compiled_steps_of_a_static_cache():
    """Every step runs the graph of the first; tokens are those of eager attention."""
    eager, ours = pair("llama")
    ids, keep = padded("left")
    settings = {"max_new_tokens": 7, "do_sample": False, "cache_implementation": "static", "eos_token_id": None}
    expected = eager.generate(ids, attention_mask=keep, **settings)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    ours.forward = torch.compile(ours.forward, backend=counter, fullgraph=True)
    assert torch.equal(ours.generate(ids, attention_mask=keep, **settings), expected)
    assert counter.frame_count <= 3  # the prompt, a step, and a step whose lengths are known to change


def test_under_autocast(everything_double):
    eager, ours = pair("llama")
    ids, keep = padded("left")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found, peer = (m(ids, attention_mask=keep).logits for m in (ours, eager))
        assert torch.equal(
            ours.generate(ids, attention_mask=keep, max_new_tokens=4, do_sample=False),
            eager.generate(ids, attention_mask=keep, max_new_tokens=4, do_sample=False),
        )
    with everything_double(), torch.no_grad():
        truth = copy.deepcopy(eager).double()(ids, attention_mask=keep).logits
    where = keep.bool()
    testing.assert_lawful(found[where], peer[where], truth[where])


def test_set_and_registered_twice_and_undone():
    model, ours = pair("llama")
    integration.register()
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("fastattn")
    else:  # before 4.54
        model = ours
    assert model.config._attn_implementation == "fastattn"
    model(tokens(1, 5))
    integration.unregister()
    integration.unregister()
    with pytest.raises((KeyError, ValueError), match="fastattn"):
        model(tokens(1, 5))
    with pytest.raises(ValueError, match="fastattn"):
        transformers.AutoModelForCausalLM.from_config(config_of("llama"), attn_implementation="fastattn")


def test_another_fastattn_is_not_replaced():
    integration.unregister()
    transformers.AttentionInterface.register("fastattn", print)
    try:
        with pytest.raises(RuntimeError, match="another"):
            integration.register()
    finally:
        transformers.AttentionInterface._global_mapping.pop("fastattn")
        integration.unregister()


@pytest.mark.parametrize(
    ("library", "message"),
    [
        (None, "needs transformers >= 4.53: pip install transformers"),
        (SimpleNamespace(__version__="4.48.3"), "4.48.3 is installed, in which padding"),
    ],
)
def test_without_transformers_and_with_an_old_one(library, message, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("fastattn.integrations.transformers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", library)
    with pytest.raises(ImportError, match=message):
        importlib.import_module("fastattn.integrations.transformers")


def test_trainer(tmp_path, calls, hold_runs):
    """A few steps of Trainer: what the model says then."""
    pytest.importorskip("accelerate", reason="accelerate, which Trainer needs, is not installed")
    ids, keep = padded("right")
    examples = [
        {"input_ids": i, "attention_mask": k, "labels": torch.where(k.bool(), i, -100)}
        for i, k in zip(ids, keep, strict=True)
    ]

    def train(model):
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=2, logging_steps=1, report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True, seed=3, dataloader_pin_memory=False, learning_rate=3e-3,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=examples)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 4 and losses[-1] < losses[0]
        with torch.no_grad():
            return model.eval()(ids, attention_mask=keep).logits[keep.bool()]

    eager, ours = pair("gpt2", attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    hold_runs(train, ours, eager)
    assert calls


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", [*CAUSAL, *names("encoder")])
def test_padding_is_skipped(name, side, calls, hold_to_eager):
    """Outputs and gradients of the tokens, by the law; the layers computed nothing else."""
    eager, ours = pair(name)
    arguments, counts = inputs_of(name, side)
    assert len(skip_padding(ours)) == len(skip_padding(ours)) > 0
    with pytest.warns(UserWarning, match="its padding is computed") if name in INDEXED else contextlib.nullcontext():
        results(ours, arguments, counts)  # the first call tries both ways
    calls.clear()
    hold_to_eager(eager, ours, arguments, counts)
    if MAJOR < 5 and not any(isinstance(mask, PackedMask) for _, _, mask in calls):
        return  # masks of the model's own: nothing to skip by
    if name != "llama4_text" and name not in INDEXED:  # llama4_text's mask says more than which tokens are padding
        assert all(shape[2] == counts.sum() and isinstance(mask, PackedMask) for _, shape, mask in calls)
    keep_padding(ours)
    assert type(ours) is type(eager) and [type(m) for m in ours.modules()] == [type(m) for m in eager.modules()]


def test_padding_is_skipped_where_everything_else_works(calls, hold_runs):
    """Copies, pickles, hidden states, checkpointing, full batches, generation and torch.compile."""
    eager, ours = pair("bert")
    skip_padding(ours)
    ids, keep = padded("right")
    where = keep.bool()
    twin = pickle.loads(pickle.dumps(copy.deepcopy(ours)))

    def states(model):
        return model(ids, attention_mask=keep, output_hidden_states=True).hidden_states

    with torch.no_grad():
        for model in (ours, twin):
            hold_runs(lambda model: torch.cat([state[where] for state in states(model)]), model, eager)
            assert not states(model)[1][~where].any()
        hold_runs(lambda model: model(ids, attention_mask=torch.ones_like(keep)).logits, ours, eager)
        if MAJOR >= 5:
            compiled = torch.compile(ours, fullgraph=True, backend="eager")
            hold_runs(lambda model: model(ids, attention_mask=keep).logits[where], compiled, eager)
    eager, ours = pair("llama")
    skip_padding(ours)
    ids, keep = padded("left")
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(*(m.generate(ids, attention_mask=keep, **settings) for m in (ours, eager)))
    ours.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            ours.gradient_checkpointing_enable()
        gradients.append(results(ours, {"input_ids": ids, "attention_mask": keep}, keep.bool())[1])
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
