"""skip_padding and layers that it must leave alone; ../test_transformers.py has the models."""

import pytest
import torch

from fastattn.integrations.transformers import masks, skip_padding


class Mixing(torch.nn.Module):
    """A layer that looks at its neighbours, padding included."""

    def forward(self, hidden, mask):
        return hidden + hidden.roll(1, dims=1)


def test_layers_that_mix_tokens_are_left_alone(ask):
    model = torch.nn.Sequential(torch.nn.ModuleList([Mixing()]))
    keep = torch.arange(11)[None] < torch.tensor([[11], [6]])
    mask = masks.fastattn_mask(**ask(lambda b, h, q, k: q >= 0, 11, 11, attention_mask=keep))
    hidden = torch.randn(2, 11, 8)
    assert skip_padding(model) == ["0.0"]
    with pytest.warns(UserWarning, match="Mixing gives other results"):
        found = model[0][0](hidden, mask)
    assert torch.equal(found, hidden + hidden.roll(1, dims=1))
