"""patch: other libraries' classes are recognised by what they compute."""

import copy
import importlib
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn
from fastattn.dispatch import BackendUnsupported, reset_served, served
from fastattn.integrations import patching

E, H = 16, 4


class LlamaRMSNorm(nn.Module):
    """Rounds before the weight: the result is promoted."""

    def __init__(self, width=E, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        dtype = hidden_states.dtype
        hidden_states = hidden_states.float()
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon)).to(dtype)


class GemmaRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (y * (1.0 + self.weight.float())).type_as(x)


class T5LayerNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        variance = hidden_states.float().pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            hidden_states = hidden_states.to(self.weight.dtype)
        return self.weight * hidden_states


class CenteredNorm(LlamaRMSNorm):
    def forward(self, x):
        return F.layer_norm(x.float(), x.shape[-1:], self.weight.float(), None, self.variance_epsilon).to(x.dtype)


class BareNorm(nn.Module):
    normalized_shape = (E,)

    def forward(self, x):
        return F.layer_norm(x.float(), self.normalized_shape, None, None, 1e-5).to(x.dtype)


class NewGELUActivation(nn.Module):
    def forward(self, input):
        return 0.5 * input * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (input + 0.044715 * input.pow(3))))


class GELUActivation(nn.Module):
    def forward(self, input):
        return input * 0.5 * (1.0 + torch.erf(input / 2**0.5))


class QuickGELUActivation(nn.Module):
    def forward(self, input):
        return input * torch.sigmoid(1.702 * input)


class SiLUActivation(nn.Module):
    def forward(self, input):
        return F.silu(input)


class SwishMe(nn.Module):
    def forward(self, x):
        return x * x.sigmoid()


class Conv1D(nn.Module):
    def __init__(self, nf=24, nx=E):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x):
        size = (*x.shape[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(size)


FOREIGN = {
    LlamaRMSNorm: "RMSNorm", GemmaRMSNorm: "RMSNorm", T5LayerNorm: "RMSNorm", CenteredNorm: "LayerNorm",
    BareNorm: "LayerNorm", NewGELUActivation: "GELU", GELUActivation: "GELU", QuickGELUActivation: "GELU",
    SiLUActivation: "SiLU", SwishMe: "SiLU", Conv1D: "Conv1D",
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32),
                                    (torch.float32, torch.bfloat16)], ids=str)  # fmt: skip
def test_classes_that_compute_what_ours_do(kind, dtypes, law):
    """In every combination of an input's and a weight's dtype the result has the dtype that it had."""
    torch.manual_seed(0)
    of_input, of_weight = dtypes
    model = kind()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model.to(of_weight)
    if kind is Conv1D and of_input != of_weight:
        return  # the original refuses that
    hold = law(model, torch.randn(5, E).to(of_input))
    report = fastattn.patch(model)
    assert [entry.what for entry in report.replaced] == [f"fastattn's {FOREIGN[kind]}"]
    reset_served()
    with fastattn.use_backend("cpu"):
        hold()
    assert set(served()) == {"cpu"}
    fastattn.unpatch(model)
    assert type(model) is kind


@pytest.mark.parametrize("kind", FOREIGN, ids=lambda kind: kind.__name__)
def test_recognised_whatever_surrounds_it(kind):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            assert fastattn.patch(kind()).replaced
    finally:
        torch.set_default_dtype(before)


def test_foreign_classes_are_pickled_by_their_own_name():
    model = LlamaRMSNorm()
    fastattn.patch(model)
    function, arguments, *_ = model.__reduce_ex__(4)
    assert function is patching._new and arguments[0] is LlamaRMSNorm
    assert type(copy.deepcopy(model)) is type(model)
    again = pickle.loads(pickle.dumps(arguments[1]))  # the form; the class is this test's
    assert patching.served_class(LlamaRMSNorm, again, False) is type(model)


def test_recognising_runs_neither_hooks_nor_random_numbers():
    model, calls = LlamaRMSNorm(), []
    model.register_forward_hook(lambda *args: calls.append(1))
    weight, random = model.weight.clone(), torch.get_rng_state()
    fastattn.patch(model)
    assert calls == [] and torch.equal(model.weight, weight) and torch.equal(torch.get_rng_state(), random)


# ---- what is not ours ----


class GroupedNorm(LlamaRMSNorm):
    def forward(self, x):
        return self.weight * F.layer_norm(x.unflatten(-1, (2, -1)), (x.shape[-1] // 2,)).flatten(-2)


class CountingNorm(LlamaRMSNorm):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class GatedNorm(LlamaRMSNorm):
    def forward(self, x, gate):
        return super().forward(x) * F.silu(gate)


class HeadsNorm(LlamaRMSNorm):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, E))


class BufferNorm(LlamaRMSNorm):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(E))


class WrongEpsNorm(LlamaRMSNorm):
    """Its eps is not the number that it shows."""

    factor = 10.0

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.factor * self.variance_epsilon)


class SmallerEpsNorm(WrongEpsNorm):
    factor = 0.1


