"""What does not fit is refused with one clear error that says what was given and what is allowed, the same words from
every backend, before anything is computed."""

import math
import re

import pytest
import torch

import fastattn
from fastattn.testing.opcheck import available_backends

HUGE = 2**31


def f32(*shape, **kwargs):
    return torch.zeros(*shape, **kwargs)


def attention(query=(2, 4, 5, 8), key=(2, 4, 6, 8), value=(2, 4, 6, 8), **call):
    q, k, v = (f32(*t) if isinstance(t, tuple) else t for t in (query, key, value))
    return lambda backend: fastattn.scaled_dot_product_attention(q, k, v, backend=backend, **call)


def varlen(queries=(0, 3, 5), keys=(0, 4, 6), query=(5, 4, 8), key=(6, 4, 8), value=(6, 4, 8), longest=(3, 4), **call):
    q, k, v = (f32(*t) if isinstance(t, tuple) else t for t in (query, key, value))
    bounds = (torch.tensor(b) if isinstance(b, tuple) else b for b in (queries, keys))
    bound = (*bounds, *longest)
    return lambda backend: fastattn.attention_varlen(q, k, v, *bound, backend=backend, **call)


def layer_norm(input=(3, 8), shape=(8,), *args, **call):
    x = f32(*input) if isinstance(input, tuple) else input
    return lambda backend: fastattn.layer_norm(x, shape, *args, backend=backend, **call)


def add_layer_norm(input=None, residual=None, **call):
    x = f32(3, 8) if input is None else input
    r = f32(3, 8) if residual is None else residual
    return lambda backend: fastattn.add_layer_norm(x, r, (8,), backend=backend, **call)


def add_rms_norm(input=None, residual=None, **call):
    x = f32(3, 8) if input is None else input
    r = f32(3, 8) if residual is None else residual
    return lambda backend: fastattn.add_rms_norm(x, r, (8,), backend=backend, **call)


def rms_norm(input=(3, 8), shape=(8,), *args, **call):
    x = f32(*input) if isinstance(input, tuple) else input
    return lambda backend: fastattn.rms_norm(x, shape, *args, backend=backend, **call)


def linear(input=(3, 8), weight=(4, 8), *args, **call):
    x = f32(*input) if isinstance(input, tuple) else input
    w = f32(*weight) if isinstance(weight, tuple) else weight
    return lambda backend: fastattn.linear(x, w, *args, backend=backend, **call)


