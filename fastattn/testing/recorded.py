"""Launches of kernels for GPUs, recorded instead of run: what Triton would compile for a device that is not here.

    with recording("sm_90") as launches:
        fastattn.swiglu(gate, up, backend="triton")          # CPU tensors; their results are uninitialised memory

Within the block the triton backend serves CPU tensors as if they were on that device, and Triton's own code binds the
arguments and infers what kernels are specialised for; only the compiler and the launcher are replaced.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastattn import backends, dispatch, env
from fastattn.gpu import devices

DIVISIBLE = "tt.divisibility"


@dataclass(frozen=True)
class Launch:
    """What decides how a kernel is compiled; equal ones are compiled once.

    kernel: module:name. signature: (parameter, type) in order, the type "constexpr" where the value is compiled in.
    constants: (path, value); attributes: (path, what Triton knows of the value). options: (name, value), warps, stages
    and what is not Triton's default. Not compared are problem: in words, the first one that needed it; and features:
    the constants that the kernel declares, and arguments that are None; not integers that happen to be 1.
    """

    kernel: str
    target: str
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    attributes: tuple[tuple[tuple[int, ...], tuple[tuple[str, int], ...]], ...]
    options: tuple[tuple[str, Any], ...]
    problem: str = field(default="", compare=False)
    features: tuple[tuple[tuple[int, ...], Any], ...] = field(default=(), compare=False)

    @property
    def name(self) -> str:
        """attention/forward: the op's room, or the module of fastattn.gpu, and the kernel's name."""
        module, name = self.kernel.split(":")
        *_, room, leaf = module.split(".")
        return f"{leaf if room == 'gpu' else room}/{name}"

    @property
    def types(self) -> tuple[Any, ...]:
        """The kernel and the kinds of floating numbers that it reads and writes."""
        kinds = frozenset(kind for _, kind in self.signature if str(kind).startswith(("*bf", "*fp")))
        return self.kernel, self.target, kinds

    def uses(self, options: Mapping[str, Any]) -> bool:
        """Whether these are its tile sizes, warps and stages."""
        values = {self._name(path): value for path, value in self.constants} | dict(self.options)
        return all(values.get(name) == value for name, value in options.items())

    def asks(self, sizes: Collection[str]) -> set[Any]:
        """Every feature that it is compiled with or without; tile sizes are none."""
        features = {(path, value) for path, value in self.features if self._name(path) not in sizes}
        present = {(path, "given") for path in self._optional() - {path for path, _ in features}}
        return {(self.kernel, self.target, *feature) for feature in features | present}

    def _optional(self) -> set[tuple[int, ...]]:
        return {(place,) for place, (_, kind) in enumerate(self.signature) if str(kind).startswith("*")}

    def _name(self, path: tuple[int, ...]) -> str:
        return self.signature[path[0]][0]

    @property
    def variant(self) -> str:
        """What tells the launch from others of its kernel, in a line; integers are i32 and divisible by 16 unless it
        says otherwise."""
        known = {path: dict(facts) for path, facts in self.attributes}
        constants = dict(self.constants)
        pointers, wide, odd, large, given = [], [], [], [], []
        for place, (name, kind) in enumerate(self.signature):
            path = (place,)
            if kind == "constexpr":
                given.append(f"{name}={constants.get(path)}")
                continue
            facts, pointer = known.get(path, {}), str(kind).startswith("*")
            if pointer:
                pointers.append(str(kind)[1:])
                if self.target.startswith("gfx") and "tt.pointer_range" not in facts:
                    large.append(name)
            elif kind != "i32":
                wide.append(f"{name}:{kind}")
            if DIVISIBLE not in facts and (pointer or str(kind).startswith("i")):
                odd.append(name)
        parts = [" ".join(pointers), " ".join(given), " ".join(f"{name}={value}" for name, value in self.options)]
        if wide:
            parts.append(" ".join(wide))
        if odd:
            parts.append("not by 16: " + " ".join(odd))
        if large:
            parts.append("2 GiB and more: " + " ".join(large))
        return " | ".join(parts)

    @property
    def aligned(self) -> bool:
        """Whether every pointer is known to be divisible by 16."""
        divisible = {path for path, facts in self.attributes if DIVISIBLE in dict(facts)}
        return all((i,) in divisible for i, (_, kind) in enumerate(self.signature) if str(kind).startswith("*"))

    def compile(self) -> Any:
        """Triton's compiled kernel, from its cache where it has been there before."""
        triton = importlib.import_module("triton")
        module, name = self.kernel.split(":")
        function = getattr(importlib.import_module(module), name)
        source = triton.compiler.ASTSource(
            function,
            dict(self.signature),
            {path: _decoded(value) for path, value in self.constants},
            {path: [list(fact) for fact in facts] for path, facts in self.attributes},
        )
        return triton.compile(source, target=gpu_target(self.target), options=dict(self.options))


