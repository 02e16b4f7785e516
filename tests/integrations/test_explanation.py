"""explain(model, ...): which kernel served which layer, how often, and why it was none of ours."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn
from fastattn.dispatch import Bound, Op

E = 16


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(E), "up": nn.Linear(E, E), "act": nn.GELU()}) for _ in range(3)
        )

    def forward(self, x):
        for layer in self.layers:
            x = layer["act"](layer["up"](layer["norm"](x)))
        x = F.scaled_dot_product_attention(*(x[None, None],) * 3)[0, 0]
        return F.softmax(x, -1)


def table(explanation):
    return {(row.path, row.op): (row.kernel, row.why, row.calls) for row in explanation.rows}


def test_before_and_after_patching():
    model, x = Model(), torch.randn(4, E)
    before = table(fastattn.explain(model, x))
    assert before["layers.1.norm", "layer_norm"] == ("torch", "not patched: fastattn.patch(model)", 1)
    assert before["", "attention"] == ("torch", "called as a function: fastattn.accelerate()", 1)
    assert before["", "softmax"][0] == "torch"
    fastattn.patch(model)
    explanation = fastattn.explain(model, x)
    after = table(explanation)
    assert after["layers.1.norm", "layer_norm"] == ("cpu", "", 1)
    assert after["layers.2.act", "gelu"] == ("cpu", "", 1)
    assert after["layers.0.up", "linear"] == ("torch", "a short product", 1)
    assert explanation.served == {"cpu": 6, "torch": 5} and explanation.left == ()


def test_layers_share_a_line():
    model = Model()
    fastattn.patch(model)
    lines = str(fastattn.explain(model, torch.randn(4, E))).splitlines()
    assert lines[0] == "11 calls of what fastattn has kernels for: cpu 6, torch 5"
    assert [line.split() for line in lines if "layer_norm" in line] == [
        ["3", "x", "layer_norm", "cpu", "layers.*.norm", "[LayerNorm]"]
    ]
    assert len(lines) == 6


def test_every_call_of_a_module_is_counted_where_it_is():
    norm = nn.LayerNorm(E)
    model = nn.Sequential(norm, nn.Sequential(norm, norm))
    fastattn.patch(model)
    assert table(fastattn.explain(model, torch.randn(2, E))) == {("0", "layer_norm"): ("cpu", "", 3)}


def test_what_falls_back_says_why():
    model = nn.Sequential(nn.LayerNorm(E), nn.MultiheadAttention(E, 2)).double()
    fastattn.patch(model)
    model[0].register_forward_hook(lambda module, args, result: None)
    explanation = fastattn.explain(model[0], torch.randn(2, E, dtype=torch.float64))
    why = "has no kernel for torch.float64: float32, bfloat16, float16"
    assert table(explanation) == {("", "layer_norm"): ("torch", why, 1)}
    assert explanation.left == (("", "LayerNorm", why, 1),)
    assert why in str(explanation) and "fell back" not in str(explanation)


def test_parts_that_are_called_one_by_one_are_told():
    model = nn.TransformerEncoderLayer(E, 2, E, 0.0, batch_first=True)
    fastattn.patch(model)
    model.linear1.register_forward_hook(lambda *args: None)
    text = str(fastattn.explain(model, torch.randn(1, 3, E)))
    assert "fell back 1 x: (the model) [TransformerEncoderLayer]: linear1 has hooks or a forward of its own" in text


def test_the_reference_has_reasons():
    model = nn.LayerNorm(E)
    fastattn.patch(model)
    with fastattn.use_backend("reference"):
        assert table(fastattn.explain(model, torch.randn(2, E))) == {("", "layer_norm"): ("reference", "forced", 1)}

    class Direct(nn.Module):
        def forward(self, x):
            return fastattn.softmax(x, -1)

    kernel, why, calls = table(fastattn.explain(Direct(), torch.randn(2, E, dtype=torch.float64)))["", "softmax"]
    assert (kernel, calls) == ("reference", 1) and "cpu: has no kernel for torch.float64" in why


def test_a_preference_is_named():
    model = nn.Linear(2048, 2048)
    fastattn.patch(model)
    kernel, why, _ = table(fastattn.explain(model, torch.randn(1, 2048)))["", "linear"]
    assert kernel == "torch" and why.startswith("preferred: reference")


def test_inference_paths_of_torch_are_seen():
    model = nn.TransformerEncoderLayer(E, 2, E, 0.0, batch_first=True).eval()
    with torch.no_grad():
        rows = table(fastattn.explain(model, torch.randn(1, 3, E)))
        assert rows["", "attention"] == ("torch", "not patched: fastattn.patch(model)", 1)
        fastattn.patch(model)
        assert table(fastattn.explain(model, torch.randn(1, 3, E)))["self_attn", "attention"] == ("cpu", "", 1)


def test_kernels_of_ours_behind_torchs_functions():
    model, x = Model(), torch.randn(4, E)
    with fastattn.accelerate():
        rows = table(fastattn.explain(model, x))
    assert rows["", "attention"] == ("cpu", "", 1) and rows["", "softmax"] == ("cpu", "", 1)


def test_compiled_models_run_as_they_were_written():
    model = nn.Sequential(nn.LayerNorm(E), nn.GELU())
    fastattn.patch(model)
    compiled, x = torch.compile(model, backend="eager"), torch.randn(2, E)
    compiled(x)
    assert [row.kernel for row in fastattn.explain(compiled, x).rows] == ["cpu", "cpu"]


def test_models_without_any_of_it():
    assert str(fastattn.explain(nn.ReLU(), torch.ones(3))) == "nothing ran that fastattn has a kernel for"


def test_nothing_is_left_behind_whatever_happens():
    class Failing(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    before = Bound.run, Op.resolve_cached, dict(torch.nn.modules.module._global_forward_hooks)
    model = nn.Sequential(nn.LayerNorm(E), Failing())
    with pytest.raises(KeyboardInterrupt):
        fastattn.explain(model, torch.randn(2, E))
    assert before == (Bound.run, Op.resolve_cached, dict(torch.nn.modules.module._global_forward_hooks))
    assert not torch.nn.modules.module._global_forward_pre_hooks
    assert all(not module._forward_hooks for module in model.modules())


def test_ops_are_explained_as_ever():
    assert fastattn.explain(fastattn.gelu, torch.ones(3)).backend == "cpu"
    with pytest.raises(TypeError, match="takes a fastattn op"):
        fastattn.explain(len, [])
