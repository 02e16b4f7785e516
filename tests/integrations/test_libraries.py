"""Libraries that people train and run models with, a short example each: the results of the same model on torch."""

import copy

import pytest
import torch

import fastattn
from fastattn import testing

pytestmark = pytest.mark.slow  # they take longer to import than to test


def library(name):
    return pytest.importorskip(
        name, reason=f"{name} cannot be imported: pip install fastattn[ecosystem]", exc_type=ImportError
    )


@pytest.fixture(autouse=True)
def registered():
    library("transformers")
    from fastattn.integrations import transformers as integration

    integration.register()
    yield integration
    integration.unregister()


def gpt2(implementation):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0, resid_pdrop=0.0,
        embd_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return GPT2LMHeadModel._from_config(config, attn_implementation=implementation)


def ids(seed, *shape):
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def hold_training(hold_runs):
    """Call with (train, prepare): answers of the model that train(model) returns keep the law, ours, patched too,
    beside eager attention. prepare(model): what is trained."""

    def hold(train, prepare=lambda model: model):
        def run(model):
            before = answer(model)
            trained = train(model)
            assert (answer(trained) - before).norm() > 1e-2 * before.norm()
            return answer(trained)

        ours = gpt2("fastattn")
        fastattn.patch(ours)
        hold_runs(run, prepare(ours), prepare(gpt2("eager")))

    return hold


def answer(model):
    with torch.no_grad():
        return model(ids(9, 4, 12)).logits


def test_peft_lora(hold_training):
    peft = library("peft")

    def adapted(model):
        torch.manual_seed(1)
        return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))

    def train(model):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(4):
            batch = ids(step, 2, 12)
            model(batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.merge_and_unload()

    hold_training(train, adapted)


def test_accelerate(hold_training):
    accelerate = library("accelerate")

    def train(model):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        data = torch.utils.data.DataLoader(ids(1, 12, 12), batch_size=2)
        model, optimizer, data = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3), data)
        for batch in data:
            with accelerator.accumulate(model):
                loss = model(batch, labels=batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        return model

    hold_training(train)


def test_lightning(tmp_path, hold_training):
    lightning = library("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, batch, _):
            return self.model(batch, labels=batch).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train(model):
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(Module(model), torch.utils.data.DataLoader(ids(1, 8, 12), batch_size=2))
        return model

    hold_training(train)


def test_sentence_transformers(tmp_path, registered):
    sentence_transformers = library("sentence_transformers")
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = [
        "the",
        "a",
        "cat",
        "dog",
        "sat",
        "ran",
        "on",
        "under",
        "mat",
        "tree",
        "quick",
        "lazy",
        "brown",
        "and",
        "then",
        "slept",
    ]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path)
    sentences = ["the cat sat on the mat", "a dog", "the quick brown dog ran under a tree and then slept"]

    def encoder(implementation):
        return sentence_transformers.SentenceTransformer(
            str(tmp_path), device="cpu", model_kwargs={"attn_implementation": implementation}
        )

    ours, theirs = encoder("fastattn"), encoder("eager")
    assert ours[0].model.config._attn_implementation == "fastattn"
    exact = copy.deepcopy(theirs).double()
    encoded = {"sentences": sentences, "convert_to_tensor": True}
    peer, truth = theirs.encode(**encoded), exact.encode(**encoded).double()
    testing.assert_lawful(ours.encode(**encoded), peer, truth)
    fastattn.patch(ours)
    registered.skip_padding(ours)
    testing.assert_lawful(ours.encode(**encoded), peer, truth)


def test_diffusers():
    diffusers = library("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=8, norm_num_groups=8,
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    states = torch.randn(2, 7, 16, generator=generator)

    def run(model, dtype=torch.float32):
        return model(sample.to(dtype), 3, encoder_hidden_states=states.to(dtype)).sample

    with torch.no_grad():
        peer, truth = run(unet), run(copy.deepcopy(unet).double(), torch.float64)
        with fastattn.accelerate() as report:
            found = run(unet)
    assert "scaled_dot_product_attention" in str(report)
    testing.assert_lawful(found, peer, truth)
    fastattn.patch(unet)
    with torch.no_grad():
        testing.assert_lawful(run(unet), peer, truth)


def test_timm():
    timm = library("timm")
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=48, depth=2, num_heads=3, num_classes=5
    ).eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        peer, truth = vit(images), copy.deepcopy(vit).double()(images.double())
        fastattn.patch(vit)
        with fastattn.accelerate() as report:
            found = vit(images)
    assert "scaled_dot_product_attention: 2 served" in str(report)
    testing.assert_lawful(found, peer, truth)