BAD = {
    # attention: dtypes and devices
    "key of another dtype": (
        attention(key=f32(2, 4, 6, 8, dtype=torch.bfloat16)),
        ValueError,
        r"attention: query, key and value must have one dtype and device, got query torch.float32 on cpu, key"
        r" torch.bfloat16 on cpu",
    ),
    "value of another dtype": (
        attention(value=f32(2, 4, 6, 8, dtype=torch.float64)),
        ValueError,
        r"query torch.float32 on cpu, value torch.float64 on cpu",
    ),
    "key on another device": (
        attention(key=f32(2, 4, 6, 8, device="meta")),
        ValueError,
        r"query torch.float32 on cpu, key torch.float32 on meta",
    ),
    "integers": (
        attention(*(f32(2, 4, 5, 8, dtype=torch.int32) for _ in range(3))),
        ValueError,
        r"attention: dtype torch.int32 is not one of float32, bfloat16, float16, float64",
    ),
    "complex": (
        attention(*(f32(2, 4, 5, 8, dtype=torch.complex64) for _ in range(3))),
        ValueError,
        r"dtype torch.complex64 is not one of",
    ),
    # attention: shapes
    "one dim": (
        attention((8,), (8,), (8,)),
        ValueError,
        r"attention: query, key and value are \(\.\.\., H, S, E\), \(H, S, E\) or \(S, E\), got 1, 1 and 1 dimensions",
    ),
    "head dims": (
        attention(key=(2, 4, 6, 9)),
        ValueError,
        r"attention: query and key must have one head dim, got 8 and 9",
    ),
    "lengths": (
        attention(value=(2, 4, 7, 8)),
        ValueError,
        r"attention: key and value must have one length, got 6 and 7",
    ),
    "value heads": (
        attention(value=(2, 2, 6, 8)),
        ValueError,
        r"attention: key has 4 heads, value 2",
    ),
    "grouped heads without enable_gqa": (
        attention(key=(2, 2, 6, 8), value=(2, 2, 6, 8)),
        ValueError,
        r"attention: query has 4 heads, key and value 2: pass enable_gqa=True to share them",
    ),
    "heads that do not divide": (
        attention(key=(2, 3, 6, 8), value=(2, 3, 6, 8), enable_gqa=True),
        ValueError,
        r"attention: with enable_gqa the query heads \(4\) must be a multiple of the key heads \(3\)",
    ),
    "no key heads": (
        attention(key=(2, 0, 6, 8), value=(2, 0, 6, 8), enable_gqa=True),
        ValueError,
        r"the query heads \(4\) must be a multiple of the key heads \(0\)",
    ),
    "batches that do not broadcast": (
        attention(key=(3, 4, 6, 8)),
        ValueError,
        r"attention: the batch dimensions of \(2, 4, 5, 8\), \(3, 4, 6, 8\), \(2, 4, 6, 8\) do not broadcast",
    ),
    "too many queries": (
        attention(f32(1).expand(1, 1, HUGE, 8), (1, 1, 6, 8), (1, 1, 6, 8)),
        ValueError,
        r"attention: lengths and batch \* heads must not exceed 2147483647, got 2147483648 queries, 6 keys, 1 \* 1",
    ),
    "too many keys": (
        attention((1, 1, 5, 8), *(f32(1).expand(1, 1, HUGE, 8) for _ in range(2))),
        ValueError,
        r"must not exceed 2147483647, got 5 queries, 2147483648 keys",
    ),
    "too many heads": (
        attention(*(f32(1).expand(2**16, 2**15, 1, 8) for _ in range(3))),
        ValueError,
        r"must not exceed 2147483647, got 1 queries, 1 keys, 65536 \* 32768",
    ),
    "an output beyond the address space": (
        attention(*(f32(1).expand(2**15, 2**10, *last) for last in ((2**30, 1), (6, 1), (6, 512)))),
        ValueError,
        r"attention: an output of shape \(32768, 1024, 1073741824, 512\) is more than memory can address",
    ),
    # attention: masks
    "integer mask": (
        attention(attn_mask=f32(5, 6, dtype=torch.int64)),
        ValueError,
        r"attention: attn_mask must be bool, float32 or the query's dtype torch.float32, got torch.int64",
    ),
    "mask of another floating dtype": (
        attention(attn_mask=f32(5, 6, dtype=torch.float64)),
        ValueError,
        r"attn_mask must be bool, float32 or the query's dtype torch.float32, got torch.float64",
    ),
    "mask that does not broadcast": (
        attention(attn_mask=f32(4, 6)),
        ValueError,
        r"attention: attn_mask of shape \(1, 1, 4, 6\) does not broadcast to \(B, H, Sq, Sk\) = \(2, 4, 5, 6\)",
    ),
    "mask of a larger batch": (
        attention(attn_mask=f32(3, 1, 5, 6)),
        ValueError,
        r"attn_mask of shape \(3, 1, 5, 6\) does not broadcast",
    ),
    "mask with too many dims": (
        attention(attn_mask=f32(2, 2, 4, 5, 6)),
        ValueError,
        r"attn_mask of shape \(2, 2, 4, 5, 6\) does not broadcast over the batch dimensions \(2,\)",
    ),
    "mask on another device": (
        attention(attn_mask=f32(5, 6, device="meta")),
        ValueError,
        r"attention: attn_mask is on meta, query on cpu",
    ),
    # attention: values
    "dropout below 0": (
        attention(dropout_p=-0.1),
        ValueError,
        r"attention: dropout_p must be in \[0, 1\], got -0.1",
    ),
    "dropout above 1": (attention(dropout_p=1.5), ValueError, r"dropout_p must be in \[0, 1\], got 1.5"),
    "NaN dropout": (attention(dropout_p=math.nan), ValueError, r"dropout_p must be in \[0, 1\], got nan"),
    "NaN scale": (attention(scale=math.nan), ValueError, r"attention: scale must be finite \(in float32\), got nan"),
    "infinite scale": (
        attention(scale=-math.inf),
        ValueError,
        r"attention: scale must be finite \(in float32\), got -inf",
    ),
    "scale beyond float32": (
        attention(scale=1e39),
        ValueError,
        r"attention: scale must be finite \(in float32\), got 1e\+39",
    ),
    "negative seed": (attention(seed=-1), ValueError, r"attention: seed must be in \[0, 2\*\*63\), got -1"),
    "seed of 64 bits": (attention(seed=2**63), ValueError, r"seed must be in \[0, 2\*\*63\), got 9223372036854775808"),
    "unknown alignment": (
        attention(is_causal=True, causal_alignment="left"),
        ValueError,
        r"attention: causal_alignment must be one of \('top_left', 'bottom_right'\), got 'left'",
    ),
    # attention: features
    **{
        f"attention {name}": (attention(**call), ValueError, f"attention: {message}")
        for name, call, message in (
            ("window of one number", {"window": 3}, r"window must be \(left, right\), two whole numbers, got 3"),
            (
                "window of fractions",
                {"window": (1.5, 0)},
                r"window must be \(left, right\), two whole numbers, got \(1",
            ),
            (
                "window below -1",
                {"window": (-2, 0)},
                r"window must hold numbers of at least 0, or -1 for no bound, got \(-2, 0\)",
            ),
            ("negative softcap", {"softcap": -1.0}, r"softcap must be 0 or in \[1e-30, 3.40282e\+38\], got -1.0"),
            ("NaN softcap", {"softcap": math.nan}, r"softcap must be 0 or in \[.*\], got nan"),
            ("softcap too small", {"softcap": 1e-39}, r"softcap must be 0 or in \[.*\], got 1e-39"),
            ("slopes' shape", {"alibi_slopes": f32(3)}, r"alibi_slopes must have shape \(4,\) or \(2, 4\), got \(3,\)"),
            (
                "integer slopes",
                {"alibi_slopes": f32(4, dtype=torch.int32)},
                r"alibi_slopes must be float32, bfloat16, float16 or of the query's dtype, on cpu, got torch.int32",
            ),
            ("sinks' shape", {"sinks": f32(4, 1)}, r"sinks must have shape \(4,\), got \(4, 1\)"),
            ("sinks' device", {"sinks": f32(4, device="meta")}, r"sinks must be .*, on cpu, got torch.float32 on meta"),
            (
                "ids of floats",
                {"document_ids": f32(5)},
                r"document_ids must be a tensor of int32 or int64, got torch.f",
            ),
            (
                "ids as a list",
                {"document_ids": [0] * 5},
                r"document_ids must be a tensor or \(of queries, of keys\), got 5",
            ),
            (
                "ids for queries only",
                {"document_ids": torch.zeros(2, 5, dtype=torch.int64)},
                r"document_ids of shape \(2, 5\) must end in the number of keys, 6; where it differs",
            ),
            (
                "ids of another batch",
                {"document_ids": (torch.zeros(3, 5, dtype=torch.int64), torch.zeros(6, dtype=torch.int64))},
                r"document_ids of shape \(3, 5\) does not broadcast over the batch dimensions \(2,\)",
            ),
            (
                "prefix without causality",
                {"prefix_len": 2},
                r"prefix_len lifts causality or a window: pass is_causal=True or window=",
            ),
            ("prefix too long", {"prefix_len": 7, "is_causal": True}, r"prefix_len must be in \[0, 6\], got 7"),
            (
                "prefix of a fraction",
                {"prefix_len": 1.5, "is_causal": True},
                r"prefix_len must be in \[0, 6\], got 1.5",
            ),
            (
                "prefixes of another batch",
                {"prefix_len": torch.tensor([1, 2, 3]), "is_causal": True},
                r"prefix_len of shape \(3,\) does not broadcast over the batch dimensions \(2,\)",
            ),
        )
    },
    "attention prefixes too long": (
        attention(prefix_len=torch.tensor([1, 9]), is_causal=True),
        RuntimeError,
        r"attention: prefix_len must be in \[0, 6\], got 9",
    ),
    "attention negative prefix": (
        attention(prefix_len=torch.tensor([-1, 2]), window=(3, 3)),
        RuntimeError,
        r"attention: prefix_len must be in \[0, 6\], got -1",
    ),
    # packed sequences
    **{
        f"attention_varlen {name}": (varlen(**call), error, f"attention_varlen: {message}")
        for name, call, error, message in (
            ("dims", {"query": (1, 5, 4, 8)}, ValueError, r"query, key and value are \(T, H, D\), got 4, 3 and 3 dim"),
            ("dtypes", {"key": f32(6, 4, 8).double()}, ValueError, r".* one dtype and device, got query torch.float32"),
            (
                "integers",
                {n: f32(6, 4, 8).int() for n in ("query", "key", "value")},
                ValueError,
                r"dtype torch.int32 is",
            ),
            ("head dims", {"key": (6, 4, 9)}, ValueError, r"query and key must have one head dim, got 8 and 9"),
            ("lengths", {"value": (7, 4, 8)}, ValueError, r"key and value must have one length and as many heads, got"),
            ("heads", {"query": (5, 8, 8)}, ValueError, r"query has 8 heads, key and value 4: pass enable_gqa=True"),
            (
                "heads that do not divide",
                {"query": (5, 6, 8), "enable_gqa": True},
                ValueError,
                r"with enable_gqa the query heads \(6\) must be a multiple of the key heads \(4\)",
            ),
            (
                "no keys' bounds",
                {"keys": None},
                ValueError,
                r"cu_seq_k must be a 1-D tensor of int32 or int64, got None",
            ),
            (
                "bounds of floats",
                {"queries": f32(3)},
                ValueError,
                r"cu_seq_q must be a 1-D tensor .* got torch.float32",
            ),
            (
                "bounds of 2 dims",
                {"queries": torch.zeros(1, 3).long()},
                ValueError,
                r"cu_seq_q must be a 1-D tensor of",
            ),
            (
                "other counts",
                {"queries": (0, 5)},
                ValueError,
                r"cu_seq_q and cu_seq_k must both have shape \(N \+ 1,\), got \(2,\) and \(3,\)",
            ),
            (
                "no bounds at all",
                {"queries": torch.zeros(0).long(), "keys": torch.zeros(0).long()},
                ValueError,
                r"cu_seq_q and cu_seq_k must both have shape \(N \+ 1,\), got \(0,\) and \(0,\)",
            ),
            ("used", {"seqused_k": torch.tensor([1])}, ValueError, r"seqused_k must have shape \(2,\), got \(1,\)"),
            ("pages", {"block_table": torch.zeros(2, 1).int()}, ValueError, r"block_table is for caches: see fastattn"),
            ("splits", {"num_splits": -1}, ValueError, r"num_splits must be None or at least 0 .* got -1"),
            ("window", {"window_size": (-3, 0)}, ValueError, r"window must hold numbers of at least 0, .* \(-3, 0\)"),
            ("softcap", {"softcap": -1.0}, ValueError, r"softcap must be 0 or in"),
            ("scale", {"scale": math.inf}, ValueError, r"scale must be finite \(in float32\), got inf"),
            (
                "slopes",
                {"alibi_slopes": f32(3)},
                ValueError,
                r"alibi_slopes must have shape \(4,\) or \(2, 4\), got \(3",
            ),
            ("sinks", {"sinks": f32(3)}, ValueError, r"sinks must have shape \(4,\), got \(3,\)"),
            ("dropout", {"dropout_p": 2.0}, ValueError, r"dropout_p must be in \[0, 1\], got 2.0"),
            # values, which only kernels can see
            ("decreasing", {"queries": (0, 4, 3)}, RuntimeError, r"cu_seq_q must not decrease, got 3 at 2 after 4"),
            ("beyond the rows", {"keys": (0, 4, 7)}, RuntimeError, r"cu_seq_k must be in \[0, 6\], got 7 at 2"),
            ("negative", {"keys": (-1, 4, 6)}, RuntimeError, r"cu_seq_k must be in \[0, 6\], got -1 at 0"),
            (
                "far away",
                {"keys": (0, 2**62, 6)},
                RuntimeError,
                r"cu_seq_k must be in \[0, 6\], got 4611686018427387904",
            ),
            ("max_q", {"longest": (2, 4)}, RuntimeError, r"sequence 0 has 3 queries, more than max_q, 2"),
            ("max_k", {"longest": (3, 3)}, RuntimeError, r"sequence 0 has 4 keys, more than max_k, 3"),
            (
                "too many used",
                {"seqused_k": torch.tensor([4, 3])},
                RuntimeError,
                r"seqused_k must be in \[0, 2\], got 3 at 1",
            ),
        )
    },
    # norms
    **{
        f"{name} {what}": (norm(*args, **call), ValueError, f"{name}: {message}")
        for name, norm in (("layer_norm", layer_norm), ("rms_norm", rms_norm))
        for what, args, call, message in (
            (
                "integers",
                (f32(3, 8, dtype=torch.int64),),
                {},
                r"input must be float32, bfloat16, float16 or float64, got torch.int64",
            ),
            (
                "normalized_shape",
                ((3, 8), (7,)),
                {},
                r"the input's last dimensions must be normalized_shape \(7,\), got an input of shape \(3, 8\)",
            ),
            ("no normalized_shape", ((3, 8), ()), {}, r"the input's last dimensions must be normalized_shape \(\)"),
            (
                "more dims than the input",
                ((8,), (1, 8)),
                {},
                r"the input's last dimensions must be normalized_shape \(1, 8\), got",
            ),
            ("weight shape", ((3, 8), (8,), f32(7)), {}, r"weight must have shape \(8,\), got \(7,\)"),
            (
                "integer weight",
                ((3, 8), (8,), f32(8, dtype=torch.int32)),
                {},
                r"weight must be floating and on cpu, got torch.int32 on cpu",
            ),
            (
                "weight's device",
                ((3, 8), (8,), f32(8, device="meta")),
                {},
                r"weight must be floating and on cpu, got torch.float32 on meta",
            ),
            (
                "residual shape",
                ((3, 8), (8,)),
                {"residual": f32(8)},
                r"residual must have the input's shape \(3, 8\) and device cpu, got \(8,\) on cpu",
            ),
            (
                "integer residual",
                ((3, 8), (8,)),
                {"residual": f32(3, 8, dtype=torch.int32)},
                r"residual must be floating, got torch.int32",
            ),
        )
    },
    **{
        f"{name} {what}": (norm(**call), ValueError, f"{name}: {message}")
        for name, norm in (("add_layer_norm", add_layer_norm), ("add_rms_norm", add_rms_norm))
        for what, call, message in (
            (
                "residual shape",
                {"residual": f32(8)},
                r"residual must have the input's shape \(3, 8\) and device cpu, got",
            ),
            (
                "integers",
                {"input": f32(3, 8, dtype=torch.int64)},
                r"input must be float32, bfloat16, float16 or float64",
            ),
            (
                "integer residual",
                {"residual": f32(3, 8, dtype=torch.int32)},
                r"residual must be floating, got torch.int32",
            ),
            ("weight shape", {"weight": f32(7)}, r"weight must have shape \(8,\), got \(7,\)"),
            ("dropout_p above 1", {"dropout_p": 1.5}, r"dropout_p must be in \[0, 1\], got 1.5"),
            ("dropout_p of nothing", {"dropout_p": math.nan}, r"dropout_p must be in \[0, 1\], got nan"),
            ("negative seed", {"seed": -1}, r"seed must be in \[0, 2\*\*63\), got -1"),
            ("infinite weight_offset", {"weight_offset": math.inf}, r"weight_offset must be finite, got inf"),
        )
    },
    "layer_norm weight_offset": (
        layer_norm(weight_offset=math.nan),
        ValueError,
        r"layer_norm: weight_offset must be finite, got nan",
    ),
    "layer_norm bias shape": (
        layer_norm((3, 8), (8,), None, f32(8, 1)),
        ValueError,
        r"layer_norm: bias must have shape \(8,\), got \(8, 1\)",
    ),
    # views of one number that claim 2^62 elements
    "layer_norm beyond the address space": (
        layer_norm(f32(1).expand(2**40, 2**22), (2**22,)),
        ValueError,
        r"layer_norm: an input of shape \(1099511627776, 4194304\) is more than memory can address",
    ),
    "rms_norm beyond the address space": (
        rms_norm(f32(1).expand(2**40, 2**22), (2**22,)),
        ValueError,
        r"rms_norm: an input of shape \(1099511627776, 4194304\) is more than memory can address",
    ),
    # linear
    "unknown activation": (
        linear(activation="silu"),
        ValueError,
        r"linear: activation must be one of \(None, 'gelu', 'gelu_tanh', 'relu'\), got 'silu'",
    ),
    "integers into linear": (
        linear(f32(3, 8, dtype=torch.int64)),
        ValueError,
        r"linear: input must be float32, bfloat16, float16 or float64, got torch.int64",
    ),
    "weight of 3 dims": (linear((3, 8), (2, 4, 8)), ValueError, r"linear: weight must be \(out, in\) or \(in,\)"),
    "weight of other inputs": (
        linear((3, 8), (4, 7)),
        ValueError,
        r"for a weight of shape \(4, 7\) the input's last dimension must be 7, got an input of shape \(3, 8\)",
    ),
    "no dims into linear": (linear(f32(()), (4, 1)), ValueError, r"got an input of shape \(\)"),
    "bias of other outputs": (
        linear((3, 8), (4, 8), f32(5)),
        ValueError,
        r"linear: bias must have shape \(4,\), got \(5,\)",
    ),
    "weight of another dtype": (
        linear((3, 8), f32(4, 8, dtype=torch.bfloat16)),
        ValueError,
        r"linear: weight must be torch.float32 as the input, got torch.bfloat16",
    ),
    "bias on another device": (
        linear((3, 8), (4, 8), f32(4, device="meta")),
        ValueError,
        r"linear: bias is on meta, input on cpu",
    ),
    "linear beyond the address space": (
        linear(f32(1, 1).expand(2**40, 1), f32(1, 1).expand(2**30, 1)),
        ValueError,
        r"linear: an output of shape \(1099511627776, 1073741824\) is more than memory can address",
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


RAW_BAD = {
    "attention of 3 dims": lambda: torch.ops.fastattn.attention_forward.cpu(
        f32(2, 5, 8), f32(2, 5, 8), f32(2, 5, 8), None, None, 1.0, False, False, 0.0
    ),
    "attention of unfit keys": lambda: torch.ops.fastattn.attention_forward.cpu(
        f32(1, 2, 5, 8), f32(1, 2, 5, 9), f32(1, 2, 5, 8), None, None, 1.0, False, False, 0.0
    ),
    "attention without philox": lambda: torch.ops.fastattn.attention_forward.cpu(
        f32(1, 2, 5, 8), f32(1, 2, 5, 8), f32(1, 2, 5, 8), None, None, 1.0, False, False, 0.5
    ),
    "attention of a column stride": lambda: torch.ops.fastattn.attention_forward.cpu(
        f32(1, 2, 8, 5).transpose(2, 3), f32(1, 2, 5, 8), f32(1, 2, 5, 8), None, None, 1.0, False, False, 0.0
    ),
    "attention backward of a short lse": lambda: torch.ops.fastattn.attention_backward.cpu(
        *(f32(1, 2, 5, 8), None, f32(1, 2, 5, 8), f32(1, 2, 5, 8), f32(1, 2, 5, 8), None, None, f32(1, 2, 5, 8)),
        *(f32(1, 2, 4), 1.0, False, False, 0.0, False),
    ),
    "norm of a short weight": lambda: torch.ops.fastattn.layer_norm_forward.cpu(f32(3, 8), f32(7), None, 1, 1e-5, 0.0),
    "norm of a small residual": lambda: torch.ops.fastattn.add_rms_norm_forward.cpu(
        f32(3, 8), f32(3, 7), None, None, 1, 1e-5, 0.0, 0.0
    ),
    "norm backward of short statistics": lambda: torch.ops.fastattn.rms_norm_backward.cpu(
        f32(3, 8), f32(3, 8), None, f32(2), 1, 0.0, False
    ),
    "norm of a narrow residual": lambda: torch.ops.fastattn.add_layer_norm_forward.cpu(
        f32(3, 8), f32(3, 8, dtype=torch.bfloat16), None, None, None, 1, 1e-5, 0.0, 0.0
    ),
    "norm without philox": lambda: torch.ops.fastattn.add_layer_norm_forward.cpu(
        f32(3, 8), f32(3, 8), None, None, None, 1, 1e-5, 0.0, 0.5
    ),
    "norm backward of another sum's gradient": lambda: torch.ops.fastattn.add_layer_norm_backward.cpu(
        *(f32(3, 8), f32(3, 7), f32(3, 8), None, None, f32(3), f32(3), None, 1, 0.0, 0.0, torch.float32, False, False)
    ),
    "linear of other inputs": lambda: torch.ops.fastattn.linear_forward.cpu(f32(3, 8), f32(4, 7), None, 0, False),
    "linear of a short bias": lambda: torch.ops.fastattn.linear_forward.cpu(f32(3, 8), f32(4, 8), f32(3), 0, False),
    "linear of no activation": lambda: torch.ops.fastattn.linear_forward.cpu(f32(3, 8), f32(4, 8), None, 4, False),
    "linear backward of a short gradient": lambda: torch.ops.fastattn.linear_backward.cpu(
        f32(3, 3), f32(3, 8), f32(4, 8), None, None, 0, True, True, False
    ),
    "linear backward without what was saved": lambda: torch.ops.fastattn.linear_backward.cpu(
        f32(3, 4), f32(3, 8), f32(4, 8), None, None, 1, True, True, False
    ),
}


@pytest.mark.parametrize("name", RAW_BAD)
def test_the_bindings_check_for_themselves(name, skip_without_native):
    """Exported graphs call the raw ops without the public functions in front of them."""
    with pytest.raises(RuntimeError):
        RAW_BAD[name]()
