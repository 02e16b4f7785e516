"""Our kernels behind torch's operators: served, lying in memory as promised, and gone when restored."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import dispatch, testing
from fastattn.integrations import left_to_torch, sdpa

pytestmark = pytest.mark.skipif(sdpa.reason() is not None, reason=str(sdpa.reason()))
RESTORES = hasattr(torch.nn.attention, "restore_flash_attention_impl")
STAYS = f"torch {torch.__version__} cannot go back to its own implementation"
ON_CPU = "aten::_scaled_dot_product_flash_attention_for_cpu"


@pytest.fixture
def activated():
    if not RESTORES:
        pytest.skip(STAYS)
    torch.nn.attention.activate_flash_attention_impl("fastattn")
    yield
    torch.nn.attention.restore_flash_attention_impl()


def drawn(order, queries=19, heads=4, kv_heads=4, dim=16, dtype=torch.float32):
    """q, k and v (B, H, S, D): contiguous, transposed from (B, S, H, D), or slices of one projection."""
    torch.manual_seed(0)
    if order == "packed":
        return [t.transpose(1, 2).requires_grad_() for t in torch.randn(2, queries, 3, heads, dim).to(dtype).unbind(2)]
    shapes = [(2, h, n, dim) for h, n in ((heads, queries), (kv_heads, 19), (kv_heads, 19))]
    if order == "heads first":
        return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    return [torch.randn(b, s, h, d).to(dtype).transpose(1, 2).requires_grad_() for b, h, s, d in shapes]


CALLS = {
    "plain": ({}, {}),
    "causal": ({}, {"is_causal": True}),
    "scale": ({}, {"scale": 0.3}),
    "fewer queries": ({"queries": 5}, {"is_causal": True}),
    "grouped": ({"kv_heads": 2}, {"enable_gqa": True}),
    "bool mask": ({}, {"attn_mask": torch.rand(19, 19) > 0.4}),
    "padding": ({}, {"attn_mask": torch.arange(19)[None, None, None] < torch.tensor([19, 7])[:, None, None, None]}),
    "additive mask": ({}, {"attn_mask": torch.randn(2, 1, 19, 19)}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", ["heads first", "sequence first"])
@pytest.mark.parametrize("name", CALLS)
def test_served_as_torch_serves(name, order, dtype, activated, skip_without_native):
    """Results and gradients under the law; strides as the fakes say."""
    shape, call = CALLS[name]
    if call.get("attn_mask") is not None and call["attn_mask"].is_floating_point():
        call = {"attn_mask": call["attn_mask"].to(dtype)}
    inputs = drawn(order, dtype=dtype, **shape)
    before = left_to_torch.counts()
    output = F.scaled_dot_product_attention(*inputs, **call)
    grad = torch.randn_like(output)
    grads = torch.autograd.grad(output, inputs, grad)
    counts = left_to_torch.counts() - before
    assert counts.served[ON_CPU] == counts.served[f"{ON_CPU}_backward"] == 1 and not counts.left
    torch.nn.attention.restore_flash_attention_impl()
    peer = F.scaled_dot_product_attention(*inputs, **call)
    assert peer.stride() == output.stride()
    peers = torch.autograd.grad(peer, inputs, grad)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    wide = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in call.items()}
    truth = F.scaled_dot_product_attention(*exact, **wide)
    truths = torch.autograd.grad(truth, exact, grad.double())
    for result, other, true in zip((output, *grads), (peer, *peers), (truth, *truths), strict=True):
        testing.assert_lawful(result, other, true)
    torch.nn.attention.activate_flash_attention_impl("fastattn")


@pytest.mark.parametrize("order", ["heads first", "sequence first", "packed"])
def test_results_lie_as_the_fakes_promise(order, activated, skip_without_native):
    inputs = drawn(order)
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    with torch.no_grad():
        results = forward(*inputs, 0.0, True)
        grads = backward(torch.ones_like(results[0]), *inputs, *results, 0.0, True)
        on_meta = [t.to("meta") for t in (*inputs, *results)]
        promised = [*forward(*on_meta[:3], 0.0, True), *backward(on_meta[3], *on_meta, 0.0, True)]
    for result, other in zip((*results, *grads), promised, strict=True):
        assert result.shape == other.shape and result.dtype == other.dtype
    for result, other in zip(results, promised[:2], strict=True):
        assert result.stride() == other.stride()
    for grad in grads:
        assert grad.transpose(1, 2).is_contiguous()


def test_compiled(activated, skip_without_native):
    """Inductor asserts layouts; both directions come to our kernels."""
    torch._dynamo.reset()
    inputs = drawn("sequence first")

    def call(q, k, v):
        return F.scaled_dot_product_attention(q * 2, k, v, is_causal=True).transpose(1, 2).flatten(2) * 3

    expected = call(*inputs)
    grads = torch.autograd.grad(expected.sum(), inputs)
    before = left_to_torch.counts()
    output = torch.compile(call, fullgraph=True)(*inputs)
    assert torch.equal(output, expected)
    for grad, other in zip(torch.autograd.grad(output.sum(), inputs), grads, strict=True):
        assert torch.equal(grad, other)
    counts = left_to_torch.counts() - before
    assert counts.served[ON_CPU] == 1 and counts.served[f"{ON_CPU}_backward"] == 1


def test_what_is_not_served_is_torchs_and_counted(activated, skip_without_native):
    inputs = [t.detach().double() for t in drawn("heads first")]
    before = left_to_torch.counts()
    output = F.scaled_dot_product_attention(*inputs)
    counts = left_to_torch.counts() - before
    assert counts.served[ON_CPU] == 0
    ((name, reason),) = counts.left
    assert name == ON_CPU and "has no kernel for torch.float64" in reason
    torch.nn.attention.restore_flash_attention_impl()
    assert torch.equal(output, F.scaled_dot_product_attention(*inputs))
    torch.nn.attention.activate_flash_attention_impl("fastattn")
    explained = str(fastattn.explain(fastattn.scaled_dot_product_attention, *inputs))
    assert "fastattn is active" in explained and f"left to torch: 1 x {ON_CPU}" in explained


def test_a_forced_backend_is_forced(activated):
    inputs = [t.detach() for t in drawn("heads first")]
    dispatch.reset_served()
    with fastattn.use_backend("reference"):
        F.scaled_dot_product_attention(*inputs)
    assert dispatch.served() == {"reference": 1}


FOR_GOOD = """
import torch, torch.nn.functional as F, fastattn
q, k, v = (torch.randn(2, 4, 33, 16, requires_grad=True) for _ in range(3))
torch.nn.attention.activate_flash_attention_impl("fastattn")
after = F.scaled_dot_product_attention(q, k, v, is_causal=True)
ours = fastattn.scaled_dot_product_attention(q, k, v, is_causal=True)
assert torch.equal(after, ours), (after - ours).abs().max()
grads = [torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (after, ours)]
assert all(torch.equal(a, b) for a, b in zip(*grads))
print(fastattn.explain(fastattn.scaled_dot_product_attention, q, k, v))
"""


def test_activated_for_good(skip_without_native):
    """In a process of its own, which is all that torch 2.10 can do."""
    done = subprocess.run([sys.executable, "-c", FOR_GOOD], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "torch.nn.attention: fastattn is active" in done.stdout


@pytest.mark.skipif(not RESTORES, reason=STAYS)
def test_registered_activated_restored(skip_without_native):
    registry = torch.nn.attention
    assert "fastattn" in registry.list_flash_attention_impls()
    assert registry.current_flash_attention_impl() is None
    inputs = [t.detach() for t in drawn("heads first")]
    native = F.scaled_dot_product_attention(*inputs)
    registry.activate_flash_attention_impl("fastattn")
    registry.activate_flash_attention_impl("fastattn")  # again: the first is taken back
    assert registry.current_flash_attention_impl() == "fastattn"
    dispatch.reset_served()
    F.scaled_dot_product_attention(*inputs)
    assert dispatch.served() == {"cpu": 1}
    registry.restore_flash_attention_impl()
    dispatch.reset_served()
    assert torch.equal(F.scaled_dot_product_attention(*inputs), native) and dispatch.served() == {}
    assert registry.current_flash_attention_impl() is None


# ---- packed sequences ----

BOUNDS = torch.tensor([0, 3, 3, 23], dtype=torch.int32)


def packed(kv_heads=4, dtype=torch.float32):
    torch.manual_seed(1)
    return [torch.randn(23, h, 16).to(dtype).requires_grad_() for h in (4, kv_heads, kv_heads)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (5, 2)])
def test_varlen_attn(window, dtype, activated):
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    inputs = packed(2, dtype)
    call = {"window_size": window, "enable_gqa": True, "return_aux": AuxRequest(lse=True), "scale": 0.3}
    output, lse = varlen_attn(*inputs, BOUNDS, BOUNDS, 20, 20, **call)
    expected, other = fastattn.attention_varlen(*inputs, BOUNDS, BOUNDS, 20, 20, **call)
    assert torch.equal(output, expected) and torch.equal(lse, other.float())
    grad = torch.randn_like(output)
    for a, b in zip(
        torch.autograd.grad(output, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        assert torch.equal(a, b) and a.stride() == b.stride()


@pytest.mark.skipif(not RESTORES, reason=STAYS)
def test_torch_itself_has_no_varlen_attn_for_cpus(skip_without_native):
    """What it says while ours is not active."""
    from torch.nn.attention.varlen import varlen_attn

    inputs = [t.detach() for t in packed()]
    with pytest.raises(NotImplementedError, match="Could not run 'aten::_flash_attention_forward'"):
        varlen_attn(*inputs, BOUNDS, BOUNDS, 20, 20)


def test_varlen_attn_of_caches(activated):
    """seqused_k, pages and an output that is given."""
    from torch.nn.attention.varlen import varlen_attn, varlen_attn_out

    q, k, v = (t.detach() for t in packed())
    used = torch.tensor([2, 0, 15], dtype=torch.int32)
    expected = fastattn.attention_varlen(q, k, v, BOUNDS, BOUNDS, 20, 20, seqused_k=used)
    assert torch.equal(varlen_attn(q, k, v, BOUNDS, BOUNDS, 20, 20, seqused_k=used), expected)
    out = torch.empty_like(q)
    varlen_attn_out(out, q, k, v, BOUNDS, BOUNDS, 20, 20, seqused_k=used)
    assert torch.equal(out, expected)
    pools = [torch.full((8, 4, 4, 16), torch.nan) for _ in range(2)]
    table = torch.tensor([[5, 99, 99, 99], [99, 99, 99, 99], [2, 0, 7, 1]], dtype=torch.int32)
    for pool, rows in zip(pools, (k, v), strict=True):
        for b, start in enumerate((0, 3, 3)):
            for j in range(int(used[b])):
                pool[table[b, j // 4], j % 4] = rows[start + j]
    paged = varlen_attn(q, *pools, BOUNDS, None, 20, 20, seqused_k=used, block_table=table)
    assert torch.equal(paged, expected)


def test_varlen_attn_compiled(activated, skip_without_native):
    from torch.nn.attention.varlen import varlen_attn

    torch._dynamo.reset()
    inputs = packed()

    def call(q, k, v):
        return varlen_attn(q, k, v, BOUNDS, BOUNDS, 20, 20, window_size=(-1, 0)) * 2

    expected = call(*inputs)
    output = torch.compile(call, fullgraph=True)(*inputs)
    assert torch.equal(output, expected)
    for a, b in zip(
        torch.autograd.grad(output.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        assert torch.equal(a, b)


def test_jagged(activated, hold_to):
    """Causal, which torch has no CPU kernel for; what is not served is torch's."""
    rows = torch.randn(23, 2, 8, requires_grad=True)
    side = torch.nested.nested_tensor_from_jagged(rows, BOUNDS.long()).transpose(1, 2)
    output = F.scaled_dot_product_attention(side, side, side, is_causal=True)
    found, grad = output.transpose(1, 2).values(), torch.randn(23, 2, 8)

    def one_by_one(rows):
        sides = (rows[a:b].transpose(0, 1)[None] for a, b in itertools.pairwise(BOUNDS.tolist()))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            outputs = [F.scaled_dot_product_attention(side, side, side, is_causal=True) for side in sides]
        return torch.cat([output[0].transpose(0, 1) for output in outputs])

    hold_to(one_by_one, [rows], [found, *torch.autograd.grad(found, rows, grad)], grad)
    with pytest.raises(ValueError, match="Expected query, key, and value to be nested"):  # torch's own words
        F.scaled_dot_product_attention(side, side, torch.randn(3, 2, 5, 8))
    torch.nn.attention.restore_flash_attention_impl()
    with pytest.raises(RuntimeError, match="No viable backend"):
        F.scaled_dot_product_attention(side, side, side, is_causal=True)
    torch.nn.attention.activate_flash_attention_impl("fastattn")


