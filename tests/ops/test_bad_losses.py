"""As test_bad_input.py, for softmax, cross entropy, GELU, SiLU and SwiGLU."""

import math
import re

import pytest
import torch

import fastattn
from fastattn.testing import guarded
from fastattn.testing.opcheck import available_backends


def f32(*shape, **kwargs):
    return torch.zeros(*shape, **kwargs)


def softmax(*args, **call):
    return lambda backend: fastattn.softmax(*args, backend=backend, **call)


def gelu(*args, **call):
    return lambda backend: fastattn.gelu(*args, backend=backend, **call)


def silu(*args, **call):
    return lambda backend: fastattn.silu(*args, backend=backend, **call)


def swiglu(*args, **call):
    return lambda backend: fastattn.swiglu(*args, backend=backend, **call)


def cross_entropy(input=(3, 7), target=(0, 6, 3), *args, **call):
    x = f32(*input) if isinstance(input, tuple) else input
    t = torch.tensor(target) if isinstance(target, tuple) else target
    return lambda backend: fastattn.cross_entropy(x, t, *args, backend=backend, **call)


#: Of an activation: what is wrong, the input's shape and dtype, the bias, and the words.
BAD_ACTIVATIONS = (
    (
        "of integers", (3,), torch.int64, None,
        r"input must be float32, bfloat16, float16 or float64, got torch.int64",
    ),
    (
        "bias shape", (3, 8), torch.float32, f32(3),
        r"bias must have shape \(8,\) for an input of shape \(3, 8\), got \(3,\)",
    ),
    (
        "bias of a scalar", ((),), torch.float32, f32(1),
        r"bias must have shape \(columns,\) for an input of shape \(\), got \(1,\)",
    ),
    (
        "integer bias", (3, 8), torch.float32, f32(8, dtype=torch.int32),
        r"bias must be floating and on cpu, got torch.int32 on cpu",
    ),
    (
        "bias' device", (3, 8), torch.float32, f32(8, device="meta"),
        r"bias must be floating and on cpu, got torch.float32 on meta",
    ),
)  # fmt: skip

