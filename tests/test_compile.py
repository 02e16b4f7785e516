"""The ops under torch.compile, torch.export and AOTInductor."""

import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastattn
from fastattn import numerics, testing
from fastattn.testing.opcheck import available_backends

SUITES = testing.suites()
BACKENDS = available_backends("cpu")
sdpa = fastattn.scaled_dot_product_attention

# Cases that are compiled, with gradients, by every backend: one per feature that takes a path of its own.
COMPILED = {
    "attention": (
        "lse mask", "gqa causal mask", "bshd causal", "3 dims", "batch dims broadcast", "columns first",
        "5 dims mask 3x20x30", "query is key is value", "dropout mask", "lse dead rows", "no keys",
    ),
    "layer_norm": ("prenorm", "no affine", "parameters of two dtypes", "2 normalised dims", "transposed"),
    "linear": ("gelu, bias", "relu, no bias", "vector weight", "transposed weight", "gradient of the input only"),
    "rms_norm": ("prenorm", "no weight", "float32 weight", "permuted rows", "weight offset"),
    "add_layer_norm": ("dropout 0.5", "dropout into a float32 residual", "strided rows", "weight offset"),
    "add_rms_norm": ("dropout 0.5", "dropout into a float32 residual", "no weight"),
    "linear_cross_entropy": (
        "mean smoothing bias weight", "none bias", "probabilities mean", "positions mean", "gradient of the input only",
    ),
    "softmax": (
        "to float32", "dim 1 of 4", "no dims", "mask of heads", "bool mask, dim 1", "causal bottom_right scale mask",
    ),
    "log_softmax": ("33 columns", "transposed, dim 0", "bool mask", "causal top_left 33x70"),
    "gelu": ("none 33 columns", "tanh float32 bias", "sigmoid transposed bias"),
    "silu": ("33 columns", "float32 bias", "transposed bias"),
    "swiglu": ("33 columns, packed", "transposed"),
    "cross_entropy": (
        "mean smoothing weight ignoring 3", "probabilities none smoothing weight", "3 dims mean", "one dim",
        "uint8 targets", "z_loss softcap none", "z_loss returned",
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def evaluate(function, suite, case, dtype):
    arguments = suite.arguments(case, "cpu", dtype)
    return testing.evaluate(
        function,
        arguments,
        suite.differentiated(case, arguments),
        suite.results,
        lambda _, output: torch.ones_like(output),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("suite", "name"), [pytest.param(SUITES[s], c, id=f"{s}-{c}") for s, names in COMPILED.items() for c in names]
)
def test_fullgraph_gives_the_bits_of_eager(suite, name, backend):
    case = next(c for c in suite.cases if c.name == name)

    def function(**kwargs):
        return suite.function(**kwargs, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager = evaluate(function, suite, case, torch.float32)
    found = evaluate(compiled, suite, case, torch.float32)
    assert found.keys() == eager.keys()
    for result, tensor in found.items():
        assert testing.same_bits(tensor, eager[result]), result
        assert tensor.stride() == eager[result].stride(), result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_fullgraph_in_16_bits(suite, dtype):
    case = next(c for c in suite.cases if c.core)
    compiled = torch.compile(suite.function, fullgraph=True, backend="aot_eager")
    eager, found = evaluate(suite.function, suite, case, dtype), evaluate(compiled, suite, case, dtype)
    assert all(testing.same_bits(found[name], eager[name]) for name in eager)


def block(x, w, b, target, table):
    """A layer's worth of ops, with everything between them that a model has."""
    h = fastattn.layer_norm(x, (32,), w, b)
    q, k, v = (h @ table).view(*h.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4)
    h = sdpa(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    h, x = fastattn.rms_norm(h, (32,), w, residual=x, prenorm=True)
    weights = fastattn.softmax(h + x, -1)
    return fastattn.cross_entropy(weights.flatten(0, 1), target.flatten())


def block_arguments(batch=2, length=20, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = ((batch, length, 32), (32,), (32,), (32, 96))
    x, w, b, table = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    return x, w, b, torch.randint(32, (batch, length)), table


def results(function, arguments):
    """The loss and its gradients."""
    leaves = [t for t in arguments if t.requires_grad]
    loss = function(*arguments)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def assert_same_bits(found, expected):
    assert all(testing.same_bits(a.detach(), b.detach()) for a, b in zip(found, expected, strict=True))


def assert_compiled_is_as_exact(compiled, arguments):
    """Against fp64, with the eager block in the place of torch's own kernel."""
    doubled = [t.detach().double().requires_grad_() if t.requires_grad else t for t in arguments]
    found = (results(function, given) for function, given in (
        (compiled, arguments), (block, arguments), (block, doubled)
    ))  # fmt: skip
    for i, (ours, eager, truth) in enumerate(zip(*found, strict=True)):
        errors = numerics.error(ours, truth), numerics.error(eager, truth)
        assert numerics.violation(*errors, arguments[0].dtype) is None, i


def test_inductor():
    """One graph of all ops through the real compiler."""
    assert_compiled_is_as_exact(torch.compile(block, fullgraph=True), block_arguments())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inductor_with_dynamic_shapes(dtype):
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for batch, length in ((2, 20), (3, 33), (1, 64)):
        assert_compiled_is_as_exact(compiled, block_arguments(batch, length, dtype))


def test_dynamic_shapes_compile_once():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for batch, length in ((2, 20), (3, 33), (4, 64), (7, 5)):
        arguments = block_arguments(batch, length)
        assert_same_bits(results(compiled, arguments), results(block, arguments))
        compilations.append(counter.frame_count)
    # The first call may trace twice: a scale that follows from a symbolic head dim is only then known to be a number.
    assert compilations == [compilations[0]] * 4


def test_automatic_dynamic_shapes_compile_twice():
    """Static at first, dynamic once a second length turns up, and then no more."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q, k, v: sdpa(q, k, v, is_causal=True), fullgraph=True, backend=counter)
    for length in (16, 24, 40, 57, 130):
        q, k, v = (torch.randn(2, 3, length, 8) for _ in range(3))
        assert testing.same_bits(compiled(q, k, v), sdpa(q, k, v, is_causal=True))
    assert counter.frame_count == 2


def test_graphs_hold_one_node_named_after_the_backend():
    graphs = []

    def spy(graph, _):
        graphs.append(graph)
        return graph.forward

    (x,) = (torch.randn(1, 2, 9, 8),)
    for backend in BACKENDS:
        torch._dynamo.reset()
        torch.compile(lambda x, b=backend: sdpa(x, x, x, backend=b), fullgraph=True, backend=spy)(x)
        nodes = [node.target for node in graphs.pop().graph.nodes if "fastattn" in str(node.target)]
        assert nodes == [getattr(torch.ops.fastattn.attention, backend)]


def test_changing_the_forced_backend_compiles_again():
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda x: fastattn.softmax(x, -1), fullgraph=True, backend=counter)
    x = torch.randn(3, 5)
    for name in (*BACKENDS, *BACKENDS):
        with fastattn.use_backend(name):
            compiled(x)
    assert counter.frame_count == len(BACKENDS)
    held = {
        str(node.target) for graph in counter.graphs for node in graph.graph.nodes if "fastattn" in str(node.target)
    }
    assert held == {f"fastattn.softmax.{name}" for name in BACKENDS}


def test_a_forced_backend_that_cannot_serve_says_so_while_compiling(skip_without_native):
    x = torch.randn(1, 1, 3, 4, dtype=torch.float64)
    compiled = torch.compile(lambda x: sdpa(x, x, x, backend="cpu"), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"BackendUnsupported|has no kernel for torch.float64"):
        compiled(x)


def test_dropout_follows_the_generator():
    q, k, v = (torch.randn(2, 2, 30, 8, requires_grad=True) for _ in range(3))

    def function(q, k, v):
        return sdpa(q, k, v, dropout_p=0.5)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        found = []
        for call in (function, compiled):
            torch.manual_seed(seed)
            output = call(q, k, v)
            found.append((output, *torch.autograd.grad(output.sum(), (q, k, v))))
        assert all(testing.same_bits(a.detach(), b.detach()) for a, b in zip(*found, strict=True))


def test_autocast_inside_and_outside_of_the_graph():
    q, k, v = (torch.randn(2, 3, 9, 8) for _ in range(3))

    def inside(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return sdpa(q, k, v)

    expected = inside(q, k, v)
    assert testing.same_bits(torch.compile(inside, fullgraph=True, backend="aot_eager")(q, k, v), expected)
    compiled = torch.compile(sdpa, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert testing.same_bits(compiled(q, k, v), expected)
    assert compiled(q, k, v).dtype == torch.float32


def test_checkpointing_inside_of_the_graph():
    from torch.utils.checkpoint import checkpoint

    q, k, v = (torch.randn(2, 2, 30, 8, requires_grad=True) for _ in range(3))

    def function(q, k, v):
        return checkpoint(lambda *t: sdpa(*t, is_causal=True).square(), q, k, v, use_reentrant=False).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(f(q, k, v), (q, k, v)) for f in (compiled, function))
    assert all(testing.same_bits(a, b) for a, b in zip(found, expected, strict=True))


# ---- export ----


class Model(torch.nn.Module):
    """Attention over itself (the same tensor three times), a norm and a loss."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, 16))

    def forward(self, x, target):
        h = sdpa(x, x, x, is_causal=True)
        h = fastattn.rms_norm(h, (16,), self.weight, residual=x)
        return fastattn.softmax(h, -1), fastattn.cross_entropy(h.flatten(0, 2), target.flatten())


def sample(batch, length):
    return torch.randn(batch, 2, length, 16), torch.randint(16, (batch, 2, length))


def exported():
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=4096)
    shapes = {"x": {0: batch, 2: length}, "target": {0: batch, 2: length}}
    return torch.export.export(Model(), sample(3, 10), dynamic_shapes=shapes, strict=False)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_batch_and_length(strict):
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=4096)
    shapes = {"x": {0: batch, 2: length}, "target": {0: batch, 2: length}}
    program = torch.export.export(Model(), sample(3, 10), dynamic_shapes=shapes, strict=strict)
    for size in ((3, 10), (1, 2), (5, 77)):
        arguments = sample(*size)
        assert_same_bits(program.module()(*arguments), Model()(*arguments))


def test_exported_programs_are_saved_and_run_elsewhere(tmp_path):
    """Another process needs `import fastattn` and nothing else."""
    arguments = sample(2, 21)
    torch.export.save(exported(), tmp_path / "model.pt2")
    torch.save((arguments, Model()(*arguments)), tmp_path / "sample.pt")
    code = (
        "import torch, fastattn\n"
        f"arguments, expected = torch.load({str(tmp_path / 'sample.pt')!r})\n"
        f"program = torch.export.load({str(tmp_path / 'model.pt2')!r})\n"
        "found = program.module()(*arguments)\n"
        "assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))\n"
        "print('equal')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout == "equal\n", done.stderr


def test_exported_programs_can_be_decomposed_and_trained():
    program = torch.export.export(Model(), sample(3, 10), strict=False).run_decompositions()
    targets = {str(node.target) for node in program.graph.nodes if "fastattn" in str(node.target)}
    assert len(targets) == 4, "one node for each op"
    model = program.module()
    x, target = sample(3, 10)
    x.requires_grad_()
    found = torch.autograd.grad(model(x, target)[1], x)
    assert_same_bits(found, torch.autograd.grad(Model()(x, target)[1], x))


@pytest.mark.slow
def test_aot_inductor_package(tmp_path):
    path = torch._inductor.aoti_compile_and_package(exported(), package_path=str(tmp_path / "model.pt2"))
    run = torch._inductor.aoti_load_package(path)
    for size in ((3, 10), (5, 77)):
        arguments = sample(*size)
        assert_same_bits(run(*arguments), Model()(*arguments))
