"""Peers compute what the op means, and the truth of some heads is the truth."""

import pytest
import torch

from fastattn.bench import cases, contenders, trial
from fastattn.bench.contenders import COMPILE, EAGER, FLEX, OURS, TORCH
from fastattn.bench.gate import judge
from fastattn.bench.trial import BOTH, FORWARD, Trial
from fastattn.cases import Workload
from fastattn.ops.attention.cases import definition
from fastattn.testing import assert_lawful


def padding(sampler):
    return {
        "query": sampler.normal(2, 3, 20, 8),
        "key": sampler.normal(2, 3, 20, 8),
        "value": sampler.normal(2, 3, 20, 8),
        "attn_mask": (torch.arange(20) < torch.tensor([[20], [11]]))[:, None, None, :],
    }


def grouped(sampler, **call):
    return {
        "query": sampler.normal(2, 6, 20, 8),
        "key": sampler.normal(2, 2, 20, 8),
        "value": sampler.normal(2, 2, 20, 8),
        "enable_gqa": True,
        **call,
    }


def one(batch, heads, length, dim, **call):
    def build(sampler):
        return {name: sampler.normal(batch, heads, length, dim) for name in ("query", "key", "value")} | call

    return build


PROBLEMS = {
    "full": one(2, 3, 20, 8),
    "causal": one(2, 3, 20, 8, is_causal=True),
    "scale": one(2, 3, 20, 8, scale=0.7),
    "padding": padding,
    "padding causal": lambda s: {**padding(s), "is_causal": True},
    "gqa": grouped,
    "gqa causal": lambda s: grouped(s, is_causal=True),
}


def attention_trial(build):
    return Trial(cases.suite_of("attention"), Workload("test", build, 1, 1, 1, 1), torch.float32)


def functions():
    """The contenders without torch.compile."""
    made = {
        name: make() for name, make in contenders.choices(cases.suite_of("attention")).items() if name in (OURS, EAGER)
    }
    written_out = contenders.Contender(COMPILE, contenders.attention_written_out, contenders.additive_mask)
    return [*made.values(), written_out]


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("contender", functions(), ids=lambda c: c.name)
def test_attention_contenders_mean_attention(problem, contender):
    t = attention_trial(PROBLEMS[problem])
    truth, part = t.truth()
    assert part is None
    torchs = t.call(contenders.choices(t.suite)[TORCH](), BOTH)()
    for direction in (FORWARD, BOTH):
        results = t.call(contender, direction)()
        assert set(results) == ({"output"} if direction == FORWARD else set(truth))
        assert judge(results, torchs, {name: truth[name] for name in results}, t.dtype) == []


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_truth_is_the_definition(problem, monkeypatch):
    t = attention_trial(PROBLEMS[problem])
    wide = {n: a.double() if torch.is_tensor(a) and a.is_floating_point() else a for n, a in t.arguments.items()}
    leaves = {name: wide[name].detach().requires_grad_() for name in ("query", "key", "value")}
    output = definition(**{**wide, **leaves})
    grads = torch.autograd.grad(output, list(leaves.values()), t.grad_outputs["output"].double())
    full = {"output": output.detach(), **{f"grad_{n}": g for n, g in zip(leaves, grads, strict=True)}}
    monkeypatch.setattr(trial, "TRUTH_FLOPS", 0)
    truth, part = t.truth()
    assert part is not None
    for name, expected in part(full).items():
        assert_lawful(truth[name], expected, expected)


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "softmax", "log_softmax", "cross_entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rowwise_contenders(op, dtype):
    suite = cases.suite_of(op)
    (workload,) = cases.parse_shape(op, "5,33")
    t = Trial(suite, workload, dtype)
    truth, part = t.truth()
    assert part is None
    made = contenders.choices(suite)
    assert set(made) == {OURS, TORCH, COMPILE}
    ours, torchs = (t.call(made[name](), BOTH)() for name in (OURS, TORCH))
    assert set(ours) == set(torchs) == set(truth)
    assert judge(ours, torchs, truth, dtype) == []


def test_eager_leaves_masks_and_inputs_alone():
    t = attention_trial(PROBLEMS["padding"])
    before = {name: a.clone() for name, a in t.arguments.items()}
    contender = contenders.choices(t.suite)[EAGER]()
    first, second = t.call(contender, FORWARD)()["output"], t.call(contender, FORWARD)()["output"]
    assert torch.equal(first, second)
    assert all(torch.equal(before[name], a) for name, a in t.arguments.items())


def test_names():
    suite = cases.suite_of("attention")
    assert contenders.names(suite, None) == [OURS, TORCH, EAGER, COMPILE]
    assert contenders.names(suite, ["eager"]) == [OURS, TORCH, EAGER]
    assert contenders.names(suite, ["flex", "fastattn"]) == [OURS, TORCH, FLEX]
    with pytest.raises(ValueError, match="no contender 'cudnn'; there are fastattn, torch, eager, compile, flex"):
        contenders.names(suite, ["cudnn"])
