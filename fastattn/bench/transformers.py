"""`fastattn bench transformers`: models of Hugging Face Transformers as people have them, with sdpa and on our kernels.

Ours is the same model after `register()`, attn_implementation="fastattn" and `fastattn.patch(model)`, and nothing else;
for the encoder also after `skip_padding(model)`. Weights and batches are the same; what is compared is the losses of
all steps, and sentence embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.bench import models, train_step
from fastattn.bench.contenders import OURS, TORCH
from fastattn.bench.models import DTYPES, Contest, Entry
from fastattn.models.gpt import GPTConfig

SKIPPING = "skipping"
#: Largest relative distance of a sentence's embedding, of norm 1, from torch's.
LIMITS = {"fp32": 1e-4, "bf16": 2e-2}


@dataclass(frozen=True)
class Workload:
    """kind: "training" of a GPT-2, one step with AdamW; "encoding" of sentences by a BERT, means of their tokens."""

    name: str
    kind: str
    layers: int
    heads: int
    width: int
    vocabulary: int
    batch: int
    length: int
    quick: bool = True

    @property
    def tokens(self) -> int:
        """Without padding."""
        return self.batch * self.length if self.kind == "training" else int(_lengths(self).sum())

    @property
    def flops(self) -> int:
        """Of matrix products, of tokens without padding."""
        if self.kind == "training":
            model = GPTConfig(self.vocabulary, self.length, self.layers, self.heads, self.width)
            return train_step.Workload(self.name, model, self.batch, self.length).flops
        scores = 4 * self.width * int((_lengths(self) ** 2).sum())
        return self.layers * (2 * self.tokens * 12 * self.width**2 + scores)


WORKLOADS = (
    Workload("gpt2-124m training 1x1024", "training", 12, 12, 768, 50257, 1, 1024),
    Workload("bert-base encoding 32 sentences of 16 to 128 tokens", "encoding", 12, 12, 768, 30522, 32, 128),
)


def _lengths(workload: Workload) -> Tensor:
    """(batch,) from an eighth of the length on; the longest is the length."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(workload.length // 8, workload.length + 1, (workload.batch,), generator=generator)
    lengths[0] = workload.length
    return lengths


def _gpt2(workload: Workload, implementation: str) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=workload.vocabulary, n_positions=workload.length, n_embd=workload.width, n_layer=workload.layers,
        n_head=workload.heads, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return GPT2LMHeadModel._from_config(config, attn_implementation=implementation).train()


def _bert(workload: Workload, implementation: str) -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=workload.vocabulary, hidden_size=workload.width, num_hidden_layers=workload.layers,
        num_attention_heads=workload.heads, intermediate_size=4 * workload.width,
        max_position_embeddings=workload.length,
    )  # fmt: skip
    torch.manual_seed(0)
    return BertModel._from_config(config, attn_implementation=implementation).eval()


class Training:
    """Forward, loss, backward, clipping and AdamW of one contender."""

    def __init__(self, workload: Workload, dtype: str, model: Any, entry: Entry) -> None:
        self.model, self.entry, self.lower = model, entry, dtype == "bf16"
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        generator = torch.Generator().manual_seed(1)
        shape = (train_step.BATCHES, workload.batch, workload.length)
        self.batches = torch.randint(workload.vocabulary, shape, generator=generator)

    def run(self) -> None:
        ids = self.batches[len(self.entry.losses) % len(self.batches)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.lower):
            loss = self.model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        self.entry.norms.append(torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.entry.losses.append(loss.item())


class Encoding:
    """Embeddings of a padded batch: means of the tokens' hidden states, of norm 1."""

    def __init__(self, workload: Workload, dtype: str, model: Any, entry: Entry) -> None:
        self.model, self.entry = model.to(DTYPES[dtype]), entry
        lengths = _lengths(workload)
        self.keep = (torch.arange(workload.length)[None] < lengths[:, None]).long()
        generator = torch.Generator().manual_seed(2)
        ids = torch.randint(1, workload.vocabulary, tuple(self.keep.shape), generator=generator)
        self.ids = ids * self.keep

    def run(self) -> None:
        with torch.no_grad():
            hidden = self.model(self.ids, attention_mask=self.keep).last_hidden_state
            weights = self.keep[:, :, None].to(hidden.dtype)
            mean = ((hidden * weights).sum(1) / weights.sum(1)).float()
            self.entry.embeddings = torch.nn.functional.normalize(mean, dim=1)


def _contenders(workload: Workload) -> dict[str, Callable[[], Any]]:
    """What makes each one's model."""
    from fastattn.integrations.patching import patch
    from fastattn.integrations.transformers import register, skip_padding

    register()
    make = _gpt2 if workload.kind == "training" else _bert

    def ours() -> Any:
        model = make(workload, "fastattn")
        patch(model)
        return model

    def skipping() -> Any:
        model = ours()
        skip_padding(model)
        return model

    found: dict[str, Callable[[], Any]] = {OURS: ours, TORCH: lambda: make(workload, "sdpa")}
    return found if workload.kind == "training" else {**found, SKIPPING: skipping}


def differences(entries: dict[str, Entry], workload: Workload, dtype: str) -> tuple[str, ...]:
    """What is wrong with the contenders' losses or embeddings, in words."""
    if workload.kind == "training":
        return train_step.differences(entries, dtype)
    theirs, found = entries[TORCH].embeddings, []
    assert theirs is not None
    for name, entry in entries.items():
        assert entry.embeddings is not None
        apart = (entry.embeddings - theirs).norm(dim=1).max().item()
        if not apart <= LIMITS[dtype]:
            found.append(f"an embedding of {name} is {apart:.1e} from torch's")
    return tuple(found)


def prepare(workload: Workload, dtype: str) -> Contest:
    """All contenders of a workload."""
    side = Training if workload.kind == "training" else Encoding
    makers = _contenders(workload)
    entries = {name: Entry() for name in makers}
    calls = {name: side(workload, dtype, make(), entries[name]).run for name, make in makers.items()}
    return Contest(entries, calls, lambda: differences(entries, workload, dtype))


as_json = models.as_json
