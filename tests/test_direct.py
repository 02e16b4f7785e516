"""Calls past torch's dispatcher (csrc/bindings/direct.h): when they pass it by, and that nobody can tell."""

import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn import backends
from fastattn.dispatch import OPS

pytestmark = pytest.mark.usefixtures("skip_without_native")

X = torch.linspace(-3, 3, 24).reshape(4, 6)
SOFTMAX = (1, False, torch.float32)


class Entry:
    """Stands for torch's entry to an op; counts calls."""

    def __init__(self, name="softmax_forward", variant=""):
        overload = getattr(torch.ops.fastattn, name).cpu
        self.op, self.calls = overload._op, 0
        defaults = (a.default_value for a in overload._schema.arguments if a.has_default_value())
        self.direct = backends.native_module().direct(variant or name, self, *defaults)

    def __call__(self, *args):
        self.calls += 1
        return self.op(*args)


class TorchFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Notes the operators that it hears of."""

    def __init__(self, heard):
        super().__init__()
        self.heard = heard

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.heard.append(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def entry():
    return Entry()


def test_plain_calls_pass_the_dispatcher_by(entry):
    expected = entry.op(X, *SOFTMAX)
    for args in (SOFTMAX, (*SOFTMAX, 1.0), (*SOFTMAX, 1, None, 0)):
        assert torch.equal(entry.direct(X, *args), expected)
    for tensor in (torch.nn.Parameter(X), torch.nn.Buffer(X), X.t().contiguous().t(), X[:, ::2], X[:0]):
        assert torch.equal(entry.direct(tensor, *SOFTMAX), entry.op(tensor, *SOFTMAX))
    assert entry.calls == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_those_asked_for(entry, dtype):
    result = entry.direct(X.to(dtype), 1, False, dtype)
    assert entry.calls == 0
    assert result.dtype == dtype
    assert torch.equal(result, entry.op(X.to(dtype), 1, False, dtype))


def test_every_kernel_of_every_op_can_be_called_so():
    for op in OPS.values():
        for suffix in op.suffixes[1:]:
            name = f"{op.name}{suffix}"
            entry = Entry(name)
            assert entry.direct is not None, name
            bound = getattr(op.bound["cpu"], suffix[1:])
            assert type(bound) is type(entry.direct)
            assert bound.__name__ == name


Q = torch.linspace(-1, 1, 96).reshape(1, 2, 6, 8)
W = torch.linspace(0.5, 1.5, 6)
VISIBLE = {
    "attention": (Q, Q, Q, None, None, 0.3, True, False, 0.0),
    "decode": (Q, Q, Q, None, None, None, None, None, 0, 0.3, -1, -1, 0.0, 0),
    "layer_norm": (X, W, None, 1, 1e-5, 0.0),
    "rms_norm": (X, W, 1, 1e-5, 0.0),
    "add_layer_norm": (X, X.neg().exp(), W, None, None, 1, 1e-5, 0.0, 0.0),
    "add_rms_norm": (X, X.neg().exp(), W, None, 1, 1e-5, 0.0, 0.0),
}


def test_visible_kernels_are_listed():
    assert {name for name, op in OPS.items() if op.bound["cpu"].visible is not None} == VISIBLE.keys()


@pytest.mark.parametrize("name", VISIBLE)
def test_visible_results_alone_are_the_same_bits(name):
    entry, args, count = Entry(f"{name}_forward", f"{name}_visible"), VISIBLE[name], OPS[name].visible
    expected = entry.op(*args)[:count]
    found = entry.direct(*args)
    assert entry.calls == 0
    with Operators([]):  # all results are made, and the first ones given
        heard = entry.direct(*args)
    assert entry.calls == 1
    for results in (found, heard):
        assert (type(results) is tuple) == (count > 1)
        results = results if count > 1 else (results,)
        assert len(results) == count
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    with pytest.raises(RuntimeError, match=r"float32|must"):
        entry.direct(args[0].double(), *args[1:])


def test_no_reference_is_lost_or_kept(entry):
    layer_norm = Entry("layer_norm_forward")
    weight = torch.ones(6)
    for tensor in (X, torch.ones(4, 6)):
        before = sys.getrefcount(tensor), sys.getrefcount(weight)
        result = entry.direct(tensor, *SOFTMAX)
        assert sys.getrefcount(result) == 2  # its name, and the argument
        results = layer_norm.direct(tensor, weight, None, 1, 1e-5, 0.0)
        assert type(results) is tuple
        assert [sys.getrefcount(results[i]) for i in range(3)] == [2, 2, 2]
        assert (sys.getrefcount(tensor), sys.getrefcount(weight)) == before
    assert entry.calls == layer_norm.calls == 0


class Subclass(torch.Tensor):
    pass


def negative():
    """Of a view that torch has not negated yet: memory says otherwise."""
    x = torch.complex(torch.zeros(4, 6), -X).conj().imag
    assert x.is_neg()
    return x


TENSORS = {
    "a subclass": lambda: X.as_subclass(Subclass),
    "a negative view": negative,
    "zeros without memory": lambda: torch._efficientzerotensor(4, 6),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_are_more_than_memory_are_the_dispatchers(entry, what):
    tensor = TENSORS[what]()
    expected = entry.op(torch.zeros(4, 6) if what == "zeros without memory" else X.clone(), *SOFTMAX)
    assert torch.equal(entry.direct(tensor, *SOFTMAX), expected)
    assert entry.calls == 1


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_without_a_kernel_are_refused_by_the_dispatcher(entry):
    for tensor in (X.to_sparse(), X.to("meta"), torch.nested.nested_tensor([X[:2], X[2:]])):
        try:
            expected = entry.op(tensor, *SOFTMAX)
        except NotImplementedError as error:
            with pytest.raises(NotImplementedError) as found:
                entry.direct(tensor, *SOFTMAX)
            assert str(found.value) == str(error)
        else:
            assert entry.direct(tensor, *SOFTMAX).shape == expected.shape
    assert entry.calls == 3


@pytest.mark.parametrize(
    "args",
    [
        (X,),
        (X, *SOFTMAX, 1.0, None, 0, 0),
        (X, 7, *SOFTMAX[1:]),
        (X, 2**70, *SOFTMAX[1:]),
        (X, 1, False, torch.complex64),
        (X, *SOFTMAX, 10**400),
        (None, *SOFTMAX),
        ("X", *SOFTMAX),
    ],
)
def test_what_is_refused_is_refused_in_the_dispatchers_words(entry, args):
    with pytest.raises(Exception) as expected:
        entry.op(*args)
    with pytest.raises(expected.type) as found:
        entry.direct(*args)
    assert str(found.value) == str(expected.value)
    assert entry.calls == 1


def test_modes_hear_of_every_call(entry):
    operators = []
    expected = entry.direct(X, *SOFTMAX)
    with TorchFunctions():
        assert torch.equal(entry.direct(X, *SOFTMAX), expected)
    with Operators(operators):
        assert torch.equal(entry.direct(X, *SOFTMAX), expected)
    assert torch.ops.fastattn.softmax_forward.cpu in operators
    assert entry.calls == 2


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
def test_transforms_traces_and_profiles_hear_of_every_call(entry):
    expected = entry.direct(X, *SOFTMAX)
    assert torch.equal(torch.func.vmap(lambda x: entry.direct(x, 0, *SOFTMAX[1:]))(X), expected)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        entry.direct(X, *SOFTMAX)
    assert any(event.key == "fastattn::softmax_forward" for event in profile.key_averages())
    calls = entry.calls
    assert calls >= 2
    traced = torch.jit.trace(lambda x: entry.direct(x, *SOFTMAX), X, check_trace=False)
    assert entry.calls == calls + 1
    assert "fastattn::softmax_forward" in str(traced.graph)
    assert torch.equal(traced(X.neg()), entry.op(X.neg(), *SOFTMAX))


def test_without_gradients_and_in_inference_mode(entry):
    with torch.no_grad():
        assert torch.equal(entry.direct(X, *SOFTMAX), entry.op(X, *SOFTMAX))
    with torch.inference_mode():
        result = entry.direct(X, *SOFTMAX)
        assert result.is_inference()
        assert torch.equal(entry.direct(result, *SOFTMAX), entry.op(result, *SOFTMAX))
    assert entry.calls == 0