def gpu_target(name: str) -> Any:
    """Triton's name for a target."""
    target = importlib.import_module("triton.backends.compiler").GPUTarget
    if name.startswith("sm_"):
        return target("cuda", int(name.removeprefix("sm_")), 32)
    return target("hip", name, devices.KNOWN[name].warp)


def _encoded(value: Any) -> Any:
    """A constant as plain data: another process can read it, and it can be compared."""
    kind = type(value).__name__
    if kind == "dtype":
        return f"dtype:{value}"
    if kind == "JITFunction":
        return f"function:{value.module}:{value.fn.__qualname__}"
    return _encoded(value.value) if kind == "constexpr" else value


def _decoded(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    kind, _, rest = value.partition(":")
    if kind == "dtype":
        return importlib.import_module("triton.language").dtype(rest)
    if kind == "function":
        module, _, name = rest.partition(":")
        return getattr(importlib.import_module(module), name)
    return value


_numbers = itertools.count()


class _Driver:
    """Stands for Triton's driver of a device that is not here. Every one is a device of its own, so that kernels that
    were recorded for another are not taken for compiled."""

    def __init__(self, target: str) -> None:
        self._target = gpu_target(target)
        self._device = f"{target} recorded as number {next(_numbers)}"

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> str:
        return self._device

    def get_current_stream(self, device: Any) -> int:
        return 0


class _Nothing:
    """Stands for a compiled kernel; counts its launches."""

    function = packed_metadata = None

    def __init__(self, launches: Launches) -> None:
        self._launches = launches

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *_: Any) -> None:
        self._launches.count += 1


class Launches:
    """What has been recorded, in order, each once; `count` is how many launches there were.

    problem: what the launches that follow are said to be for.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.found: dict[Launch, None] = {}
        self.count = 0
        self.problem = ""

    def __iter__(self) -> Iterator[Launch]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def record(
        self, kernel: Any, signature: Any, constants: Any, options: Any, attributes: Any, usual: Any
    ) -> _Nothing:
        """A kernel that Triton would compile now."""
        always = ("num_warps", "num_stages")
        named = {k: v for k, v in options.__dict__.items() if k in always or usual.__dict__.get(k) != v}
        values = {path: _encoded(value) for path, value in constants.items()}
        declared = {param.num for param in kernel.params if param.is_constexpr}
        features = tuple((path, value) for path, value in values.items() if path[0] in declared or value is None)
        launch = Launch(
            f"{kernel.module}:{kernel.fn.__qualname__}",
            self.target,
            tuple(signature.items()),
            tuple(values.items()),
            tuple((path, tuple(map(tuple, facts))) for path, facts in attributes.items() if facts),
            tuple(sorted(named.items())),
            self.problem,
            features,
        )
        self.found.setdefault(launch)
        return _Nothing(self)


@contextlib.contextmanager
def serving_cpu_tensors() -> Iterator[None]:
    """Within the block the triton backend can be asked for CPU tensors; what was chosen in it is forgotten."""
    if env.interpreting():
        raise RuntimeError("kernels are not compiled under TRITON_INTERPRET=1")
    reason = devices.triton_reason()
    if reason is not None:
        raise RuntimeError(reason)
    known, reasons = backends.BACKENDS["triton"], dict(backends._reasons)
    backends.BACKENDS["triton"] = backends.Backend("triton", ("cuda", "cpu"), devices.triton_reason)
    backends._reasons.pop("triton", None)
    try:
        yield
    finally:
        backends.BACKENDS["triton"] = known
        backends._reasons.clear()
        backends._reasons.update(reasons)
        for op in dispatch.OPS.values():
            op._chosen.clear()


@contextlib.contextmanager
def recording(target: str) -> Iterator[Launches]:
    """Within the block every device is `target` and launches are recorded."""
    launches = Launches(target)
    with devices.assume(target), serving_cpu_tensors():
        jit = importlib.import_module("triton.runtime.jit")
        config = importlib.import_module("triton.runtime.driver").driver
        active, compiler = config._active, jit.JITFunction._do_compile

        def record(
            self: Any, key: Any, signature: Any, device: Any, constexprs: Any, options: Any, attrs: Any, warmup: Any
        ) -> _Nothing:
            caches = self.device_caches[device]
            backend = next(part for part in caches if hasattr(part, "parse_options"))
            nothing = launches.record(self, signature, constexprs, options, attrs, backend.parse_options({}))
            caches[0][key] = nothing
            return nothing

        config.set_active(_Driver(target))
        jit.JITFunction._do_compile = record
        try:
            yield launches
        finally:
            jit.JITFunction._do_compile = compiler
            config._active = active
