"""patch and unpatch: what is replaced, what is left and why; a model stays the same model."""

import copy
import io
import pickle
import subprocess
import sys

import hypothesis
import pytest
import torch
from hypothesis import strategies
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fastattn
from fastattn.dispatch import BackendUnsupported, reset_served, served
from fastattn.integrations import patching
from fastattn.nn.served import Served

E, H = 16, 4


class Block(nn.Module):
    """One of everything."""

    def __init__(self):
        super().__init__()
        self.norm, self.rms = nn.LayerNorm(E), nn.RMSNorm(E)
        self.attention = nn.MultiheadAttention(E, H, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(E, 2 * E), nn.GELU(), nn.Linear(2 * E, E), nn.SiLU(), nn.Dropout(0.0))
        self.encoder = nn.TransformerEncoderLayer(E, H, 2 * E, 0.0, batch_first=True)
        self.decoder = nn.TransformerDecoderLayer(E, H, 2 * E, 0.0, batch_first=True)
        self.log_softmax, self.softmax = nn.LogSoftmax(-1), nn.Softmax(-1)
        self.loss = nn.CrossEntropyLoss(reduction="none")
        self.embedding = nn.Embedding(10, E)

    def forward(self, ids):
        x = self.norm(self.embedding(ids))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.decoder(self.encoder(x + self.mlp(self.rms(x))), x)
        return self.loss(self.log_softmax(x).flatten(0, 1), ids.flatten()) + self.softmax(x).square().sum(-1).flatten()


def block():
    torch.manual_seed(0)
    return Block()


IDS = torch.arange(20).reshape(2, 10) % 10


def state(model):
    """All that a module holds: hooks and attributes included."""
    return [(path, sorted(module.__dict__), module.training) for path, module in model.named_modules()]


def gradients(model):
    model.zero_grad()
    model(IDS).sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def test_everything_is_replaced_and_computes_the_same(law):
    model = block()
    hold = law(model, IDS)
    keys, before = list(model.state_dict()), state(model)
    parameters = list(model.parameters())
    report = fastattn.patch(model)
    by = {entry.path: entry.what for entry in report.replaced}
    assert by["norm"] == "fastattn's LayerNorm" and by["mlp.1"] == "fastattn's GELU"
    assert by["mlp.3"] == "fastattn's SiLU"
    assert by["encoder"] == "fastattn's TransformerEncoderLayer" and by["encoder.self_attn"]
    assert {path for path in by if "." not in path} == {
        "norm", "rms", "attention", "encoder", "decoder", "log_softmax", "softmax", "loss",
    }  # fmt: skip
    assert report.left == () and report.others == {"Dropout": 8, "Embedding": 1}
    assert list(model.state_dict()) == keys and state(model) == before
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    reset_served()
    hold()
    assert set(served()) == {"cpu"}
    assert isinstance(model.norm, nn.LayerNorm) and type(model.norm).__name__ == "LayerNorm"
    assert repr(model.norm) == repr(nn.LayerNorm(E))


def test_round_trip_is_bit_identical(classes):
    model = block()
    before, kinds, expected, wanted = state(model), classes(model), model(IDS), gradients(model)
    bits = {key: value.clone() for key, value in model.state_dict().items()}
    report = fastattn.patch(model)
    assert classes(model) != kinds
    assert fastattn.unpatch(model) == len(report.replaced)
    assert classes(model) == kinds and state(model) == before
    assert all(torch.equal(value, bits[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(IDS), expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), wanted, strict=True))
    assert fastattn.unpatch(model) == 0


def test_patching_twice_is_harmless(classes):
    model = block()
    first = fastattn.patch(model)
    kinds = classes(model)
    second = fastattn.patch(model)
    assert second.replaced == () and len(second.already) == len(first.replaced) and classes(model) == kinds


def test_the_model_itself_may_be_what_is_replaced():
    model = nn.Linear(3, 4)
    assert [entry.path for entry in fastattn.patch(model).replaced] == [""]
    assert isinstance(model, Served)
    fastattn.unpatch(model)
    assert type(model) is nn.Linear


