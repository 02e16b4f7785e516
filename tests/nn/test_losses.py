"""CrossEntropyLoss against torch's."""

import pytest
import torch
from torch import nn

import fastattn.nn
from fastattn.dispatch import reset_served, served


@pytest.mark.parametrize("options", [
    {}, {"reduction": "sum"}, {"reduction": "none"}, {"label_smoothing": 0.2},
    {"weight": torch.linspace(0.5, 2, 10), "label_smoothing": 0.1},
], ids=lambda o: ",".join(o))  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("probabilities", [False, True])
def test_cross_entropy(hold_to_torch, options, dtype, probabilities):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 10, 3, generator=generator)
    target = torch.randint(10, (12, 3), generator=generator)
    target = torch.randn(12, 10, 3, generator=generator).softmax(1) if probabilities else target
    reset_served()
    hold_to_torch(
        fastattn.nn.CrossEntropyLoss(**options), nn.CrossEntropyLoss(**options), [logits, target], dtype=dtype
    )
    assert served() == {"cpu": 1}


def test_ignore_index(hold_to_torch):
    logits, target = torch.randn(12, 10, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 4
    hold_to_torch(fastattn.nn.CrossEntropyLoss(ignore_index=3), nn.CrossEntropyLoss(ignore_index=3), [logits, target])


def test_state_and_compile(hold_to_torch):
    ours, theirs = fastattn.nn.CrossEntropyLoss(torch.ones(10)), nn.CrossEntropyLoss(torch.linspace(0.5, 2, 10))
    assert list(ours.state_dict()) == ["weight"]
    ours.compile(fullgraph=True, backend="aot_eager")
    hold_to_torch(ours, theirs, [torch.randn(12, 10), torch.randint(10, (12,))])