class OutsideEpsNorm(LlamaRMSNorm):
    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class UnbiasedNorm(LlamaRMSNorm):
    """Its variance is of n - 1 numbers."""

    def forward(self, x):
        centered = x - x.mean(-1, keepdim=True)
        return self.weight * centered * torch.rsqrt(x.var(-1, keepdim=True) + self.variance_epsilon)


class UnusedBiasNorm(LlamaRMSNorm):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(E))

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight, None, self.variance_epsilon)


class HalfOffsetNorm(LlamaRMSNorm):
    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], 0.5 + self.weight, self.variance_epsilon)


class RoundingNorm(LlamaRMSNorm):
    """All of it, in bfloat16."""

    def forward(self, x):
        return F.rms_norm(x.bfloat16(), x.shape[-1:], self.weight.bfloat16(), self.variance_epsilon).to(x.dtype)


class BetweenGELU(nn.Module):
    """As far from one of torch's as from the other."""

    def forward(self, x):
        return (F.gelu(x) + F.gelu(x, approximate="tanh")) / 2


class ShortTanhGELU(nn.Module):
    """A digit of its constant is missing."""

    def forward(self, x):
        return 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.0447 * x**3)))


class ClippedGELU(nn.Module):
    def forward(self, x):
        return F.gelu(x).clamp(max=1e3)


class ShortQuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.7 * x)


class NearlySiLU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.0001 * x)


class SiLUInPlace(nn.Module):
    def forward(self, x):
        return F.silu(x, inplace=True)


class Conv1d(Conv1D):
    """Without its bias."""

    def forward(self, x):
        return x @ self.weight


NORMS = (
    WrongEpsNorm, SmallerEpsNorm, OutsideEpsNorm, UnbiasedNorm, UnusedBiasNorm, HalfOffsetNorm, RoundingNorm,
    GroupedNorm,
)  # fmt: skip
ACTIVATIONS = (BetweenGELU, ShortTanhGELU, ClippedGELU, ShortQuickGELU, NearlySiLU)
NOT_OURS = {
    **dict.fromkeys(NORMS, "it computes neither RMSNorm nor LayerNorm over the last dimension"),
    **dict.fromkeys(ACTIVATIONS, "it computes neither SiLU nor GELU by erf, tanh or a sigmoid"),
    SiLUInPlace: "its forward changes the module or its input",
    Conv1d: "it does not compute x @ weight + bias",
    CountingNorm: "its forward changes the module or its input",
    GatedNorm: "its forward does not take a tensor: TypeError",
    HeadsNorm: "its parameters are no vector and a bias: weight of shapes",
    BufferNorm: "it has parts or buffers",
}


@pytest.mark.parametrize("kind", NOT_OURS, ids=lambda kind: kind.__name__)
def test_classes_that_only_have_the_name(kind):
    model = kind()
    report = fastattn.patch(model)
    assert report.replaced == () and report.left[0].what.startswith(NOT_OURS[kind])
    assert type(model) is kind and getattr(model, "calls", 0) == 0
    with pytest.raises(BackendUnsupported):
        fastattn.patch(model, strict=True)


class GatedMLP(nn.Module):
    def __init__(self, act=nn.SiLU):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(E, 24, bias=False), nn.Linear(E, 24)
        self.down_proj, self.act_fn = nn.Linear(24, E), act()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class PackedMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj, self.activation_fn = nn.Linear(E, 48), nn.Linear(24, E), nn.SiLU()

    def forward(self, hidden_states):
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(up * self.activation_fn(gate))


class Nearly(NearlySiLU):
    """By another name."""


