"""torch's own OpInfo samples through our functions: the same values, gradients and refusals as torch's functions."""

import itertools

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db

import fastattn
from fastattn import dispatch, numerics, testing

FUNCTIONS = {
    "nn.functional.scaled_dot_product_attention": fastattn.scaled_dot_product_attention,
    "nn.functional.layer_norm": fastattn.layer_norm,
    "nn.functional.rms_norm": fastattn.rms_norm,
    "nn.functional.linear": fastattn.linear,
    "softmax": fastattn.softmax,
    "log_softmax": fastattn.log_softmax,
    "nn.functional.gelu": fastattn.gelu,
    "nn.functional.silu": fastattn.silu,
    "nn.functional.cross_entropy": fastattn.cross_entropy,
}
# Of an activation of complex numbers there is an entry of its own.
INFOS = [info for info in op_db if info.name in FUNCTIONS and torch.float32 in info.dtypes]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def identity(info) -> str:
    return info.name.removeprefix("nn.functional.") + (f"-{info.variant_test_name}" if info.variant_test_name else "")


each_op = pytest.mark.parametrize("info", INFOS, ids=identity)


def samples(info, dtype, *, requires_grad=True, limit=None):
    torch.manual_seed(0)
    drawn = info.sample_inputs("cpu", dtype, requires_grad=requires_grad)
    return itertools.islice((s for s in drawn if not s.kwargs.get("dropout_p")), limit)


def backend_for(sample) -> dict[str, str]:
    """float64 is the reference's; a forced backend (FASTATTN_BACKEND) would refuse it."""
    wide = torch.float64 in (sample.input.dtype, sample.kwargs.get("dtype"))
    return {"backend": "reference"} if wide else {}


def leaves(sample):
    """Every tensor of a sample that wants a gradient."""
    flat = torch.utils._pytree.tree_leaves((sample.input, sample.args, sample.kwargs))
    return [t for t in flat if isinstance(t, torch.Tensor) and t.requires_grad]


def results(function, sample, **kwargs):
    """(output, gradients of its sum weighted by fixed numbers)."""
    output = function(sample.input, *sample.args, **{**sample.kwargs, **kwargs})
    weights = torch.linspace(-1, 1, max(output.numel(), 1), dtype=torch.float64)[: output.numel()]
    weights = weights.reshape(output.shape).to(output.dtype)
    wanted = leaves(sample)
    gradients = torch.autograd.grad((output * weights).sum(), wanted, allow_unused=True) if wanted else ()
    return output, gradients


def test_every_op_has_samples():
    assert {info.name for info in INFOS} == set(FUNCTIONS)


def in_double(sample):
    """The same sample in float64, gradients wanted of the same tensors."""

    def convert(value):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        return value.detach().double().requires_grad_(value.requires_grad)

    return sample.transform(convert)


@each_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("contiguous", (True, False), ids=("contiguous", "noncontiguous"))
def test_values_and_gradients(info, dtype, contiguous):
    """The accuracy law over all samples of a kind together: torch in float64 is the truth, torch in dtype the peer."""
    if not info.supports_dtype(dtype, "cpu"):
        pytest.skip(f"torch has no {info.name} for {dtype} on CPU")
    kinds: dict[str, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {"output": [], "gradients": []}
    for sample in samples(info, dtype):
        sample = sample if contiguous else sample.noncontiguous()
        torchs, ours = results(info.op, sample), results(FUNCTIONS[info.name], sample, **backend_for(sample))
        truth = results(info.op, in_double(sample))
        assert ours[0].dtype == torchs[0].dtype and ours[0].shape == torchs[0].shape, sample
        kinds["output"].append((ours[0], torchs[0], truth[0]))
        for triple in zip(ours[1], torchs[1], truth[1], strict=True):
            assert (triple[0] is None) == (triple[1] is None), sample
            if triple[0] is not None:
                kinds["gradients"].append(triple)
    assert kinds["output"], "no samples"
    for kind, triples in kinds.items():
        for our, _, true in triples:
            assert numerics.same_nonfinite(our, true), kind
        our, peer, true = (
            torch.cat([t.detach().double().flatten() for t in column]) for column in zip(*triples, strict=True)
        )
        broken = numerics.violation(numerics.error(our, true), numerics.error(peer, true), dtype)
        assert broken is None, f"{kind}: {broken}"


@each_op
def test_gradients_by_finite_differences(info):
    for sample in samples(info, torch.float64, limit=24):
        wanted = leaves(sample)
        if not wanted or any(t.numel() == 0 for t in wanted):
            continue

        def call(*_, sample=sample):
            return FUNCTIONS[info.name](sample.input, *sample.args, **sample.kwargs, backend="reference")

        assert torch.autograd.gradcheck(call, wanted, fast_mode=True), sample


@each_op
def test_compiled(info):
    for sample in samples(info, torch.float32, limit=6):
        torch._dynamo.reset()
        compiled = torch.compile(FUNCTIONS[info.name], fullgraph=True, backend="aot_eager")
        (found, gradients), (expected, others) = (
            results(function, sample, **backend_for(sample)) for function in (compiled, FUNCTIONS[info.name])
        )
        for result, other in zip((found, *gradients), (expected, *others), strict=True):
            assert (result is None) == (other is None), sample
            assert result is None or testing.same_bits(result.detach(), other.detach()), sample


@each_op
def test_vmap(info):
    for sample in samples(info, torch.float32, requires_grad=False, limit=6):
        if not isinstance(sample.input, torch.Tensor) or sample.input.numel() == 0:
            continue
        function = FUNCTIONS[info.name]

        def call(x, sample=sample, function=function):
            return function(x, *sample.args, **sample.kwargs, **backend_for(sample))

        stacked = torch.stack([sample.input, sample.input * 0.5, -sample.input], dim=-1)
        dispatch.reset_served()
        found = torch.vmap(call, in_dims=-1)(stacked)
        if "reference" not in dispatch.served():
            assert testing.same_bits(found, torch.stack([call(x) for x in stacked.unbind(-1)])), sample
            continue
        # Torch's own kernels, which it maps by its own rules: their sums are of another order.
        sides = (
            torch.stack([info.op(x, *s.args, **s.kwargs) for x in stacked.to(s.input.dtype).unbind(-1)])
            for s in (sample, in_double(sample))
        )
        testing.assert_lawful(found, *sides)


@each_op
def test_error_inputs(info):
    """Where torch's samples of wrong calls raise, ours raise too, and it is one of the errors that we promise."""
    if info.error_inputs_func is None:
        pytest.skip("torch has no samples of wrong calls for it")
    for error in info.error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises((ValueError, RuntimeError, TypeError)):
            FUNCTIONS[info.name](sample.input, *sample.args, **sample.kwargs)
