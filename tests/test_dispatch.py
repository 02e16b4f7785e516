"""Choosing a backend: who is asked, who answers, and that forced means forced."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn import backends, dispatch
from fastattn.dispatch import OPS, BackendUnsupported, explain, use_backend
from fastattn.testing.opcheck import available_backends

X = torch.randn(1, 2, 5, 8)
DOUBLE = X.double()
NAMES = list(backends.BACKENDS)


def attend(*args, **kwargs):
    return fastattn.scaled_dot_product_attention(*args, **kwargs)


@pytest.fixture(autouse=True)
def automatic():
    """Whatever FASTATTN_BACKEND says, these tests start from the automatic choice."""
    with use_backend(None):
        yield


@pytest.fixture
def counted():
    dispatch.reset_served()
    yield dispatch.served
    dispatch.reset_served()


@pytest.mark.parametrize("name", available_backends("cpu"))
def test_the_argument_chooses(name, counted):
    attend(X, X, X, backend=name)
    assert counted() == {name: 1}


@pytest.mark.parametrize("name", available_backends("cpu"))
def test_use_backend_chooses_and_restores(name, counted):
    with use_backend(name):
        attend(X, X, X)
        assert counted() == {name: 1}
    assert dispatch._forced["backend"] is None


def test_use_backend_restores_after_an_error():
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert dispatch._forced["backend"] is None


def test_use_backend_nests(counted):
    with use_backend("reference"):
        with use_backend(None):
            assert dispatch._forced["backend"] is None
        assert dispatch._forced["backend"] == "reference"


def test_the_argument_comes_before_use_backend(counted, skip_without_native):
    with use_backend("cpu"):
        attend(X, X, X, backend="reference")
    assert counted() == {"reference": 1}


def test_the_automatic_choice_is_the_priority_list(counted, skip_without_native):
    attend(X, X, X)
    attend(DOUBLE, DOUBLE, DOUBLE)
    assert counted() == {"cpu": 1, "reference": 1}
    assert backends.PRIORITY["cpu"] == ("cpu", "reference")


def test_forced_means_forced(counted, skip_without_native):
    for force in (lambda: attend(DOUBLE, DOUBLE, DOUBLE, backend="cpu"), lambda: _within("cpu", DOUBLE)):
        with pytest.raises(BackendUnsupported):
            force()
    assert counted() == {}


def _within(name, x):
    with use_backend(name):
        return attend(x, x, x)


def test_a_cached_choice_does_not_outlive_the_force(counted, skip_without_native):
    for name in ("cpu", "reference", "cpu"):
        with use_backend(name):
            attend(X, X, X)
    attend(X, X, X, backend="reference")
    attend(X, X, X)
    assert counted() == {"cpu": 3, "reference": 2}


def test_unsupported_lists_the_problem_and_every_backends_reason(skip_without_native):
    with pytest.raises(BackendUnsupported) as raised:
        attend(DOUBLE, DOUBLE, DOUBLE, backend="cpu")
    lines = str(raised.value).splitlines()
    assert lines[0] == "attention: backend 'cpu' was asked for and cannot serve this call"
    assert "device=cpu, dtype=torch.float64" in lines[1] and "head_dim=8" in lines[1]
    assert "  cpu: has no kernel for torch.float64: float32, bfloat16, float16" in lines
    assert "  reference: could serve it" in lines
    assert all(any(line.startswith(f"  {name}: ") for line in lines) for name in NAMES)


@pytest.mark.parametrize(
    ("call", "op"),
    [
        (lambda: attend(DOUBLE, DOUBLE, DOUBLE, backend="cpu"), "attention"),
        (lambda: fastattn.layer_norm(DOUBLE, 8, backend="cpu"), "layer_norm"),
        (lambda: fastattn.rms_norm(DOUBLE, 8, backend="cpu"), "rms_norm"),
        (lambda: fastattn.softmax(DOUBLE, -1, backend="cpu"), "softmax"),
        (lambda: fastattn.log_softmax(DOUBLE, -1, backend="cpu"), "softmax"),
        (lambda: fastattn.cross_entropy(DOUBLE[0, 0], torch.arange(5), backend="cpu"), "cross_entropy"),
    ],
)
def test_every_op_refuses_in_the_same_words(call, op, skip_without_native):
    with pytest.raises(BackendUnsupported, match=f"^{op}: backend 'cpu' was asked for"):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: attend(X, X, X, backend="gpu"),
        lambda: fastattn.softmax(X, -1, backend="gpu"),
        lambda: dispatch.set_backend("gpu"),
        lambda: use_backend("gpu").__enter__(),
    ],
)
def test_unknown_names_are_errors_that_list_the_known_ones(call):
    with pytest.raises(ValueError, match=r"unknown backend 'gpu'; there are cpu, triton, reference"):
        call()


def test_cpu_refuses_head_dims_that_it_has_no_room_for(skip_without_native):
    x = torch.randn(1, 1, 2, 513)
    with pytest.raises(BackendUnsupported, match="head dims are 1 to 512, got 513 and 513"):
        attend(x, x, x, backend="cpu")
    assert attend(x, x, x).shape == x.shape  # the reference serves it


def test_other_devices_are_not_the_cpu_backends(skip_without_native):
    x = X.to("meta")
    reasons = explain(attend_function(), x, x, x).reasons
    assert reasons["cpu"] == "serves cpu tensors, not meta" and reasons["reference"] is None


def attend_function():
    return fastattn.scaled_dot_product_attention


def test_explain_computes_nothing_and_says_who_and_why(skip_without_native, counted):
    told = explain(attend_function(), X, X, X, is_causal=True)
    assert counted() == {}
    assert (told.op, told.backend, told.reasons) == (
        "attention",
        "cpu",
        {"cpu": None, "triton": "serves cuda tensors, not cpu", "reference": None},
    )
    first, problem, *verdicts = str(told).splitlines()
    assert first == "attention: cpu"
    assert problem.startswith(
        "  device=cpu, dtype=torch.float32, batch=1, heads=2, kv_heads=2, queries=5, keys=5, head_dim=8, value_dim=8,"
        " mask_dtype=None, mask_grad=False, is_causal=True, causal_alignment=top_left, dropout=False"
    )
    # A torch without a registry for attention is noted behind them.
    assert verdicts[:3] == [
        "  cpu: serves it",
        "  triton: serves cuda tensors, not cpu",
        "  reference: could serve it",
    ]


def test_explain_of_a_call_that_would_raise(skip_without_native):
    told = explain(attend_function(), DOUBLE, DOUBLE, DOUBLE, backend="cpu")
    assert told.backend is None
    assert str(told).startswith("attention: no backend can serve this call\n")
    assert "  cpu: has no kernel for torch.float64" in str(told)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "softmax", "log_softmax", "cross_entropy"])
def test_explain_takes_every_op(name):
    arguments = {
        "layer_norm": (X, (8,)),
        "rms_norm": (X, (8,)),
        "softmax": (X, -1),
        "log_softmax": (X, -1),
        "cross_entropy": (X[0, 0], torch.arange(5)),
    }[name]
    told = explain(getattr(fastattn, name), *arguments, backend="reference")
    assert told.backend == "reference" and told.op in OPS


def test_explain_takes_only_ops():
    with pytest.raises(TypeError, match="explain\\(\\) takes a fastattn op, not"):
        explain(torch.softmax, X, -1)


def test_explain_validates_as_the_call_would():
    with pytest.raises(ValueError, match="one head dim, got 8 and 7"):
        explain(attend_function(), X, X[..., :7], X)


def test_every_op_is_registered_for_every_backend():
    for op in OPS.values():
        assert set(op.bound) == set(NAMES)
        for suffix in op.suffixes:
            packet = getattr(torch.ops.fastattn, op.name + suffix)
            assert set(packet.overloads()) == set(NAMES)


def test_schemas_are_functional():
    """No op may write to its arguments."""
    for op in OPS.values():
        for suffix in op.suffixes:
            for name in NAMES:
                schema = getattr(getattr(torch.ops.fastattn, op.name + suffix), name)._schema
                assert not schema.is_mutable and not any(a.alias_info for a in schema.arguments)


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**{k: v for k, v in os.environ.items() if not k.startswith("FASTATTN_")}, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_environment_variable_forces(skip_without_native):
    code = (
        "import torch, fastattn\n"
        "from fastattn import dispatch\n"
        "x = torch.randn(1, 1, 3, 4)\n"
        "fastattn.scaled_dot_product_attention(x, x, x)\n"
        "print(dispatch.served())\n"
        "x = x.double()\n"
        "try:\n"
        "    fastattn.scaled_dot_product_attention(x, x, x)\n"
        "except fastattn.BackendUnsupported as error:\n"
        "    print(str(error).splitlines()[0])\n"
        "with fastattn.use_backend('reference'):\n"
        "    print(fastattn.scaled_dot_product_attention(x, x, x).dtype)\n"
    )
    assert run_python(code, FASTATTN_BACKEND="reference").stdout.splitlines() == [
        "{'reference': 1}",
        "torch.float64",
    ]
    assert run_python(code, FASTATTN_BACKEND="cpu").stdout.splitlines() == [
        "{'cpu': 1}",
        "attention: backend 'cpu' was asked for and cannot serve this call",
        "torch.float64",
    ]


def test_an_unknown_name_in_the_environment_is_an_error_at_import():
    result = run_python("import fastattn", FASTATTN_BACKEND="gpu")
    assert result.returncode == 1
    assert "ValueError: unknown backend 'gpu'; there are cpu, triton, reference" in result.stderr.splitlines()[-1]


def test_an_empty_environment_variable_is_none():
    assert run_python("import fastattn", FASTATTN_BACKEND="", FASTATTN_CPU_ISA="").returncode == 0


# ---- torch's tools ----


def profiled(*activities):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for activity in activities:
            activity()
    return {event.key for event in profile.key_averages()}


def test_profiles_show_ops_by_name(skip_without_native):
    leaf = X.clone().requires_grad_()
    assert "fastattn::attention_forward" in profiled(lambda: attend(X, X, X))
    names = profiled(
        lambda: attend(leaf, X, X).sum().backward(),
        lambda: fastattn.layer_norm(leaf, (8,)).sum().backward(),
        lambda: fastattn.log_softmax(leaf, -1).sum().backward(),
    )
    for op in ("attention", "layer_norm", "softmax"):
        assert {f"fastattn::{op}_forward", f"fastattn::{op}_backward"} <= names
    assert {"AttentionBackward", "LayerNormBackward", "SoftmaxBackward"} <= names


def counted_flops(function, *tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    with FlopCounterMode(display=False) as forward:
        output = function(*leaves)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("causal", [False, True])
def test_flops_are_counted_as_torch_counts_its_own(causal, skip_without_native):
    """torch has a formula for its attention on GPUs; on CPUs it counts nothing."""
    query, key, value = torch.randn(2, 6, 7, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 5)
    found = counted_flops(
        lambda *qkv: attend(*qkv, is_causal=causal, enable_gqa=True, backend="cpu"), query, key, value
    )
    # Every query head multiplies keys of its own or shared ones: torch 2.10's formula knows the former only.
    shapes = (2, 6, 7, 8), (2, 6, 9, 8), (2, 6, 9, 5)
    grad = (2, 6, 7, 5)
    assert found == (flop_counter.sdpa_flop_count(*shapes), flop_counter.sdpa_backward_flop_count(grad, *shapes))


def test_flops_of_the_definition_are_nearly_the_same():
    """Two products forward; torch's formula for the backward adds the recomputed scores to the four of the chain rule,
    as the reference's backward does."""
    q, k, v = torch.randn(3, 2, 4, 7, 8)
    fused = counted_flops(lambda *qkv: attend(*qkv, backend="cpu"), q, k, v)
    assert counted_flops(lambda *qkv: attend(*qkv, backend="reference"), q, k, v) == fused


def test_ops_without_products_count_nothing(skip_without_native):
    assert counted_flops(lambda x: fastattn.softmax(x, -1, backend="cpu"), X) == (0, 0)


def test_formulas_stand_by_every_op_that_declares_them():
    for name, op in OPS.items():
        assert (op.forward_flops is None) == (op.backward_flops is None) or op.backward_schema is None, name
        for suffix in op.suffixes:
            packet = getattr(torch.ops.fastattn, f"{name}{suffix}")
            assert (packet in flop_counter.flop_registry) == (op.forward_flops is not None), packet


def test_importing_costs_little_more_than_torch():
    """The compiler, which costs a second, comes with the first torch.compile."""
    code = "import torch, sys; before = set(sys.modules); import fastattn; print(*sorted(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch._dynamo", "torch._inductor", "torch.utils.cpp_extension", "torch.testing", "torch.distributed.rpc"}
    assert heavy & set(run.stdout.split()) == set()
