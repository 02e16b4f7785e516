"""What the cases of linear do not say: where gradients of transposed weights lie."""

import pytest
import torch
import torch.nn.functional as F

import fastattn


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, False), (False, True, True)], ids=str)
def test_gradients_of_transposed_weights_lie_like_the_weights(backend, dtype, activation, wanted):
    torch.manual_seed(0)
    drawn = [torch.randn(2, 3, 12), torch.randn(12, 8), torch.randn(8)]

    def found(function, kind):
        x, stored, bias = (t.to(kind, copy=True).requires_grad_(w) for t, w in zip(drawn, wanted, strict=True))
        function(x, stored.t(), bias).square().sum().backward()
        return x.grad, stored.grad, bias.grad

    def torchs(x, weight, bias):
        product = F.linear(x, weight, bias)
        return product if activation is None else F.gelu(product)

    mine = found(lambda *args: fastattn.linear(*args, activation, backend=backend), dtype)
    other, truth = found(torchs, dtype), found(torchs, torch.float64)
    assert activation is not None or mine[1].is_contiguous()
    for a, b, exact in zip(mine, other, truth, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            fastattn.testing.assert_lawful(a, b, exact)


@pytest.mark.parametrize("shape", [(0, 12), (1, 12), (3, 0)], ids=str)
def test_transposed_weights_of_few_rows_and_columns(shape, hold_to):
    x, stored = torch.randn(shape), torch.randn(shape[-1], 8, requires_grad=True)
    output = fastattn.linear(x, stored.t(), backend="cpu")
    output.sum().backward()
    hold_to(lambda w: x.to(w.dtype) @ w, [stored], [output, stored.grad], torch.ones(shape[0], 8))


def test_second_derivatives_and_graphs_of_transposed_weights(hold_to):
    x, stored = torch.randn(3, 12, dtype=torch.float64), torch.randn(12, 8, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda x, w: fastattn.linear(x, w.t()).square(), (x.requires_grad_(), stored.requires_grad_())
    )
    x, stored = x.float().detach(), stored.float().detach().requires_grad_()
    compiled = torch.compile(lambda x, w: fastattn.linear(x, w.t(), backend="cpu"), backend="aot_eager", fullgraph=True)
    output = compiled(x, stored)
    output.sum().backward()
    hold_to(lambda w: x.to(w.dtype) @ w, [stored], [output, stored.grad], torch.ones(3, 8))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_exported_with_any_number_of_rows(backend):
    weight = torch.randn(8, 12)

    class Model(torch.nn.Module):
        def forward(self, x):
            return fastattn.linear(x, weight, None, "gelu", backend=backend)

    rows = torch.export.Dim("rows", min=2, max=1024)
    program = torch.export.export(Model(), (torch.randn(4, 3, 12),), dynamic_shapes={"x": {0: rows}})
    x = torch.randn(9, 3, 12)
    assert torch.equal(program.module()(x), Model()(x))
