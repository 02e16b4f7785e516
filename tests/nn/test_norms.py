"""LayerNorm and RMSNorm against torch's."""

import pytest
import torch
from torch import nn

import fastattn.nn
from fastattn.dispatch import reset_served, served
from fastattn.nn.served import listening

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def stirred(module):
    torch.manual_seed(2)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize(("name", "options"), [
    ("LayerNorm", {}), ("LayerNorm", {"bias": False}), ("LayerNorm", {"elementwise_affine": False}),
    ("LayerNorm", {"eps": 0.3}), ("RMSNorm", {}), ("RMSNorm", {"elementwise_affine": False}), ("RMSNorm", {"eps": 0.3}),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("shape", [(24,), 24, (3, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms(hold_to_torch, name, options, shape, dtype):
    x = torch.randn(5, *((shape,) if isinstance(shape, int) else shape), generator=torch.Generator().manual_seed(0))
    ours, theirs = (getattr(of, name)(shape, **options) for of in (fastattn.nn, nn))
    reset_served()
    hold_to_torch(ours, stirred(theirs), [x], dtype=dtype)
    assert served() == {"cpu": 1}


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_dtypes_that_differ_from_the_weights(dtype):
    x, heard = torch.randn(5, 24, dtype=dtype), []
    for ours, theirs in ((fastattn.nn.LayerNorm(24), nn.LayerNorm(24)), (fastattn.nn.RMSNorm(24), nn.RMSNorm(24))):
        with listening(lambda module, reason: heard.append(type(module).__name__)):
            found, expected = ours(x), theirs(x)
        assert found.dtype == expected.dtype
        fastattn.testing.assert_lawful(found.detach(), expected.detach(), theirs.double()(x.double()).detach())
    assert heard == ["RMSNorm"]


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_autocast_and_compile(hold_to_torch, hold_calls, name):
    ours, theirs = getattr(fastattn.nn, name)(24), getattr(nn, name)(24)
    x = torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):  # norms stay in float32 on the CPU, as torch's
        hold_calls(nn.Module.__call__, ours, theirs, x)
    ours.compile(fullgraph=True, backend="aot_eager")
    hold_to_torch(ours, theirs, [x])


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_bad_input_is_refused(name):
    with pytest.raises(ValueError, match=r"last dimensions must be normalized_shape \(24,\)"):
        getattr(fastattn.nn, name)(24)(torch.randn(5, 23))