# ---- what CUDA tensors come to, on CPU tensors: the same Python ----


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("order", ["heads first", "sequence first", "packed"])
def test_the_gpu_operators(order, dropout_p):
    inputs = drawn(order)
    plain = [t.detach() for t in inputs]
    output, lse, _, _, queries, keys, seed, offset, debug = sdpa._sdpa_gpu(*plain, dropout_p, True, scale=0.3)
    assert (queries, keys) == (19, 19) and debug.numel() == 0 and seed.dtype == torch.uint64
    state = seed.view(torch.int64) if dropout_p else None
    call = {"dropout_p": dropout_p, "is_causal": True, "scale": 0.3, "seed": state, "return_lse": True}
    expected, other = fastattn.scaled_dot_product_attention(*inputs, **call)
    assert torch.equal(output, expected) and torch.equal(lse, other) and lse.is_contiguous()
    assert output.stride() == torch.empty_like(inputs[0]).stride()
    grad = torch.randn_like(output)
    grads = sdpa._sdpa_gpu_backward(
        grad, *plain, output, lse, None, None, 19, 19, dropout_p, True, seed, offset, scale=0.3
    )
    for a, b, side in zip(grads, torch.autograd.grad(expected, inputs, grad), inputs, strict=True):
        assert torch.equal(a, b) and a.stride() == torch.empty_like(side).stride()


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_dense_flash_operator(dropout_p):
    """(B, S, H, D), bottom right, with windows and slopes, which torch's backward has no argument for."""
    heads = drawn("sequence first", queries=11)
    inputs = [t.transpose(1, 2).detach() for t in heads]
    for slopes in (torch.rand(4), None):
        output, lse, seed, offset, _ = sdpa._flash(
            *inputs, None, None, 11, 19, dropout_p, True, False, window_size_left=6, alibi_slopes=slopes
        )
        expected, other = fastattn.scaled_dot_product_attention(
            *heads, dropout_p=dropout_p, is_causal=True, causal_alignment="bottom_right", window=(6, -1),
            alibi_slopes=slopes, seed=seed.view(torch.int64) if dropout_p else None, return_lse=True,
        )  # fmt: skip
        assert torch.equal(output.transpose(1, 2), expected) and torch.equal(lse, other)
    grad = torch.randn_like(output)
    grads = sdpa._flash_backward(
        grad, *inputs, output, lse, None, None, 11, 19, dropout_p, True, seed, offset, window_size_left=6
    )
    for a, b, side in zip(grads, torch.autograd.grad(expected, heads, grad.transpose(1, 2)), inputs, strict=True):
        assert torch.equal(a.transpose(1, 2), b) and a.stride() == side.stride()


def test_what_is_left_to_torch_draws_no_dropout():
    inputs = [t.transpose(1, 2).detach() for t in drawn("sequence first")]
    before = torch.get_rng_state()
    with pytest.raises(sdpa._NotServed, match="are for packed sequences"):
        sdpa._flash(*inputs, None, None, 19, 19, 0.3, True, False, seqused_k=torch.tensor([3, 4]))
    with pytest.raises(sdpa._NotServed, match="head"):
        sdpa._flash(inputs[0], inputs[1][..., :1], inputs[2], None, None, 19, 19, 0.3, True, False)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_torch_without_a_registry(monkeypatch):
    """Imports all the same, and says what is missing."""
    for name in ("register_flash_attention_impl", "activate_flash_attention_impl", "current_flash_attention_impl"):
        monkeypatch.delattr(torch.nn.attention, name)
    sdpa.register()
    assert "has no registry of flash-attention implementations" in str(sdpa.reason())
    text = str(fastattn.explain(fastattn.attention_varlen, *packed(), BOUNDS, BOUNDS, 20, 20))
    assert f"torch.nn.attention: {sdpa.reason()}" in text
