"""Which calls a module of ours leaves to torch, and who hears of it."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import fastattn.nn
from fastattn.nn.served import listening, no_attention, no_kernel, refusal

E = 8
LAYERS = (fastattn.nn.TransformerEncoderLayer, nn.TransformerEncoderLayer)


class Wrapped(torch.Tensor):
    pass


def test_reasons():
    x = torch.randn(2, E)
    assert refusal(x) is None and refusal(x, None, nn.Parameter(x)) is None
    assert refusal(x.as_subclass(Wrapped)) == "a Wrapped is not a plain tensor"
    assert refusal(x, x.as_subclass(Wrapped)) == "a Wrapped is not a plain tensor"
    assert refusal(x.to_sparse()) == "tensors of layout torch.sparse_coo are torch's"
    assert refusal(x.long()) == "has no kernel for torch.int64: float32, bfloat16, float16"
    assert refusal(x.to("meta")) == "no kernels for meta tensors"
    assert no_kernel("cpu", torch.float16) is None
    assert no_attention("cpu", torch.float32, 512) is None
    assert "head dims are 1 to 512" in no_attention("cpu", torch.float32, 513)
    with fastattn.use_backend("reference"):
        assert refusal(x.double()) is None


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout):
    x = torch.nested.nested_tensor([torch.randn(2, E), torch.randn(3, E)], layout=layout)
    ours, theirs = fastattn.nn.LayerNorm(E), nn.LayerNorm(E)
    heard = []
    with listening(lambda module, reason: heard.append(reason)):
        found = ours(x)
    assert torch.equal(found.values(), theirs(x).values()) and len(heard) == 1


def test_forward_mode_derivatives():
    x, tangent = torch.randn(2, E), torch.randn(2, E)
    found = []
    for model in (fastattn.nn.Softmax(-1), nn.Softmax(-1)):
        with forward_ad.dual_level():
            found.append(forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent)
    assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_by_torch_jit(hold_calls):
    x = torch.randn(1, 3, E)
    ours, theirs = (kind(E, 2, E, batch_first=True).eval() for kind in LAYERS)
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():  # as torch.jit checks what it traced
        traced = torch.jit.trace(ours, x)
    assert "fastattn::" not in str(traced.inlined_graph)
    hold_calls(lambda module, x: (traced if module is ours else module)(x), ours, theirs, x)


def test_transforms_of_torch_func(hold_calls):
    ours, theirs = fastattn.nn.LayerNorm(E), nn.LayerNorm(E)
    x = torch.randn(3, 2, E)
    assert torch.equal(torch.func.vmap(ours)(x), ours(x))
    hold_calls(lambda module, x: torch.func.jacrev(module)(x), ours, theirs, x[0])


def test_listeners_come_and_go():
    heard, model = [], fastattn.nn.GELU()
    x = torch.randn(2, dtype=torch.float64)
    with pytest.raises(ZeroDivisionError), listening(lambda module, reason: heard.append(module)):
        model(x)
        raise ZeroDivisionError
    model(x)
    assert heard == [model]
