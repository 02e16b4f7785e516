"""What is measured on a GPU: every section is a list of jobs, a job makes one row.

Correctness comes before speed, in its own section and in every row that takes times: a contender that breaks the
accuracy law is not timed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import backends, env, numerics, testing
from fastattn.bench import train_step, tune_gpu
from fastattn.bench.contenders import COMPILE, OURS, TORCH, Contender
from fastattn.bench.gate import verdict
from fastattn.bench.gpu.timing import DeviceClock, WallClock, interleave
from fastattn.bench.measure import Call, Samples
from fastattn.bench.trial import BOTH, FORWARD, Results, Trial
from fastattn.cases import Case, Suite, Workload
from fastattn.dispatch import explain, use_backend
from fastattn.gpu import tuning
from fastattn.models.gpt import GPTConfig
from fastattn.ops.attention.cases import workload as attention_workload
from fastattn.ops.cross_entropy.cases import workload as cross_entropy_workload
from fastattn.ops.decode.cases import workload as decode_workload
from fastattn.ops.gelu.cases import workload as gelu_workload
from fastattn.ops.layer_norm.cases import workload as layer_norm_workload
from fastattn.ops.rms_norm.cases import workload as rms_norm_workload
from fastattn.ops.silu.cases import workload as silu_workload
from fastattn.ops.softmax.cases import workload as softmax_workload
from fastattn.ops.swiglu.cases import workload as swiglu_workload

BACKEND = "triton"
BACKWARD = "backward"
Row = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """Where and how large. seconds: spent on every contender of every time."""

    device: str
    tiny: bool
    seconds: float

    @classmethod
    def here(cls, tiny: bool) -> Setup:
        """The machine's GPU, or the CPU with interpreted kernels; RuntimeError with the backend's reason otherwise."""
        device = "cpu" if env.interpreting() else "cuda"
        reason = backends.BACKENDS[BACKEND].reason_against(device)
        if reason is not None:
            raise RuntimeError(f"{BACKEND}: {reason}")
        return cls(device, tiny, 0.0 if tiny else 0.06)

    @functools.cached_property
    def clock(self) -> DeviceClock | WallClock:
        return DeviceClock() if self.device == "cuda" else WallClock()

    def describe(self) -> dict[str, Any]:
        """The device and what drives it."""
        import triton

        found: dict[str, Any] = {"triton": triton.__version__, "interpreted": env.interpreting()}
        if self.device == "cuda":
            p = torch.cuda.get_device_properties(0)
            found |= {
                "name": p.name,
                "multiprocessors": p.multi_processor_count,
                "memory_bytes": p.total_memory,
                "cuda": torch.version.cuda,
                "hip": torch.version.hip,
                "cudnn": torch.backends.cudnn.version(),
            }
        return found


@dataclass(frozen=True)
class Job:
    name: str
    run: Callable[[], Row]


# ---- ceilings ----


def ceilings(setup: Setup) -> Iterator[Job]:
    """Copying, bytes read and written counted; and a large product on random data."""
    elements, size = (2**16, 64) if setup.tiny else (2**29, 8192)

    def copy() -> Row:
        source = torch.randn(elements, device=setup.device).to(torch.bfloat16)
        target = torch.empty_like(source)
        times = interleave({"copy": lambda: target.copy_(source)}, setup.clock, setup.seconds)["copy"]
        rate = 2 * source.numel() * source.element_size() / times.median
        return {"rate": rate, "unit": "B/s", "text": f"{rate / 1e12:.2f} TB/s", **times.summary()}

    def product() -> Row:
        a, b = (torch.randn(size, size, device=setup.device).to(torch.bfloat16) for _ in range(2))
        a @ b
        times = interleave({"product": lambda: a @ b}, setup.clock, setup.seconds)["product"]
        rate = 2 * size**3 / times.median
        return {"rate": rate, "unit": "FLOP/s", "text": f"{rate / 1e12:.0f} TFLOP/s", **times.summary()}

    yield Job("copy", copy)
    yield Job("bf16 product", product)


# ---- correctness ----


def correctness(setup: Setup) -> Iterator[Job]:
    """Every case of every op, forward and gradients, in poisoned memory, core cases first."""
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    for core in (True, False):
        for suite in testing.suites().values():
            chosen = [case for case in suite.cases if case.core == core]
            if setup.tiny:
                chosen = chosen[:1] if core else []
            for case in chosen:
                for dtype in dtypes[:1] if setup.tiny else dtypes:
                    name = f"{suite.name} / {case.name} / {str(dtype).removeprefix('torch.')}"
                    yield Job(name, functools.partial(_examine, setup, suite, case, dtype))


def _examine(setup: Setup, suite: Suite, case: Case, dtype: torch.dtype) -> Row:
    arguments = suite.arguments(case, setup.device, dtype)
    reason = explain(suite.function, **arguments, backend=BACKEND).reasons[BACKEND]
    if reason is not None:
        return {"skipped": reason, "text": f"skipped: {reason}"}
    function = functools.partial(suite.function, backend=BACKEND)
    with testing.poisoned_memory():
        report = testing.examine(function, suite, case, dtype=dtype, device=setup.device)
    pairs = [(m.ours, m.torchs) for m in report.measurements if m.dtype == dtype]
    return {
        "suite": suite.name,
        "dtype": str(dtype).removeprefix("torch."),
        "errors": {m.result: [m.ours.norm, m.torchs.norm] for m in report.measurements},
        "mean_ratio": numerics.geometric_mean(pairs, dtype) if pairs else None,
        "violations": list(report.violations),
        "text": "; ".join(report.violations) or "right",
    }


# ---- rows with times ----


def _race(setup: Setup, trial: Trial, contenders: list[Contender]) -> Row:
    """Errors, then forward and backward times of all that are right."""
    truth, part = trial.truth()
    direction = BOTH if trial.differentiated else FORWARD
    calls: dict[str, Callable[[], Results]] = {}
    results: dict[str, Results] = {}
    unavailable: dict[str, str] = {}
    for contender in contenders:
        try:
            call = trial.call(contender, direction)
            results[contender.name] = call()
            calls[contender.name] = call
        except RuntimeError as error:
            if contender.name in (OURS, TORCH):
                raise
            unavailable[contender.name] = str(error).strip().partition("\n")[0][:200]
    judged = verdict(results, truth, part, trial.dtype)
    del truth, part
    results.clear()
    row: Row = {
        "violations": list(judged.violations),
        "contenders": {n: {"unavailable": w} for n, w in unavailable.items()},
    }
    for name, errors in judged.errors.items():
        row["contenders"][name] = {"errors": {result: error.norm for result, error in errors.items()}}
    if judged.violations:
        return {**row, "text": "; ".join(judged.violations)}
    running = [c for c in contenders if c.name in calls]
    _take(row, FORWARD, interleave({c.name: trial.call(c, FORWARD) for c in running}, setup.clock, setup.seconds))
    if trial.differentiated:
        backward = {c.name: _backward(trial, c) for c in running}
        for call in backward.values():
            call()
        _take(row, BACKWARD, interleave(backward, setup.clock, setup.seconds))
    return row


def _backward(trial: Trial, contender: Contender) -> Call:
    """The gradients alone, of results that were computed before."""
    leaves = {name: trial.arguments[name].detach().requires_grad_() for name in trial.differentiated}
    outputs = contender.function(**contender.adapt({**trial.arguments, **leaves}))
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    gradients = list(trial.grad_outputs.values())
    return lambda: torch.autograd.grad(outputs, list(leaves.values()), gradients, retain_graph=True)


def _take(row: Row, direction: str, times: dict[str, Samples]) -> None:
    for name, taken in times.items():
        row["contenders"][name][direction] = taken.summary()


def _rates(row: Row, unit: str, work: dict[str, float]) -> Row:
    """Work done per second, for every contender and direction; and a line for people."""
    texts = []
    for direction, amount in work.items():
        rates = {}
        for name, entry in row["contenders"].items():
            if direction in entry:
                entry[direction]["rate"] = rates[name] = amount / entry[direction]["median_s"]
        if rates:
            texts.append(f"{direction} " + ", ".join(f"{n} {r / 1e12:.3g}" for n, r in rates.items()) + f" T{unit}")
    return {**row, "unit": unit, **({"text": "; ".join(texts)} if texts else {})}


def _ours(suite: Suite) -> Contender:
    return Contender(OURS, functools.partial(suite.function, backend=BACKEND))


# ---- attention ----


def attention(setup: Setup) -> Iterator[Job]:
    """batch x length = 16k, heads x dim = 2048: what publications show; the most telling first."""
    for shape, causal in _attention_shapes(setup):
        workload = attention_workload(*shape, causal=causal)
        yield Job(f"attention {workload.name}", functools.partial(_attention, setup, workload))


def _attention_shapes(setup: Setup) -> Iterator[tuple[tuple[int, int, int, int], bool]]:
    tokens, width = (64, 64) if setup.tiny else (16384, 2048)
    for dim in (32,) if setup.tiny else (128, 64, 256):
        for length in (64,) if setup.tiny else (4096, 16384, 1024, 2048, 8192):
            for causal in (True, False):
                yield (tokens // length, width // dim, length, dim), causal


def _attention(setup: Setup, workload: Workload) -> Row:
    suite = testing.suites()["attention"]
    trial = Trial(suite, workload, torch.bfloat16, setup.device, there=True)
    contenders = [_ours(suite), Contender(TORCH, F.scaled_dot_product_attention)]
    if setup.device == "cuda":
        from torch.nn.attention import SDPBackend, sdpa_kernel

        kinds = {
            TORCH: SDPBackend.FLASH_ATTENTION,
            "cudnn": SDPBackend.CUDNN_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION,
        }

        def forced(kind: SDPBackend) -> Callable[..., Any]:
            def attend(**arguments: Any) -> Any:
                with sdpa_kernel(kind):
                    return F.scaled_dot_product_attention(**arguments)

            return attend

        contenders = [_ours(suite), *(Contender(name, forced(kind)) for name, kind in kinds.items())]
    row = _race(setup, trial, contenders)
    return _rates(row, "FLOP/s", {FORWARD: workload.flops(), BACKWARD: workload.flops(backward=True)})


# ---- rows ----

ROW_WORKLOADS: dict[str, Callable[[int, int], Workload]] = {
    "layer_norm": layer_norm_workload,
    "softmax": softmax_workload,
    "rms_norm": rms_norm_workload,
    "cross_entropy": cross_entropy_workload,
    "gelu": gelu_workload,
    "silu": silu_workload,
    "swiglu": swiglu_workload,
}


def rows(setup: Setup) -> Iterator[Job]:
    """64M elements in rows of 1k to 256k, beside eager torch and torch.compile."""
    for size in _row_sizes(setup):
        for name, workload in ROW_WORKLOADS.items():
            job = functools.partial(_rows, setup, testing.suites()[name], workload(*size))
            yield Job(f"{name} {workload(*size).name}", job)


def _row_sizes(setup: Setup) -> Sequence[tuple[int, int]]:
    return ((4, 32),) if setup.tiny else ((16384, 4096), (65536, 1024), (8192, 8192), (2048, 32768), (256, 262144))


def _rows(setup: Setup, suite: Suite, workload: Workload) -> Row:
    trial = Trial(suite, workload, torch.bfloat16, setup.device, there=True)
    contenders = [_ours(suite), Contender(TORCH, suite.peer)]
    if not setup.tiny:
        torch._dynamo.reset()
        contenders.append(Contender(COMPILE, torch.compile(suite.peer, dynamic=False), compiles=True))
    row = _race(setup, trial, contenders)
    dtype = torch.bfloat16
    return _rates(row, "B/s", {FORWARD: workload.bytes(dtype), BACKWARD: workload.bytes(dtype, backward=True)})


# ---- decoding ----


def decode(setup: Setup) -> Iterator[Job]:
    """One query for every sequence; what counts is how fast the caches are read."""
    for shape in _decode_shapes(setup):
        workload = decode_workload(*shape)
        yield Job(f"decode {workload.name}", functools.partial(_decode, setup, workload))


def _decode_shapes(setup: Setup) -> Sequence[tuple[int, int, int, int, int]]:
    if setup.tiny:
        return ((1, 2, 2, 64, 16),)
    return (
        (16, 32, 8, 8192, 128), (1, 32, 8, 32768, 128), (64, 32, 8, 4096, 128), (16, 32, 32, 8192, 64),
        (1, 12, 12, 8192, 64),
    )  # fmt: skip


def _decode(setup: Setup, workload: Workload) -> Row:
    suite = testing.suites()["decode"]
    trial = Trial(suite, workload, torch.bfloat16, setup.device, there=True)
    row = _race(setup, trial, [_ours(suite), Contender(TORCH, suite.peer)])
    return _rates(row, "B/s", {FORWARD: workload.bytes(torch.bfloat16)})


# ---- a training step ----


def step(setup: Setup) -> Iterator[Job]:
    """GPT-2's 124M shape, bf16 autocast, against the same model on torch's kernels, as it is and compiled."""
    model = GPTConfig(64, 32, 1, 2, 32) if setup.tiny else GPTConfig(50304, 1024, 12, 12, 768)
    batch, length = (1, 16) if setup.tiny else (16, 1024)
    workload = train_step.Workload(f"gpt2-124m {batch}x{length}", model, batch, length)
    yield Job(f"train-step {workload.name}", functools.partial(_step, setup, workload))


def _step(setup: Setup, workload: train_step.Workload) -> Row:
    batches = train_step.random_batches(workload, setup.device)
    sides = {
        OURS: train_step.Side(workload, "bf16", OURS, batches, setup.device),
        TORCH: train_step.Side(workload, "bf16", TORCH, batches, setup.device),
    }
    if not setup.tiny:
        sides["fastattn + compile"] = train_step.Side(workload, "bf16", OURS, batches, setup.device, compiled=True)
        sides[COMPILE] = train_step.Side(workload, "bf16", TORCH, batches, setup.device, compiled=True)
    ours_backend = BACKEND if setup.device == "cpu" else None  # on a GPU the choice is the automatic one
    with use_backend(ours_backend):
        for side in sides.values():
            side.step()
        entries = {name: sides[name].entry for name in (OURS, TORCH)}
        violations = train_step.differences(entries, "bf16")
        row: Row = {"violations": list(violations), "contenders": {name: {} for name in sides}}
        if not violations:
            calls = {name: side.step for name, side in sides.items()}
            for name, times in interleave(calls, setup.clock, 10 * setup.seconds).items():
                row["contenders"][name]["step"] = {**times.summary(), "losses": sides[name].entry.losses[:2]}
    return _rates(row, "FLOP/s", {"step": workload.flops})


# ---- options of a kernel ----


def sweep(setup: Setup, what: str) -> Iterator[Job]:
    """what: OP or OP/KERNEL. The search of `fastattn tune`, with the time of everything that it tries."""
    op, _, kernel = what.partition("/")
    if op == "attention":
        chosen = [attention_workload(*shape, causal=causal) for shape, causal in _attention_shapes(setup)]
    elif op in ROW_WORKLOADS:
        chosen = [ROW_WORKLOADS[op](*size) for size in _row_sizes(setup)]
    elif op == "decode":
        chosen = [decode_workload(*shape) for shape in _decode_shapes(setup)]
    else:
        raise ValueError(f"--sweep {what}: there are attention, decode, {', '.join(ROW_WORKLOADS)}")
    suite = testing.suites()[op]
    for workload in chosen:
        for direction, trial in tune_gpu.trials(suite, workload, torch.bfloat16, setup.device):
            for look_up in trial.look_ups():
                if kernel in ("", look_up.kernel):
                    name = f"sweep {look_up.op}/{look_up.kernel}: {workload.name} {direction}"
                    yield Job(name, functools.partial(_sweep, setup, trial, look_up))


def _sweep(setup: Setup, trial: tune_gpu.Trial, look_up: tuning.LookUp) -> Row:
    timer = tune_gpu.timer_for(trial, look_up, setup.clock, setup.seconds)
    tried: list[Row] = []

    def noting(candidates: Sequence[tune_gpu.Options]) -> list[float]:
        times = timer(candidates)
        for options, seconds in zip(candidates, times, strict=True):
            tried.append({"options": dict(options), "seconds": seconds if math.isfinite(seconds) else None})
        return times

    found = tune_gpu.search(look_up.options, noting, rounds=1 if setup.tiny else tune_gpu.ROUNDS)
    return {
        "dim": look_up.tile_dim, "kind": look_up.kind, "size": look_up.size,
        "committed_s": found.began, "best_s": found.seconds, "best": dict(found.options), "tried": tried,
        "text": f"{1e6 * found.began:.1f} -> {1e6 * found.seconds:.1f} us with {dict(found.options)}",
    }  # fmt: skip


#: In order of importance.
SECTIONS: dict[str, Callable[[Setup], Iterator[Job]]] = {
    "ceilings": ceilings,
    "correctness": correctness,
    "attention": attention,
    "rows": rows,
    "decode": decode,
    "train-step": step,
}
