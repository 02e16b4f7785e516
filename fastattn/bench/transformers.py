"""`fastattn bench transformers`: models of Hugging Face Transformers as people have them, with sdpa and on our kernels.

Ours is the same model after `register()`, attn_implementation="fastattn" and `fastattn.patch(model)`, and nothing else;
for the encoder also after `skip_padding(model)`. Weights and batches are the same; what is compared is the losses of
all steps, and sentence embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastattn import ceilings
from fastattn.bench import measure, train_step
from fastattn.bench.contenders import OURS, TORCH
from fastattn.bench.runner import Settings, allocator_in_use
from fastattn.models.gpt import GPTConfig

NAME = "transformers"
SKIPPING = "skipping"
DTYPES = train_step.DTYPES
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


@dataclass
class Entry:
    """One contender. losses: of every training step it made. embeddings: (batch, width) of the last encoding."""

    times: measure.Times | None = None
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    embeddings: Tensor | None = None


@dataclass(frozen=True)
class ModelRow:
    """A workload in one dtype. ceiling: operations per second of the machine, None without native kernels."""

    workload: Workload
    dtype: str
    allocator: str
    ceiling: float | None
    entries: dict[str, Entry]
    violations: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{NAME} {self.workload.name} {self.dtype} ({self.allocator} allocator)"

    def gain(self, name: str) -> float | None:
        """torch's time over the contender's."""
        times, theirs = self.entries[name].times, self.entries[TORCH].times
        return None if times is None or theirs is None or self.violations else theirs.median / times.median

    @property
    def speedup(self) -> float | None:
        """Of the fastest of ours."""
        gains = [gain for name in self.entries if name != TORCH and (gain := self.gain(name)) is not None]
        return max(gains, default=None)

    @property
    def ahead(self) -> bool:
        return self.speedup is not None and self.speedup > 1.0

    def utilisation(self, name: str) -> float | None:
        times = self.entries[name].times
        return None if times is None or self.ceiling is None else self.workload.flops / times.median / self.ceiling


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
        sides = {name: train_step.Entry(losses=e.losses, norms=e.norms) for name, e in entries.items()}
        return train_step.differences(sides, dtype)
    theirs, found = entries[TORCH].embeddings, []
    assert theirs is not None
    for name, entry in entries.items():
        assert entry.embeddings is not None
        apart = (entry.embeddings - theirs).norm(dim=1).max().item()
        if not apart <= LIMITS[dtype]:
            found.append(f"an embedding of {name} is {apart:.1e} from torch's")
    return tuple(found)


def select(*, quick: bool, names: Sequence[str], dtypes: Sequence[str] | None) -> list[tuple[Workload, str]]:
    """(workload, dtype) pairs; ValueError for names and dtypes that there are not."""
    for dtype in dtypes or ():
        if dtype not in DTYPES:
            raise ValueError(f"--dtype {dtype}: {NAME} has {', '.join(DTYPES)}")
    chosen = [w for w in WORKLOADS if (any(n in w.name for n in names) if names else w.quick or not quick)]
    if not chosen:
        raise ValueError(f"--workload: {NAME} has {', '.join(w.name for w in WORKLOADS)}")
    return [(workload, dtype) for workload in chosen for dtype in dtypes or DTYPES]


def run_models(selected: Sequence[tuple[Workload, str]], settings: Settings) -> Iterator[ModelRow]:
    """A row for each pair, as they are done. Sets torch's number of threads while it runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        for workload, dtype in selected:
            yield _run(workload, dtype, settings)
    finally:
        torch.set_num_threads(before)


def _run(workload: Workload, dtype: str, settings: Settings) -> ModelRow:
    side = Training if workload.kind == "training" else Encoding
    makers = _contenders(workload)
    entries = {name: Entry() for name in makers}
    calls = {name: side(workload, dtype, make(), entries[name]).run for name, make in makers.items()}
    for call in calls.values():  # allocates; the gate is this call before the times and all of them after
        call()
    violations = differences(entries, workload, dtype)
    if not violations:
        _, clock = measure.clock_for(settings.threads)
        times = measure.interleave(calls, clock, settings.min_seconds, settings.min_samples)
        for name, entry in entries.items():
            entry.times = times[name]
        violations = differences(entries, workload, dtype)
    ceiling = ceilings.arithmetic(DTYPES[dtype], settings.threads)
    return ModelRow(workload, dtype, allocator_in_use(), ceiling, entries, violations)


def block(row: ModelRow) -> str:
    """A row as a small table."""
    lines = ["", row.name]
    lines += [f"  FAILED {violation}" for violation in row.violations]
    lines.append(f"  {'':10}{'median ms':>11}{'p20':>10}{'p80':>10}{'n':>4}{'tokens/s':>10}{'ceiling':>9}{'gain':>8}")
    for name, entry in row.entries.items():
        if entry.times is None:
            continue
        low, high = (1e3 * measure.quantile(entry.times.seconds, q) for q in (0.2, 0.8))
        share, gain = row.utilisation(name), row.gain(name)
        lines.append(
            f"  {name:10}{1e3 * entry.times.median:11.1f}{low:10.1f}{high:10.1f}{len(entry.times.seconds):4}"
            + f"{row.workload.tokens / entry.times.median:10.0f}"
            + (f"{'-':>9}" if share is None else f"{100 * share:8.1f}%")
            + (f"{'-':>8}" if gain is None else f"{gain:8.2f}")
        )
    return "\n".join(lines)


def as_json(row: ModelRow) -> dict[str, Any]:
    """A row of the document: docs/benchmarks.md."""
    return {
        "op": NAME,
        "workload": row.workload.name,
        "dtype": row.dtype,
        "allocator": row.allocator,
        "violations": list(row.violations),
        "flops": row.workload.flops,
        "tokens": row.workload.tokens,
        "speedup": row.speedup,
        "ahead": row.ahead,
        "contenders": {
            name: {
                **({} if entry.times is None else entry.times.summary()),
                "gain": row.gain(name),
                "ceiling_share": row.utilisation(name),
                "losses": list(entry.losses),
            }
            for name, entry in row.entries.items()
        },
    }