def test_modules_of_ours_stay_ours():
    model = nn.Sequential(fastattn.nn.Linear(3, 4), nn.Linear(4, 3))
    report = fastattn.patch(model)
    assert [entry.path for entry in report.already] == ["0"] and [entry.path for entry in report.replaced] == ["1"]
    assert fastattn.unpatch(model) == 1
    assert type(model[0]) is fastattn.nn.Linear


def test_nothing_to_patch_is_said():
    assert str(fastattn.patch(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.ReLU()))) == (
        "nothing to patch: fastattn has no kernel for Conv2d (1), ReLU (2)"
    )
    empty = nn.Sequential(nn.ModuleDict(), nn.Identity())
    assert str(fastattn.patch(empty)) == "nothing to patch: fastattn has no kernel for anything in it"


def test_the_report_is_a_table():
    lines = str(fastattn.patch(block())).splitlines()
    assert lines[0] == "24 modules replaced, 0 left, 0 were ours already"
    assert any("LayerNorm" in line and "fastattn's LayerNorm: norm ... decoder.norm3" in line for line in lines)
    assert lines[-1] == "  no kernel for Dropout (8), Embedding (1)"


def test_other_arguments_are_refused():
    for function in (fastattn.patch, fastattn.unpatch):
        with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, got dict"):
            function({})
    with pytest.raises(TypeError, match="exclude holds patterns and classes, got 3"):
        fastattn.patch(nn.Linear(2, 2), exclude=[3])


def test_exclude():
    model = block()
    report = fastattn.patch(model, exclude=["mlp.*", nn.RMSNorm])
    assert {entry.path: entry.what for entry in report.left} == dict.fromkeys(
        ("rms", "mlp.0", "mlp.1", "mlp.2", "mlp.3"), "excluded"
    )
    assert type(model.mlp[0]) is nn.Linear and isinstance(model.encoder.linear1, Served)
    fastattn.patch(model, strict=True, exclude=["mlp.*", nn.RMSNorm])  # what is asked for is no failure


# ---- what is left ----


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Named(nn.Linear):
    """Only more of what a Linear is."""

    def width(self):
        return self.out_features


class OtherFeedForward(nn.TransformerEncoderLayer):
    def _ff_block(self, x):
        return x


def replaced_forward():
    module = nn.Linear(3, 4)
    module.forward = lambda x: x
    return module