BAD = {
    "softmax beyond the address space": (
        softmax(f32(1).expand(2**40, 2**22), -1),
        ValueError,
        r"softmax: an input of shape \(1099511627776, 4194304\) is more than memory can address",
    ),
    "cross_entropy beyond the address space": (
        cross_entropy(f32(1).expand(2**40, 2**22), torch.zeros(1, dtype=torch.int64).expand(2**40)),
        ValueError,
        r"cross_entropy: an input of shape \(1099511627776, 4194304\) is more than memory can address",
    ),
    # softmax
    "softmax without dim": (softmax(f32(3)), ValueError, r"softmax: dim must be given"),
    "softmax dim": (softmax(f32(3, 4), 2), ValueError, r"softmax: dim must be in \[-2, 1\] for a 2-D input, got 2"),
    "softmax dim of a scalar": (softmax(f32(()), 1), ValueError, r"dim must be in \[-1, 0\] for a 0-D input, got 1"),
    "softmax of integers": (
        softmax(f32(3, dtype=torch.int64), 0),
        ValueError,
        r"softmax: input must be float32, bfloat16, float16 or float64, got torch.int64; pass dtype= to convert it",
    ),
    "softmax scale": (softmax(f32(3), 0, scale=math.inf), ValueError, r"softmax: scale must be finite, got inf"),
    "softmax mask shape": (
        softmax(f32(3, 4), 1, mask=f32(3)),
        ValueError,
        r"softmax: mask must broadcast to the input's shape \(3, 4\), got \(3,\)",
    ),
    "softmax mask dims": (
        softmax(f32(3, 4), 1, mask=f32(1, 3, 4)),
        ValueError,
        r"softmax: mask must broadcast to the input's shape \(3, 4\), got \(1, 3, 4\)",
    ),
    "softmax integer mask": (
        softmax(f32(3, 4), 1, mask=f32(4, dtype=torch.int64)),
        ValueError,
        r"softmax: mask must be bool or floating, got torch.int64",
    ),
    "softmax mask's device": (
        softmax(f32(3, 4), 1, mask=f32(4, device="meta")),
        ValueError,
        r"softmax: mask is on meta, input on cpu",
    ),
    "softmax mask of many dims": (
        softmax(f32(*[1] * 17), 1, mask=f32(1)),
        ValueError,
        r"softmax: with a mask the input has at most 16 dimensions, got 17",
    ),
    "softmax causal along rows": (
        softmax(f32(3, 4), 0, is_causal=True),
        ValueError,
        r"softmax: is_causal is over the last two dimensions, and dim must be the last; got dim 0 of a 2-D input",
    ),
    "softmax causal of one dim": (softmax(f32(3), 0, is_causal=True), ValueError, r"got dim 0 of a 1-D input"),
    "softmax alignment": (
        softmax(f32(3, 4), 1, is_causal=True, causal_alignment="left"),
        ValueError,
        r"softmax: causal_alignment must be one of \('top_left', 'bottom_right'\), got 'left'",
    ),
    "log_softmax mask shape": (
        lambda backend: fastattn.log_softmax(f32(3, 4), -1, mask=f32(5), backend=backend),
        ValueError,
        r"log_softmax: mask must broadcast to the input's shape \(3, 4\), got \(5,\)",
    ),
    "softmax to integers": (
        softmax(f32(3), 0, torch.int32),
        ValueError,
        r"softmax: dtype must be float32, bfloat16, float16 or float64, got torch.int32",
    ),
    "log_softmax dim": (
        lambda backend: fastattn.log_softmax(f32(3, 4), -3, backend=backend),
        ValueError,
        r"log_softmax: dim must be in \[-2, 1\] for a 2-D input, got -3",
    ),
    # gelu, silu and swiglu
    **{
        f"{op.__name__} {what}": (op(f32(*shape, dtype=dtype), bias=bias), ValueError, f"{op.__name__}: {words}")
        for op in (gelu, silu)
        for what, shape, dtype, bias, words in BAD_ACTIVATIONS
    },
    "gelu approximated otherwise": (
        gelu(f32(3), "quick"),
        ValueError,
        r"gelu: approximate must be one of \('none', 'tanh', 'sigmoid'\), got 'quick'",
    ),
    **{
        f"{op.__name__} beyond the address space": (
            op(f32(1).expand(2**40, 2**22)),
            ValueError,
            rf"{op.__name__}: an input of shape \(1099511627776, 4194304\) is more than memory can address",
        )
        for op in (gelu, silu)
    },
    "swiglu of integers": (
        swiglu(f32(3, dtype=torch.int64), f32(3, dtype=torch.int64)),
        ValueError,
        r"swiglu: gate must be float32, bfloat16, float16 or float64, got torch.int64",
    ),
    "swiglu shapes": (
        swiglu(f32(3, 8), f32(3, 7)),
        ValueError,
        r"swiglu: up must have the gate's shape \(3, 8\), dtype torch.float32 and device cpu, got \(3, 7\),"
        r" torch.float32 on cpu",
    ),
    "swiglu dtypes": (
        swiglu(f32(3, 8), f32(3, 8, dtype=torch.bfloat16)),
        ValueError,
        r"swiglu: up must have the gate's shape \(3, 8\), dtype torch.float32 and device cpu, got \(3, 8\),"
        r" torch.bfloat16 on cpu",
    ),
    "swiglu devices": (swiglu(f32(3), f32(3, device="meta")), ValueError, r"got \(3,\), torch.float32 on meta"),
    "swiglu beyond the address space": (
        swiglu(f32(1).expand(2**40, 2**22), f32(1).expand(2**40, 2**22)),
        ValueError,
        r"swiglu: a gate of shape \(1099511627776, 4194304\) is more than memory can address",
    ),
    # cross entropy
    "logits without dims": (
        cross_entropy(f32(()), torch.tensor(0)),
        ValueError,
        r"cross_entropy: input must have a class dimension: \(C,\), \(N, C\) or \(N, C, d1, \.\.\.\)",
    ),
    "integer logits": (
        cross_entropy(f32(3, 7, dtype=torch.int64)),
        ValueError,
        r"cross_entropy: input must be float32, bfloat16, float16 or float64, got torch.int64",
    ),
    "target shape": (
        cross_entropy((3, 7), (1, 2)),
        ValueError,
        r"cross_entropy: for an input of shape \(3, 7\) a target of class indices has shape \(3,\), got \(2,\)",
    ),
    "target shape of many dims": (
        cross_entropy((3, 7, 4), torch.zeros(3, 5, dtype=torch.int64)),
        ValueError,
        r"an input of shape \(3, 7, 4\) a target of class indices has shape \(3, 4\), got \(3, 5\)",
    ),
    "probabilities' shape": (
        cross_entropy((3, 7), f32(3, 6)),
        ValueError,
        r"for an input of shape \(3, 7\) a target of class probabilities has shape \(3, 7\), got \(3, 6\)",
    ),
    "target dtype": (
        cross_entropy((3, 7), torch.zeros(3, dtype=torch.bool)),
        ValueError,
        r"cross_entropy: target must hold integers or class probabilities, got torch.bool",
    ),
    "target's device": (
        cross_entropy((3, 7), torch.zeros(3, dtype=torch.int64, device="meta")),
        ValueError,
        r"cross_entropy: target is on meta, input on cpu",
    ),
    "class weights' shape": (
        cross_entropy((3, 7), (0, 1, 2), f32(6)),
        ValueError,
        r"cross_entropy: weight must be floating of shape \(7,\), got torch.float32 \(6,\)",
    ),
    "integer class weights": (
        cross_entropy((3, 7), (0, 1, 2), f32(7, dtype=torch.int64)),
        ValueError,
        r"weight must be floating of shape \(7,\), got torch.int64 \(7,\)",
    ),
    "class weights' device": (
        cross_entropy((3, 7), (0, 1, 2), f32(7, device="meta")),
        ValueError,
        r"cross_entropy: weight is on meta, input on cpu",
    ),
    "unknown reduction": (
        cross_entropy(reduction="median"),
        ValueError,
        r"cross_entropy: reduction must be one of \('none', 'mean', 'sum'\), got 'median'",
    ),
    "negative smoothing": (
        cross_entropy(label_smoothing=-0.1),
        ValueError,
        r"cross_entropy: label_smoothing must be in \[0, 1\], got -0.1",
    ),
    "NaN smoothing": (cross_entropy(label_smoothing=math.nan), ValueError, r"must be in \[0, 1\], got nan"),
    "negative z_loss": (
        cross_entropy(z_loss=-1e-4),
        ValueError,
        r"cross_entropy: z_loss must be a finite number of 0 or more, got -0.0001",
    ),
    "infinite softcap": (
        cross_entropy(softcap=math.inf),
        ValueError,
        r"cross_entropy: softcap must be a finite number of 0 or more, got inf",
    ),
    "NaN softcap": (
        cross_entropy(softcap=math.nan),
        ValueError,
        r"softcap must be a finite number of 0 or more, got nan",
    ),
    "deprecated arguments": (
        cross_entropy(size_average=True),
        ValueError,
        r"cross_entropy: size_average and reduce are deprecated in torch; use reduction",
    ),
    "target too large": (
        cross_entropy((3, 7), (0, 7, 3)),
        RuntimeError,
        r"cross_entropy: target 7 at row 1 is not in \[0, 7\) and is not ignore_index \(-100\)",
    ),
    "negative target": (
        cross_entropy((3, 7), (0, 6, -1), ignore_index=-2),
        RuntimeError,
        r"cross_entropy: target -1 at row 2 is not in \[0, 7\) and is not ignore_index \(-2\)",
    ),
    "target of a far class": (
        cross_entropy((3, 7), (2**62, 0, 0)),
        RuntimeError,
        r"cross_entropy: target 4611686018427387904 at row 0 is not in \[0, 7\)",
    ),
    "target of an empty set of classes": (
        cross_entropy((2, 0), (0, 0)),
        RuntimeError,
        r"cross_entropy: target 0 at row 0 is not in \[0, 0\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_in_the_same_words_by_every_backend(name):
    call, kind, pattern = BAD[name]
    messages = set()
    for backend in (None, *available_backends("cpu")):
        with pytest.raises(kind) as raised:
            call(backend)
        assert type(raised.value) is kind
        messages.add(str(raised.value).splitlines()[0])
    assert len(messages) == 1, f"different words: {messages}"
    assert re.search(pattern, messages.pop())


def test_a_refused_target_is_found_before_memory_is_touched():
    """The bad class would be read far outside of logits that end where the address space does."""
    logits, target = guarded(torch.randn(4, 9)), guarded(torch.tensor([0, 8, 2**40, 1]))
    for backend in available_backends("cpu"):
        with pytest.raises(RuntimeError, match="target 1099511627776 at row 2"):
            fastattn.cross_entropy(logits, target, backend=backend)


RAW_BAD = {
    "softmax of a far dim": lambda: torch.ops.fastattn.softmax_forward.cpu(f32(3, 8), 2, False, torch.float32),
    "softmax of a short mask": lambda: torch.ops.fastattn.softmax_forward.cpu(
        f32(3, 8), 1, False, torch.float32, 1.0, f32(3, 7), 0
    ),
    "softmax of a mask of few dims": lambda: torch.ops.fastattn.softmax_forward.cpu(
        f32(3, 8), 1, False, torch.float32, 1.0, f32(8), 0
    ),
    "softmax of a mask of far columns": lambda: torch.ops.fastattn.softmax_forward.cpu(
        f32(3, 8), 1, False, torch.float32, 1.0, f32(8, 3).t(), 0
    ),
    "softmax causal of one dim": lambda: torch.ops.fastattn.softmax_forward.cpu(
        f32(8), 0, False, torch.float32, 1.0, None, 1
    ),
    "softmax causal in a third way": lambda: torch.ops.fastattn.softmax_forward.cpu(
        f32(3, 8), 1, False, torch.float32, 1.0, None, 3
    ),
    "softmax of a scale along rows": lambda: torch.ops.fastattn.softmax_forward.cpu(
        f32(3, 8), 0, False, torch.float32, 2.0, None, 0
    ),
    "softmax backward of another shape": lambda: torch.ops.fastattn.softmax_backward.cpu(
        f32(3, 8), f32(3, 7), 1, False, torch.float32
    ),
    "gelu of a short bias": lambda: torch.ops.fastattn.gelu_forward.cpu(f32(3, 8), f32(7), 0),
    "gelu of a wide bias": lambda: torch.ops.fastattn.gelu_forward.cpu(f32(3, 8), f32(8, dtype=torch.float64), 0),
    "gelu in a fourth form": lambda: torch.ops.fastattn.gelu_forward.cpu(f32(3, 8), None, 3),
    "gelu backward of another shape": lambda: torch.ops.fastattn.gelu_backward.cpu(
        f32(3, 7), f32(3, 8), None, False, 0
    ),
    "silu of a short bias": lambda: torch.ops.fastattn.silu_forward.cpu(f32(3, 8), f32(7)),
    "silu backward of another shape": lambda: torch.ops.fastattn.silu_backward.cpu(f32(3, 7), f32(3, 8), None, False),
    "swiglu of another shape": lambda: torch.ops.fastattn.swiglu_forward.cpu(f32(3, 8), f32(3, 7)),
    "swiglu backward of another dtype": lambda: torch.ops.fastattn.swiglu_backward.cpu(
        f32(3, 8, dtype=torch.bfloat16), f32(3, 8), f32(3, 8)
    ),
    "cross entropy of few targets": lambda: torch.ops.fastattn.cross_entropy_forward.cpu(
        f32(3, 8), torch.zeros(2, dtype=torch.int64), None, -100, 0.0, 1
    ),
    "cross entropy backward of few targets": lambda: torch.ops.fastattn.cross_entropy_backward.cpu(
        f32(3), f32(3, 8), torch.zeros(2, dtype=torch.int64), None, f32(3), f32(()), -100, 0.0, 0
    ),
    "cross entropy backward of a target out of range": lambda: torch.ops.fastattn.cross_entropy_backward.cpu(
        f32(3), f32(3, 8), torch.tensor([0, 8, 1]), None, f32(3), f32(()), -100, 0.0, 0
    ),
    "cross entropy of a negative cap": lambda: torch.ops.fastattn.cross_entropy_forward.cpu(
        f32(3, 8), torch.zeros(3, dtype=torch.int64), None, -100, 0.0, 1, 0.0, -1.0
    ),
    "cross entropy of one weight": lambda: torch.ops.fastattn.cross_entropy_forward.cpu(
        f32(3, 8), torch.zeros(3, dtype=torch.int64), f32(1), -100, 0.0, 1
    ),
    "doubles": lambda: torch.ops.fastattn.softmax_forward.cpu(f32(3, 8, dtype=torch.float64), 1, False, torch.float64),
}


@pytest.mark.parametrize("name", RAW_BAD)
def test_the_bindings_check_for_themselves(name, skip_without_native):
    """Exported graphs call the raw ops without the public functions in front of them."""
    with pytest.raises(RuntimeError):
        RAW_BAD[name]()


def test_rows_of_no_classes_are_not_the_cpu_kernels(skip_without_native):
    """Probabilities of no classes are a problem without a gradient, and nothing to read."""
    nothing = torch.randn(3, 0)
    with pytest.raises(fastattn.BackendUnsupported, match="has no kernel for rows of no classes"):
        fastattn.cross_entropy(nothing, nothing, backend="cpu")
    assert torch.equal(fastattn.cross_entropy(nothing, nothing, reduction="none"), torch.zeros(3))
