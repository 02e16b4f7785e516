"""Apex's norms: results, gradients and dtypes, memory_efficient beside not, what is saved, and the stand-in."""

import functools
import importlib.util

import pytest
import torch

from fastattn import testing
from fastattn.cases import Case, Suite
from fastattn.integrations import apex


def layer_norm(input, weight=None, bias=None, normalized_shape=(), eps=1e-6, **_):
    return torch.nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)


def rms_norm(input, weight=None, normalized_shape=(), eps=1e-6, **_):
    return torch.nn.functional.rms_norm(input, normalized_shape, weight, eps)


FORMULAS = {"LayerNorm": layer_norm, "RMSNorm": rms_norm}


def case(name, *shape, dims=1, weight=True, bias=True, **call):
    def build(s):
        drawn = {"input": s.normal(*shape, mean=0.3), "normalized_shape": shape[-dims:], **call}
        if weight:
            drawn["weight"] = s.normal(*shape[-dims:], mean=1.0, std=0.1)
        if weight and bias:
            drawn["bias"] = s.normal(*shape[-dims:])
        return drawn

    return Case(name, build, draws=3)


def cases(bias):
    return tuple(
        case(
            f"{name}, {'output' if efficient else 'input'} saved", *shape, bias=bias, memory_efficient=efficient, **call
        )
        for efficient in (False, True)
        for name, shape, call in (
            ("rows", (7, 5, 96), {}),
            ("two dimensions", (9, 6, 20), {"dims": 2}),
            ("no parameters", (21, 96), {"weight": False}),
            ("a large eps", (21, 96), {"eps": 0.5}),
        )
    )


DIFFERENTIABLE = ("input", "weight", "bias")
LAYER = Suite("fused_layer_norm", layer_norm, layer_norm, layer_norm, DIFFERENTIABLE, ("output",), cases(True))
RMS = Suite("fused_rms_norm", rms_norm, rms_norm, rms_norm, DIFFERENTIABLE, ("output",), cases(False))


def by_function(name):
    def call(input, normalized_shape, weight=None, bias=None, **options):
        if weight is None:
            return getattr(apex, name)(input, normalized_shape, **options)
        parameters = (weight,) if bias is None else (weight, bias)
        return getattr(apex, f"{name}_affine")(input, *parameters, normalized_shape, **options)

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("suite", "case"), [(suite, case) for suite in (LAYER, RMS) for case in suite.cases], ids=lambda x: x.name
)
def test_functions(suite, case, dtype, skip_without_native):
    testing.check(by_function(suite.name), suite, case, dtype=dtype)


@pytest.mark.parametrize("efficient", [False, True])
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_modules(name, efficient, hold_to):
    module = getattr(apex, f"Fused{name}")(32, memory_efficient=efficient)
    assert module.state_dict().keys() == getattr(torch.nn, name)(32).state_dict().keys() and module.eps == 1e-5
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(0.5, 1.5)
    x = torch.randn(4, 32, requires_grad=True)
    leaves, output, grad = [x, *module.parameters()], module(x), torch.randn(4, 32)
    exact = functools.partial(FORMULAS[name], normalized_shape=(32,), eps=1e-5)
    hold_to(exact, leaves, [output, *torch.autograd.grad(output, leaves, grad)], grad)
    plain = getattr(apex, f"Fused{name}")([4, 32], elementwise_affine=False)
    assert not list(plain.parameters()) and plain(x).shape == x.shape
    assert "eps=1e-05" in repr(plain)


@pytest.mark.parametrize("efficient", [False, True])
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_dtypes(name, efficient):
    """The input's, or for the mixed ones the parameters'."""
    for of_input, of_weight in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        x = torch.randn(4, 32).to(of_input).requires_grad_()
        plain = getattr(apex, f"Fused{name}")(32, memory_efficient=efficient).to(of_weight)
        mixed = getattr(apex, f"MixedFused{name}")(32, memory_efficient=efficient).to(of_weight)
        assert plain(x).dtype == of_input and mixed(x).dtype == of_weight
        peer, truth = (FORMULAS[name](t.detach(), normalized_shape=(32,), eps=1e-5) for t in (x.float(), x.double()))
        testing.assert_lawful(mixed(x).detach(), peer.to(of_weight), truth)
        for module in (plain, mixed):
            grads = torch.autograd.grad(module(x).sum(), [x, module.weight])
            assert [g.dtype for g in grads] == [of_input, of_weight]


def saved(call):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        output = call()
    return output, kept


@pytest.mark.parametrize("name", ["FusedLayerNorm", "FusedRMSNorm", "MixedFusedLayerNorm", "MixedFusedRMSNorm"])
def test_what_is_saved(name):
    """The output instead of the input, one statistic and the parameters."""
    x = torch.randn(64, 32, requires_grad=True)
    module = getattr(apex, name)(32, memory_efficient=True)
    output, kept = saved(lambda: module(x))
    assert output.data_ptr() in kept and x.data_ptr() not in kept
    assert len(kept) == 2 + len(list(module.parameters()))
    _, kept = saved(lambda: getattr(apex, name)(32)(x))
    assert x.data_ptr() in kept


def test_weights_of_nothing_divide_nothing():
    module = apex.FusedLayerNorm(8, memory_efficient=True)
    with torch.no_grad():
        module.weight[3] = 0.0
    x = torch.randn(5, 8, requires_grad=True)
    grads = torch.autograd.grad((module(x) * torch.randn(5, 8)).sum(), [x, module.weight, module.bias])
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("efficient", [False, True])
def test_compiled_and_transformed(efficient, hold_to):
    torch._dynamo.reset()
    module = apex.FusedLayerNorm(16, memory_efficient=efficient)
    x = torch.randn(3, 16, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))
    found = torch.func.grad(lambda t: module(t).pow(3).sum())(x)
    hold_to(
        lambda t: torch.autograd.grad(layer_norm(t, normalized_shape=(16,), eps=1e-5).pow(3).sum(), t)[0], [x], [found]
    )


def test_refused():
    with pytest.raises(ValueError, match="there is no elementwise_affine=False"):
        apex.MixedFusedLayerNorm(8, elementwise_affine=False)
    apex.MixedFusedRMSNorm(8, elementwise_affine=True)
    with pytest.raises(TypeError, match="unexpected arguments: other"):
        apex.MixedFusedRMSNorm(8, other=1)
    for efficient in (False, True):
        with pytest.raises(ValueError, match="last dimensions must be normalized_shape"):
            apex.FusedRMSNorm(8, memory_efficient=efficient)(torch.randn(2, 9))
        with pytest.raises(ValueError, match="input must be float32"):
            apex.FusedLayerNorm(8, memory_efficient=efficient)(torch.ones(2, 8, dtype=torch.int64))


@pytest.mark.skipif(importlib.util.find_spec("apex") is not None, reason="apex is installed")
def test_installed():
    assert apex.install()
    try:
        from apex.normalization import FusedRMSNorm, MixedFusedLayerNorm
        from apex.normalization.fused_layer_norm import FusedLayerNorm, fused_rms_norm_affine

        assert FusedRMSNorm is apex.FusedRMSNorm and MixedFusedLayerNorm is apex.MixedFusedLayerNorm
        assert FusedLayerNorm is apex.FusedLayerNorm and fused_rms_norm_affine is apex.fused_rms_norm_affine
        with pytest.raises(ImportError):
            from apex import amp  # noqa: F401
    finally:
        apex.uninstall()
    assert importlib.util.find_spec("apex") is None