class SwappedMLP(GatedMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


@pytest.mark.parametrize("kind", [GatedMLP, PackedMLP])
@pytest.mark.parametrize("autocast", [False, True])
def test_gated_layers(kind, autocast, law, classes):
    torch.manual_seed(0)
    model, x = kind(), torch.randn(3, E)
    kinds = classes(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hold = law(model, x)
        report = fastattn.patch(model)
        explanation = fastattn.explain(model, x)
        hold()
    assert report.replaced[0] == patching.Entry("", kind.__name__, "fastattn's SwiGLU") and report.others == {}
    assert [row.kernel for row in explanation.rows if row.op == "swiglu"] == ["cpu"]
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    if not autocast:
        hold(torch.compile(model, backend="aot_eager", fullgraph=True))
    fastattn.unpatch(model)
    assert classes(model) == kinds


def test_gated_layers_call_their_parts(law):
    torch.manual_seed(0)
    model, x, calls = GatedMLP(), torch.randn(3, E), []
    expected, hold = model(x), law(model, x)
    fastattn.patch(model)
    model.up_proj.register_forward_hook(lambda *args: calls.append("up"))
    assert fastattn.explain(model, x).left == () and calls == ["up"]
    model.act_fn.register_forward_hook(lambda *args: calls.append("act"))
    hold()
    assert sorted(calls) == ["act", "up", "up"]
    model.act_fn = nn.ReLU()
    assert "its activation has hooks or was replaced" in str(fastattn.explain(model, x))
    assert not torch.allclose(model(x), expected)
    model.act_fn = nn.SiLU()
    assert fastattn.patch(model).replaced == (patching.Entry("act_fn", "SiLU", "fastattn's SiLU"),)
    assert [row.op for row in fastattn.explain(model, x).rows if row.op in ("silu", "swiglu")] == ["swiglu"]
    model.double()
    assert model(x.double()).dtype == torch.float64


@pytest.mark.parametrize(
    "make", [SwappedMLP, lambda: GatedMLP(nn.GELU), lambda: GatedMLP(nn.ReLU), lambda: GatedMLP(Nearly)]
)
def test_layers_that_are_not_swiglu_only_have_their_parts_replaced(make, law):
    torch.manual_seed(0)
    model = make()
    hold = law(model, torch.randn(3, E))
    report = fastattn.patch(model, strict=True)
    assert "" not in {entry.path for entry in report.replaced} and len(report.replaced) >= 3
    hold()


class FastNorm(nn.LayerNorm):
    """As timm's: a subclass with a forward of its own, which does what it did."""

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


def test_overrides_that_are_known_are_asked_what_they_compute(monkeypatch, law):
    torch.manual_seed(0)
    model = FastNorm(E)
    hold = law(model, torch.randn(3, E))
    assert fastattn.patch(model).left[0].what == "a subclass of LayerNorm with a forward of its own"
    monkeypatch.setattr(patching, "KNOWN_OVERRIDES", {f"{FastNorm.__module__}.FastNorm"})
    assert fastattn.patch(model).replaced[0].what == "fastattn's LayerNorm"
    hold()
    fastattn.unpatch(model)
    assert type(model) is FastNorm


TRANSFORMERS = {
    "llama": ("LlamaRMSNorm", 0.0, "promoted"), "mistral": ("MistralRMSNorm", 0.0, "promoted"),
    "mixtral": ("MixtralRMSNorm", 0.0, "promoted"), "qwen2": ("Qwen2RMSNorm", 0.0, "promoted"),
    "qwen3": ("Qwen3RMSNorm", 0.0, "promoted"), "gemma": ("GemmaRMSNorm", 1.0, "input"),
    "gemma2": ("Gemma2RMSNorm", 1.0, "input"), "gemma3": ("Gemma3RMSNorm", 1.0, "input"),
    "phi3": ("Phi3RMSNorm", 0.0, "promoted"), "olmo2": ("Olmo2RMSNorm", 0.0, "input"),
    "granite": ("GraniteRMSNorm", 0.0, "promoted"), "smollm3": ("SmolLM3RMSNorm", 0.0, "promoted"),
    "gpt_oss": ("GptOssRMSNorm", 0.0, "input"), "t5": ("T5LayerNorm", 0.0, "weight"),
    "cohere": ("CohereLayerNorm", 0.0, "input"), "olmo": ("OlmoLayerNorm", 0.0, "input"),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_norms_of_transformers(name, law):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind, offset, result = TRANSFORMERS[name]
    model = getattr(importlib.import_module(f"transformers.models.{name}.modeling_{name}"), kind)(E)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(5, E)
    hold = law(model, x)
    assert fastattn.patch(model).replaced
    assert (model.fastattn_offset, model.fastattn_result) == (offset, result)
    hold()
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_activations_and_conv1d_of_transformers():
    activations = pytest.importorskip("transformers.activations")
    from transformers.pytorch_utils import Conv1D as Theirs

    fates = {}
    for name in ("gelu", "gelu_10", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "gelu_accurate",
                 "quick_gelu", "silu", "relu"):  # fmt: skip
        module = activations.ACT2FN[name]
        report = fastattn.patch(module)
        fate = [entry.what.removeprefix("fastattn's ") for entry in report.replaced] or ["left"] * len(report.left)
        fates[name] = " ".join((*fate, *getattr(module, "fastattn_form", ())))
    assert fates == {
        "gelu": "GELU none", "gelu_10": "left", "gelu_fast": "GELU tanh", "gelu_new": "GELU tanh",
        "gelu_python": "GELU none", "gelu_pytorch_tanh": "GELU tanh", "gelu_accurate": "GELU tanh",
        "quick_gelu": "GELU sigmoid", "silu": "SiLU", "relu": "",
    }  # fmt: skip
    from transformers import LlamaConfig, Phi3Config
    from transformers.models.llama.modeling_llama import LlamaMLP
    from transformers.models.phi3.modeling_phi3 import Phi3MLP

    with torch.device("meta"):
        gated = LlamaMLP(LlamaConfig()), Phi3MLP(Phi3Config())
    assert [fastattn.patch(layer).replaced[0].what for layer in gated] == ["fastattn's SwiGLU"] * 2
    model = Theirs(24, E)
    assert fastattn.patch(model).replaced and repr(model) == "Conv1D(nf=24, nx=16)"