LEFT = {
    "another forward": (lambda: Doubled(3, 4), "a subclass of Linear with a forward of its own"),
    "another part": (
        lambda: OtherFeedForward(8, 2),
        "a subclass of TransformerEncoderLayer with a _ff_block of its own",
    ),
    "forward of the instance": (replaced_forward, "its forward has been replaced on the module itself"),
    "lazy": (lambda: nn.LazyLinear(4), "its parameters are not there yet: call the model once before patching"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_is_said(name):
    make, why = LEFT[name]
    model = nn.Sequential(make(), nn.LayerNorm(4))
    report = fastattn.patch(model)
    assert [(entry.path, entry.what) for entry in report.left] == [("0", why)]
    assert why in str(report) and not isinstance(model[0], Served) and isinstance(model[1], Served)


@pytest.mark.parametrize("name", LEFT)
def test_strict_raises_and_changes_nothing(name, classes):
    make, why = LEFT[name]
    model = nn.Sequential(nn.LayerNorm(4), make())
    kinds = classes(model)
    with pytest.raises(BackendUnsupported, match=why):
        fastattn.patch(model, strict=True)
    assert classes(model) == kinds


def test_subclasses_that_change_nothing_are_served():
    model = Named(3, 4)
    fastattn.patch(model)
    assert isinstance(model, Served) and isinstance(model, Named) and model.width() == 4
    fastattn.unpatch(model)
    assert type(model) is Named


def test_lazy_modules_are_served_once_they_are_there():
    model = nn.LazyLinear(4)
    model(torch.randn(2, 3))
    assert fastattn.patch(model).replaced


def test_strict_modules_raise_in_calls_that_they_cannot_serve():
    model = nn.LayerNorm(E)
    fastattn.patch(model, strict=True)
    model(torch.randn(2, E))
    with pytest.raises(BackendUnsupported, match=r"LayerNorm: has no kernel for torch\.float64"):
        model.double()(torch.randn(2, E, dtype=torch.float64))
    fastattn.patch(model)  # no longer strict
    model(torch.randn(2, E, dtype=torch.float64))
    fastattn.unpatch(model)
    assert type(model) is nn.LayerNorm


def test_nothing_is_left_half_patched(monkeypatch, classes):
    class Stubborn(nn.Linear):
        def __setattr__(self, name, value):
            if name == "__class__":
                raise KeyboardInterrupt
            super().__setattr__(name, value)

    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), Stubborn(4, 4), nn.GELU())
    kinds = classes(model)
    with pytest.raises(KeyboardInterrupt):
        fastattn.patch(model)
    assert classes(model) == kinds
    monkeypatch.setattr(patching, "judge", lambda module: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fastattn.patch(model)
    assert classes(model) == kinds


# ---- it stays the same model ----


def test_hooks_are_kept_and_called():
    model, calls = block(), []
    model.norm.register_forward_hook(lambda *args: calls.append("before"))
    fastattn.patch(model)
    model.norm.register_forward_pre_hook(lambda *args: calls.append("after"))
    model(IDS)
    fastattn.unpatch(model)
    model(IDS)
    assert calls == ["after", "before"] * 2


def test_copies_are_patched_and_independent(classes):
    model = block()
    fastattn.patch(model)
    twin = copy.deepcopy(model)
    assert classes(twin) == classes(model)
    assert torch.equal(twin(IDS), model(IDS))
    with torch.no_grad():
        twin.norm.weight.zero_()
    assert model.norm.weight.ne(0).any()
    fastattn.unpatch(model)
    assert isinstance(twin.norm, Served) and fastattn.unpatch(twin) == 24
    assert classes(twin) == classes(block())


@pytest.mark.parametrize("protocol", [1, 2, 5])
def test_pickled(protocol, classes):
    model = block()
    fastattn.patch(model)
    twin = pickle.loads(pickle.dumps(model, protocol))
    assert classes(twin) == classes(model) and torch.equal(twin(IDS), model(IDS))
    fastattn.unpatch(twin)
    assert classes(twin) == classes(block())


def test_pickled_for_another_process(tmp_path):
    model = nn.Sequential(nn.LayerNorm(E), nn.TransformerEncoderLayer(E, H, E, 0.0), nn.Linear(E, 3))
    fastattn.patch(model)
    torch.save({"model": model, "output": model(torch.ones(2, 2, E))}, tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "saved = torch.load(sys.argv[1], weights_only=False)\n"
        "model = saved['model']\n"
        "assert torch.equal(model(torch.ones(2, 2, 16)), saved['output'])\n"
        "import fastattn\n"
        "assert fastattn.patch(model).replaced == ()\n"
        "assert fastattn.unpatch(model) > 5\n"
        "assert type(model[0]) is torch.nn.LayerNorm and type(model[1].self_attn) is torch.nn.MultiheadAttention\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt"], check=True, timeout=120)


