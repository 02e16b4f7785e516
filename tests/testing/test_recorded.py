"""Launches recorded for a device that is not here."""

import pytest
import torch

import fastattn
from fastattn import backends, dispatch, testing
from fastattn.gpu import devices

pytestmark = pytest.mark.compiled

pytest.importorskip("triton")
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from fastattn.testing.problems import op_of  # noqa: E402
from fastattn.testing.recorded import Launch, recording  # noqa: E402


def halves(rows, columns, dtype=torch.bfloat16, **kwargs):
    return (torch.empty(rows, columns, dtype=dtype, **kwargs) for _ in range(2))


def facts(launch):
    names = [name for name, _ in launch.signature]
    return {names[path[0]]: dict(known) for path, known in launch.attributes}


def test_what_triton_infers_is_recorded():
    with recording("sm_90") as launches:
        fastattn.swiglu(*halves(32, 4096), backend="triton")
    (launch,) = launches
    assert launch.name == "swiglu/forward" and launch.target == "sm_90" and launch.aligned
    assert dict(launch.signature)["gate_ptr"] == "*bf16"
    assert facts(launch)["gate_ptr"] == {"tt.divisibility": 16} and "columns" in facts(launch)
    assert {"num_warps", "num_stages"} <= dict(launch.options).keys()
    assert "bf16 bf16 bf16 | ROWS=" in launch.variant and "not by 16" not in launch.variant


def test_alignment_is_part_of_a_launch_and_a_one_is_compiled_in():
    gate, up = halves(1, 17)
    with recording("sm_90") as launches:
        fastattn.swiglu(gate, up, backend="triton")
        fastattn.swiglu(gate[:, 1:], up[:, 1:], backend="triton")
    first, second = launches
    assert "not by 16: gate_stride up_stride columns" in first.variant and "rows=1" in first.variant
    assert first.aligned and not second.aligned
    assert first.asks({"ROWS", "COLUMNS"}) == second.asks({"ROWS", "COLUMNS"})


def test_equal_launches_are_recorded_once_and_counted_every_time():
    gate, up = halves(32, 4096, requires_grad=True)
    with recording("sm_80") as launches:
        for _ in range(3):
            fastattn.swiglu(gate, up, backend="triton").backward(torch.empty(32, 4096, dtype=torch.bfloat16))
    assert [launch.name for launch in launches] == ["swiglu/forward", "swiglu/backward"] and launches.count == 6


def test_empty_tensors_launch_nothing():
    with recording("sm_90") as launches:
        fastattn.swiglu(*halves(0, 4096), backend="triton")
    assert launches.count == 0


def test_amd_knows_that_a_tensor_is_below_two_gigabytes():
    with recording("gfx942") as launches:
        fastattn.swiglu(*halves(32, 4096), backend="triton")
    (launch,) = launches
    assert facts(launch)["up_ptr"] == {"tt.divisibility": 16, "tt.pointer_range": 32}


def test_nothing_is_left_behind():
    before = (JITFunction._do_compile, driver._active, backends.BACKENDS["triton"], dict(backends._reasons))
    with pytest.raises(ZeroDivisionError), recording("sm_90"):
        fastattn.swiglu(*halves(32, 4096), backend="triton")
        raise ZeroDivisionError
    assert (JITFunction._do_compile, driver._active, backends.BACKENDS["triton"], dict(backends._reasons)) == before
    assert devices.target_of(torch.device("cpu")) is devices.KNOWN["interpreter"]
    with pytest.raises(dispatch.BackendUnsupported):
        fastattn.swiglu(*halves(32, 4096), backend="triton")


def test_constants_travel_as_plain_data():
    import triton.language as tl

    from fastattn.testing.recorded import _decoded, _encoded

    assert _decoded(_encoded(tl.bfloat16)) == tl.bfloat16
    assert [_decoded(_encoded(value)) for value in (None, 3, 1.5, True, "sum", tl.constexpr(4))] == [
        None, 3, 1.5, True, "sum", 4
    ]  # fmt: skip
    from fastattn.gpu.functions import tanh

    assert _decoded(_encoded(tanh)) is tanh


def test_a_recorded_launch_compiles():
    with recording("sm_80") as launches:
        fastattn.swiglu(*halves(32, 4096), backend="triton")
    (launch,) = launches
    assert isinstance(launch, Launch) and "ld.global" in launch.compile().asm["ptx"]


def graphs_of(function, *args, **kwargs):
    """The graphs that torch.compile makes of a call, which runs."""
    found = []

    def keep(module, _):
        found.append(module)
        return module.forward

    torch._dynamo.reset()
    torch.compile(function, backend=keep, fullgraph=True)(*args, **kwargs)
    return found


@pytest.mark.parametrize("suite", testing.suites().values(), ids=testing.suites())
def test_a_compiled_call_is_one_opaque_op(suite):
    case = next(case for case in suite.cases if case.core)
    arguments = suite.arguments(case, "cpu", torch.float32)
    leaves = {
        key: value.requires_grad_() if key in suite.differentiable and isinstance(value, torch.Tensor) else value
        for key, value in arguments.items()
    }
    with recording("sm_90") as launches:
        (graph,) = graphs_of(lambda: suite.function(**leaves, backend="triton"))
    ours = [node.target for node in graph.graph.nodes if "fastattn" in str(node.target)]
    assert ours == [getattr(torch.ops.fastattn, op_of(suite).name).triton]
    assert launches.count >= 1
