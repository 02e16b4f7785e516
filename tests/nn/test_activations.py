"""GELU, SiLU, Softmax and LogSoftmax against torch's."""

import pytest
import torch
from torch import nn

import fastattn.nn
from fastattn.dispatch import reset_served, served

MODULES = [("GELU", {}), ("GELU", {"approximate": "tanh"}), ("SiLU", {}), ("Softmax", {"dim": -1}),
           ("Softmax", {"dim": 0}), ("LogSoftmax", {"dim": 1})]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), MODULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_modules(hold_to_torch, name, options, dtype):
    x = torch.randn(3, 40, 5, generator=torch.Generator().manual_seed(0))
    reset_served()
    hold_to_torch(getattr(fastattn.nn, name)(**options), getattr(nn, name)(**options), [x], dtype=dtype)
    assert served() == {"cpu": 1}


@pytest.mark.parametrize(("name", "options"), MODULES, ids=str)
def test_compiled_in_one_graph(hold_to_torch, name, options):
    ours = getattr(fastattn.nn, name)(**options)
    ours.compile(fullgraph=True, backend="aot_eager")
    hold_to_torch(ours, getattr(nn, name)(**options), [torch.randn(3, 5)])


@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax"])
def test_without_a_dim_torch_chooses(name):
    with pytest.warns(UserWarning, match="Implicit dimension choice"):
        found = getattr(fastattn.nn, name)()(torch.eye(3))
    assert torch.equal(found, getattr(nn, name)(1)(torch.eye(3)))


def test_in_place_is_torchs():
    model, x = fastattn.nn.SiLU(inplace=True), torch.randn(3, 5)
    expected = nn.SiLU()(x)
    reset_served()
    assert model(x) is x and torch.equal(x, expected) and served() == {}