def test_state_dict_goes_in_and_out(law):
    model, other = block(), block()
    fastattn.patch(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    model.load_state_dict(other.state_dict())
    law(other, IDS)(model)


def test_optimizers_go_on():
    model = block()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = model(IDS).sum()
    fastattn.patch(model)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(IDS).sum()
        loss.backward()
        optimizer.step()
    assert model(IDS).sum() < first


def test_shared_modules_and_parameters_stay_shared():
    norm = nn.LayerNorm(4)
    model = nn.Sequential(norm, nn.Linear(4, 4), norm)
    model[1].weight = nn.Parameter(torch.eye(4))
    assert len(fastattn.patch(model).replaced) == 2 and model[0] is model[2] is norm


def test_compiled_models_are_recompiled(law):
    model = nn.Sequential(nn.LayerNorm(E), nn.GELU())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, E)
    expected, hold = compiled(x), law(model, x)
    fastattn.patch(model)
    graphs = []

    def backend(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    hold(torch.compile(model, backend=backend, fullgraph=True))
    assert any("fastattn.layer_norm.cpu" in name for name in graphs[0])
    hold(compiled)
    fastattn.unpatch(model)
    assert torch.equal(compiled(x), expected)


def test_autocast(law):
    model = block()
    with torch.autocast("cpu", torch.bfloat16):
        hold = law(model, IDS)
        fastattn.patch(model)
        hold()


def test_a_model_on_the_meta_device_is_patched_before_it_has_memory():
    with torch.device("meta"):
        model = Block()
    assert len(fastattn.patch(model).replaced) == 24
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    assert model(IDS).isfinite().all()


# ---- parametrizations ----


def weight_norm_pair():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5))


@pytest.mark.parametrize("first", ["patched", "parametrized"])
@pytest.mark.parametrize("undone", ["parametrization", "patch"])
def test_parametrizations(first, undone, law):
    model, x = weight_norm_pair(), torch.randn(3, 4)
    plain, twin = law(model, x), copy.deepcopy(model)
    parametrizations.weight_norm(twin[0])
    normed = law(twin, x)
    if first == "patched":
        fastattn.patch(model)
        parametrizations.weight_norm(model[0])
    else:
        parametrizations.weight_norm(model[0])
        parametrized = type(model[0])
        twin = copy.deepcopy(model)  # its class is shared
        fastattn.patch(model)
        assert type(twin[0]) is parametrized
    assert isinstance(model[0], Served) and parametrize.is_parametrized(model[0])
    normed(model)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    if undone == "patch":
        assert fastattn.unpatch(model) == 2
        assert not isinstance(model[0], Served) and parametrize.is_parametrized(model[0])
        assert first == "patched" or type(model[0]) is parametrized
        normed(model)
        parametrize.remove_parametrizations(model[0], "weight")
        assert type(model[0]) is nn.Linear
    else:
        parametrize.remove_parametrizations(model[0], "weight")
        assert isinstance(model[0], Served) and not parametrize.is_parametrized(model[0])
        plain()
        fastattn.unpatch(model)
        assert type(model[0]) is nn.Linear


# ---- any model ----

LEAVES = {
    "linear": lambda: nn.Linear(E, E), "norm": lambda: nn.LayerNorm(E), "rms": lambda: nn.RMSNorm(E),
    "gelu": lambda: nn.GELU(), "silu": lambda: nn.SiLU(), "softmax": lambda: nn.Softmax(-1),
    "relu": lambda: nn.ReLU(),
    "doubled": lambda: Doubled(E, E), "named": lambda: Named(E, E), "ours": lambda: fastattn.nn.LayerNorm(E),
    "encoder": lambda: nn.TransformerEncoderLayer(E, H, E, 0.0, batch_first=True),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(E, E)),
}  # fmt: skip
trees = strategies.recursive(
    strategies.sampled_from(sorted(LEAVES)), lambda inner: strategies.lists(inner, min_size=1, max_size=4), max_leaves=8
)


def built(tree):
    return LEAVES[tree]() if isinstance(tree, str) else nn.Sequential(*map(built, tree))


@hypothesis.given(tree=trees, strict=strategies.booleans(), seed=strategies.integers(0, 99))
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
def test_any_tree_of_modules(classes, law, tree, strict, seed):
    torch.manual_seed(seed)
    model, x = built(tree), torch.randn(2, 3, E)
    kinds, held, expected, hold = classes(model), state(model), model(x), law(model, x)
    try:
        report = fastattn.patch(model, strict=strict)
    except BackendUnsupported:
        assert strict and any(issubclass(kind, Doubled) for kind in kinds)
        assert classes(model) == kinds
        return
    assert not (strict and report.left)
    hold()
    assert fastattn.unpatch(model) == len(report.replaced)
    assert classes(model) == kinds and state(model) == held and torch.equal(model(x), expected)
