"""Linear against torch's, and the choice between both."""

import pytest
import torch
from torch import nn

import fastattn.nn
from fastattn import preference
from fastattn.dispatch import reset_served, served
from fastattn.nn.served import listening
from fastattn.ops.linear.op import prefers_torch


@pytest.fixture
def cpu_preferred(monkeypatch):
    """As on a machine whose table prefers our kernel for everything but one row, however short the product."""
    monkeypatch.setattr(preference, "SHORT_PRODUCT", 0)
    table = {"linear": {name: ("cpu", "a test's") for name in ("float32", "bfloat16", "float16")}}
    monkeypatch.setattr(preference, "TABLE", {preference.platform_name(): table})
    monkeypatch.setattr(preference, "_tuned", dict)
    fastattn.ops.linear.__globals__["OP"]._chosen.clear()
    yield
    fastattn.ops.linear.__globals__["OP"]._chosen.clear()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24), (0, 24)], ids=str)
def test_linear(hold_to_torch, cpu_preferred, bias, dtype, shape):
    torch.manual_seed(0)
    reset_served()
    hold_to_torch(fastattn.nn.Linear(24, 40, bias), nn.Linear(24, 40, bias), [torch.randn(shape)], dtype=dtype)
    assert ("cpu" in served()) == (shape != (24,))


def test_torchs_product_is_used_where_it_is_preferred(cpu_preferred, monkeypatch, hold_calls):
    ours, theirs = fastattn.nn.Linear(24, 40), nn.Linear(24, 40)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(7, 24)
    reset_served()
    assert torch.equal(ours(x[:1]), theirs(x[:1])) and served() == {}  # one row: the table says torch's
    ours(x)
    assert served() == {"cpu": 1}
    monkeypatch.setattr(preference, "SHORT_PRODUCT", 7 * 24 * 40 + 1)
    assert torch.equal(ours(x), theirs(x)) and served() == {"cpu": 1}
    with fastattn.use_backend("cpu"):
        hold_calls(nn.Module.__call__, ours, theirs, x)
    assert served() == {"cpu": 2}


def test_short_products_are_torchs_in_float32_and_without_an_activation(cpu_preferred, monkeypatch):
    monkeypatch.setattr(preference, "SHORT_PRODUCT", 2**21)
    x, weight = torch.randn(7, 24), torch.randn(40, 24)
    assert prefers_torch(x, weight) and prefers_torch(x, weight[0]) and not prefers_torch(x, weight, "gelu")
    assert not prefers_torch(x.bfloat16(), weight.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not prefers_torch(x, weight)
    assert not prefers_torch(torch.randn(2**11, 24), torch.randn(50, 24))


def test_strict_modules_raise_for_short_products_too():
    model = fastattn.nn.Linear(4, 4).double()
    model.fastattn_strict = True
    with pytest.raises(fastattn.BackendUnsupported, match=r"has no kernel for torch\.float64"):
        model(torch.randn(2, 4, dtype=torch.float64))


def test_autocast_rounds_as_torchs(cpu_preferred, hold_calls):
    reset_served()
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 alone
        hold_calls(nn.Module.__call__, fastattn.nn.Linear(24, 40), nn.Linear(24, 40), torch.randn(7, 24))
    assert served() == {"cpu": 1}


def test_others_are_torchs(cpu_preferred):
    ours, heard = fastattn.nn.Linear(4, 4).double(), []
    with listening(lambda module, reason: heard.append(reason)):
        assert ours(torch.randn(2, 4, dtype=torch.float64)).dtype == torch.float64
        fastattn.nn.Linear(4, 4, device="meta")(torch.randn(2, 4, device="meta"))
        with pytest.raises(RuntimeError, match="mat1 and mat2 must have the same dtype"):
            fastattn.nn.Linear(4, 4)(torch.zeros(2, 4, dtype=torch.int64))
    assert heard == [
        "has no kernel for torch.float64: float32, bfloat16, float16",
        "no kernels for meta tensors",
        "has no kernel for torch.int64: float32, bfloat16, float16",
    ]


def test_compiled_in_one_graph(cpu_preferred):
    ours = fastattn.nn.Linear(24, 40)
    x = torch.randn(7, 24)
    assert torch.equal(torch.compile(ours, fullgraph=True, backend="aot_eager")(x), ours(x))


def test_exported_with_any_number_of_rows():
    """Whether a product is short is nobody's question then: it would tie the program to sizes."""
    model = fastattn.nn.Linear(256, 256)
    rows = torch.export.Dim("rows", min=2, max=1024)
    program = torch.export.export(model, (torch.randn(4, 256),), dynamic_shapes={"input": {0: rows}})
    x = torch.randn(900, 256)
    assert torch.equal(program.module()(x), model(x))
