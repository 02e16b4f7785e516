"""From an op's public function to the backend that serves it.

An op (`Op`) is declared once in fastattn/ops/<op>/op.py: two functional schemas, forward and backward, with fakes and
one autograd formula. A backend adds an `Implementation`: `supports(problem)`, `forward`, `backward`. For every backend
the op then exists three times under torch.ops.fastattn, each as an overload named after the backend:

    <op>_forward.<backend>, <op>_backward.<backend>    the kernels; eager code calls these directly
    <op>.<backend>                                     the forward with the autograd formula attached: what compiled
                                                       and exported graphs hold

Choosing: the `backend=` argument, then `use_backend()`, then FASTATTN_BACKEND, then what was measured to be faster (ops
with a `preference_class`, see preference.py), then backends.PRIORITY. A forced
backend that cannot serve raises BackendUnsupported with every backend's reason; nothing falls back in silence.
"""

from __future__ import annotations

import contextlib
import functools
import math
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch.autograd import forward_ad

from fastattn import backends, env, preference
from fastattn.numerics import KERNEL_DTYPES


class BackendUnsupported(RuntimeError):
    """No backend, or not the forced one, can serve the call; the message lists every backend's reason."""


@dataclass(frozen=True)
class Problem:
    """All that a backend may look at to say yes or no. Ops add shapes and features; there are no tensors in it."""

    device: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Implementation:
    """One backend's side of an op.

    supports: None when it can serve the problem, else the reason, in words for people.
    forward, backward: with the op's schemas. differentiable: backward is made of differentiable torch ops, so that
    it can itself be differentiated. An op without gradients has no backward.
    """

    supports: Callable[[Any], str | None]
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None
    differentiable: bool = False


# Process-wide on purpose: a plain module-level dict is what torch.compile can guard on.
_forced: dict[str, str | None] = {"backend": None}
# A plain dict: a Counter takes three times as long to count, and every call counts.
_served = dict.fromkeys(backends.BACKENDS, 0)

# Looked up once: every call asks.
_transforms_active = torch._C._are_functorch_transforms_active
_grad_enabled = torch.is_grad_enabled
_left_over = torch._C._functorch.is_functorch_wrapped_tensor
_any_autocast = torch._C._is_any_autocast_enabled

LIBRARY = torch.library.Library("fastattn", "FRAGMENT")
OPS: dict[str, Op] = {}


def served() -> dict[str, int]:
    """Calls served so far by each backend, counted in eager code (a compiled graph's calls are not seen)."""
    return {name: calls for name, calls in _served.items() if calls}


def reset_served() -> None:
    """Sets every count of `served` to zero."""
    _served.update(dict.fromkeys(_served, 0))


def set_backend(name: str | None) -> None:
    """Forces a backend for every op of this process, None for the automatic choice; ValueError for unknown names."""
    _forced["backend"] = None if name is None else backends.check_name(name)


def forced_backend() -> str | None:
    """The backend that use_backend() or FASTATTN_BACKEND forces; None: the choice is automatic."""
    return _forced["backend"]


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block every op is served by this backend or raises BackendUnsupported. Process-wide."""
    before = _forced["backend"]
    set_backend(name)
    try:
        yield
    finally:
        _forced["backend"] = before


#: Bytes are counted in 63 bits, 8 to an element.
MAX_ELEMENTS = 2**60


def check_size(op: str, what: str, shape: Sequence[int]) -> None:
    """ValueError when a tensor of this shape would be more than memory can address. Compiled code is trusted: it only
    sees tensors that exist, and a product of symbolic sizes would be guarded on."""
    if not torch.compiler.is_compiling() and math.prod(shape) >= MAX_ELEMENTS:
        raise ValueError(f"{op}: {what} of shape {tuple(shape)} is more than memory can address")


def autocast_enabled(device: str) -> bool:
    """Whether torch.autocast is on for this device type; meta tensors know no autocast."""
    return device != "meta" and torch.is_autocast_enabled(device)


def key_of(tensor: torch.Tensor | None) -> Any:
    """What dispatch must know of a tensor."""
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)


def refused_dtype(dtype: torch.dtype) -> str | None:
    """Why no compiled kernel takes tensors of a dtype; None: they do."""
    return None if dtype in KERNEL_DTYPES else f"has no kernel for {dtype}: float32, bfloat16, float16"


def takes_dtype(problem: Problem) -> str | None:
    """Implementation.supports of kernels that take whatever is of one of their dtypes."""
    return refused_dtype(problem.dtype)


class Bound:
    """An op bound to one backend: its kernels and the ways in which autograd can reach them.

    Public functions call `public` where they are compiled and `run` in eager code.
    """

    def __init__(self, op: Op, backend: str, implementation: Implementation) -> None:
        self.op, self.backend, self.implementation = op, backend, implementation
        self.supports = implementation.supports
        again = implementation.backward
        # Transforms see through torch ops, by the rules that `define` gives them, and not through Python that launches.
        visible = implementation if implementation.differentiable else op.as_torch_ops(backend, implementation)
        seen = visible.backward
        traced = seen if seen is None or implementation.differentiable else op.differentiable_again(seen)
        self.public = op.define(backend, implementation, traced)
        self.forward = run = _direct(implementation.forward) or _entry(implementation.forward)
        self.backward = kernel = None if again is None else _direct(again) or _entry(again)
        self.visible = _direct(implementation.forward, f"{op.name}_visible")
        self.tensors = op.tensor_arguments(backend)
        setup_context, hidden = op.setup_context, op.hidden

        def forward(ctx: Any, *args: Any) -> Any:
            output = run(*args)
            setup_context(ctx, args, output)
            return output[:-hidden] if hidden else output

        def backward(ctx: Any, *grads: Any) -> Any:
            return op.backward(traced if torch.is_grad_enabled() else kernel, ctx, *grads)

        # Old ctx style: half the overhead of setup_context in eager code.
        function = _function(op.name, forward=forward, backward=backward)
        self.eager = function.apply
        # What Function.apply calls outside of transforms, when no argument is left over from one: a third less.
        self._apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]
        self._hidden = (None,) * hidden
        # The twin that torch.func's transforms (grad, vmap, ...) can see through.
        self.transformed = _function(
            op.name,
            forward=visible.forward,
            setup_context=op.setup_context,
            backward=functools.partial(op.backward, traced),
            generate_vmap_rule=True,
        ).apply

    def run(self, *args: Any) -> Any:
        """The op's forward on canonical arguments, in eager code; differentiable by whatever means the caller's context
        needs."""
        _served[self.backend] += 1
        if _transforms_active():
            return self.transformed(*args)
        if forward_ad._current_level >= 0:
            self._refuse_tangents(args)
        if _grad_enabled():
            given = len(args)  # arguments with defaults may be left away
            for i in self.tensors:
                if i < given and args[i] is not None and args[i].requires_grad:
                    return self._recorded(args)
        return self.forward(*args)

    def compute(self, *args: Any) -> Any:
        """The forward for callers that have autograd behind them: kernels of torch's own ops."""
        _served[self.backend] += 1
        return self.forward(*args)

    def run_visible(self, *args: Any) -> Any:
        """As `run`, but the visible results only: the others are not made where nobody wants gradients."""
        if self.visible is not None and not (_grad_enabled() or _transforms_active() or forward_ad._current_level >= 0):
            return self.compute_visible(*args)
        results, visible = self.run(*args), self.op.visible
        return results[0] if visible == 1 else results[:visible]

    def compute_visible(self, *args: Any) -> Any:
        """As `compute`, but the visible results only, of kernels that can make them alone."""
        _served[self.backend] += 1
        assert self.visible is not None
        return self.visible(*args)

    def _refuse_tangents(self, args: tuple[Any, ...]) -> None:
        """RuntimeError for tensors with a derivative in forward mode, which fused kernels would lose without a word."""
        if self.implementation.differentiable:
            return
        for i in self.tensors:
            if i < len(args) and args[i] is not None and forward_ad.unpack_dual(args[i]).tangent is not None:
                raise RuntimeError(
                    f"{self.op.name}: there is no derivative in forward mode but by backend='reference'; "
                    "torch.func.vjp and jacrev take any"
                )

    def _recorded(self, args: tuple[Any, ...]) -> Any:
        """The forward with a node of the graph; outputs that the op hides are None."""
        apply, given = self._apply, len(args)
        for i in self.tensors:
            if i < given and args[i] is not None and _left_over(args[i]):
                apply = self.eager
        return (*apply(*args), *self._hidden) if self._hidden else apply(*args)


def _function(name: str, *, generate_vmap_rule: bool = False, **methods: Callable[..., Any]) -> Any:
    """A torch.autograd.Function of these static methods, named after the op: graphs and profiles say
    AttentionBackward."""
    members: dict[str, Any] = {key: staticmethod(method) for key, method in methods.items()}
    title = "".join(part.capitalize() for part in name.split("_"))
    members["generate_vmap_rule"] = generate_vmap_rule
    function: Any = types.new_class(title, (torch.autograd.Function,), exec_body=lambda body: body.update(members))
    return function


def _save_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _refuse_gradient(name: str, instead: str) -> Callable[..., Any]:
    def backward(kernel: Any, ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{name} has no gradient; {instead}")

    return backward


class Op:
    """A fused operation, declared once.

    forward_schema, backward_schema: arguments and returns as in torch.library schemas, without the name.
    forward_fake, backward_fake: the same arguments to outputs of the right shape, strides and dtype.
    setup_context(ctx, inputs, output): saves for backward. backward(kernel, ctx, *grads): one gradient per input,
    computed by `kernel`, the chosen backend's backward. Its other arithmetic is differentiable torch ops: for a second
    derivative it is given a kernel that can be differentiated.
    forward_flops, backward_flops: what torch.utils.flop_counter counts for a call, a function of the schema's arguments
    with every tensor replaced by its shape. Ops that multiply matrices have both; others count nothing, as in torch.
    hidden: how many outputs, the last ones, are for backward only; eager code that records a graph gets None for them.
    visible: how many outputs, the first ones, a call asks for unless it says otherwise (some can return an lse, too).
    preference_class: the class of a problem, for fastattn/preference.py, of an op whose kernels are not the fastest
    everywhere; without it the order of backends.PRIORITY decides.
    An op without a backward_schema has no gradient; asking for one is an error that says what to use `instead`.
    """

    def __init__(
        self,
        name: str,
        *,
        forward_schema: str,
        backward_schema: str | None = None,
        forward_fake: Callable[..., Any],
        backward_fake: Callable[..., Any] | None = None,
        setup_context: Callable[[Any, Any, Any], None] | None = None,
        backward: Callable[..., Any] | None = None,
        instead: str = "",
        forward_flops: Callable[..., int] | None = None,
        backward_flops: Callable[..., int] | None = None,
        hidden: int = 0,
        visible: int = 1,
        preference_class: Callable[[Any], str] | None = None,
    ) -> None:
        self.name = name
        self.forward_schema, self.backward_schema = forward_schema, backward_schema
        self.forward_fake, self.backward_fake = forward_fake, backward_fake
        self.setup_context = setup_context or _save_nothing
        self.backward = backward or _refuse_gradient(name, instead)
        self.forward_flops, self.backward_flops = forward_flops, backward_flops
        self.hidden, self.visible = hidden, visible
        self.preference_class = preference_class
        #: The torch ops of every backend are called the op's name and one of these.
        self.suffixes = ("", "_forward") if backward_schema is None else ("", "_forward", "_backward")
        self.bound: dict[str, Bound] = {}
        self._chosen: dict[Any, Bound] = {}
        self._native: Bound | None = None
        OPS[name] = self

    def as_torch_ops(self, backend: str, implementation: Implementation) -> Implementation:
        """The same kernels, called as the torch ops that they are registered as."""
        backward = None if implementation.backward is None else NativeKernel(f"{self.name}_backward", backend)
        return replace(implementation, forward=NativeKernel(f"{self.name}_forward", backend), backward=backward)

    def define(
        self, backend: str, implementation: Implementation, traced: Callable[..., Any] | None
    ) -> Callable[..., Any]:
        """Registers the three torch ops of a backend; returns the public one.

        traced: the backward as autograd may see it where its result may be differentiated again.
        """
        kernels: dict[str, tuple[str, Any, Any]] = {
            f"{self.name}_forward": (self.forward_schema, self.forward_fake, implementation.forward),
            self.name: (self.forward_schema, self.forward_fake, implementation.forward),
        }
        if self.backward_schema is not None:
            kernels[f"{self.name}_backward"] = (self.backward_schema, self.backward_fake, implementation.backward)
        for name, (schema, fake, kernel) in kernels.items():
            qualified = f"{name}.{backend}"
            LIBRARY.define(f"{qualified}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
            if not isinstance(kernel, NativeKernel):
                LIBRARY.impl(qualified, _opaque(kernel), "CompositeExplicitAutograd")
            torch.library.register_fake(f"fastattn::{qualified}", fake, lib=LIBRARY)
            overload = getattr(getattr(torch.ops.fastattn, name), backend)
            torch.library.register_vmap(
                f"fastattn::{qualified}", functools.partial(_vmap_by_loop, overload), lib=LIBRARY
            )
        kernel = None
        if self.backward_schema is not None:
            kernel = getattr(getattr(torch.ops.fastattn, f"{self.name}_backward"), backend)

        def backward(ctx: Any, *grads: Any) -> Any:
            return self.backward(traced if torch.is_grad_enabled() else kernel, ctx, *grads)

        torch.library.register_autograd(
            f"fastattn::{self.name}.{backend}", backward, setup_context=self.setup_context, lib=LIBRARY
        )
        if self.forward_flops is not None:
            self._register_flops()
        return getattr(getattr(torch.ops.fastattn, self.name), backend)

    def _register_flops(self) -> None:
        """With torch's counter, which goes by the name of an op without its overload: one formula for all backends."""
        try:
            from torch.utils.flop_counter import flop_registry, register_flop_formula
        except Exception as error:  # it imports Triton, and a broken one raises whatever it likes
            warnings.warn(f"torch's flop counter cannot be imported: {error}", RuntimeWarning, stacklevel=2)
            return

        # An op's hash changes with every overload that it is given: entries made before are put in their place again.
        entries = list(flop_registry.items())
        flop_registry.clear()
        flop_registry.update(entries)
        formulas = {"": self.forward_flops, "_forward": self.forward_flops, "_backward": self.backward_flops}
        for suffix, formula in formulas.items():
            if formula is None:
                continue
            packet = getattr(torch.ops.fastattn, f"{self.name}{suffix}")
            if packet not in flop_registry:
                register_flop_formula(packet)(_without_result(formula))

    def differentiable_again(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        """A fused backward as autograd may see it: when its results are differentiated, the reference's backward, made
        of differentiable torch ops, runs on the same arguments.

        Saved tensors are arguments like the incoming gradients are, so that nothing is taken for a constant.
        """

        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.tensors = [i for i, value in enumerate(inputs) if isinstance(value, torch.Tensor)]
            ctx.rest = [None if isinstance(value, torch.Tensor) else value for value in inputs]
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*(inputs[i] for i in ctx.tensors))

        def backward(ctx: Any, *grads: Any) -> Any:
            reference = self.bound["reference"].backward
            args = list(ctx.rest)
            for i, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
                args[i] = tensor
            wanted = [i for i in ctx.tensors if ctx.needs_input_grad[i]]
            given = [i for i, grad in enumerate(grads) if grad is not None]

            def first_derivative(*leaves: Any) -> Any:
                for i, leaf in zip(wanted, leaves, strict=True):
                    args[i] = leaf
                assert reference is not None
                results = reference(*args)
                results = (results,) if isinstance(results, torch.Tensor) else results
                return tuple(results[i] for i in given)

            found: list[Any] = [None] * len(args)
            if wanted and given:
                # torch.func's: right inside its transforms as well, and itself differentiable.
                pull_back = torch.func.vjp(first_derivative, *(args[i] for i in wanted))[1]
                for i, gradient in zip(wanted, pull_back(tuple(grads[i] for i in given)), strict=True):
                    found[i] = gradient
            return tuple(found)

        return _function(
            f"{self.name}_second",
            forward=kernel,
            setup_context=setup_context,
            backward=backward,
            generate_vmap_rule=True,
        ).apply

    def tensor_arguments(self, backend: str) -> list[int]:
        """Places of the forward's arguments that are tensors or None."""
        schema = getattr(getattr(torch.ops.fastattn, self.name), backend)._schema
        return [i for i, argument in enumerate(schema.arguments) if "Tensor" in str(argument.type)]

    def implement(self, backend: str, implementation: Implementation) -> None:
        """Adds a backend."""
        if not isinstance(implementation.forward, NativeKernel):
            forward, backward = _without_autocast(implementation.forward), implementation.backward
            backward = None if backward is None else _without_autocast(backward)
            implementation = replace(implementation, forward=forward, backward=backward)
        self.bound[backends.check_name(backend)] = Bound(self, backend, implementation)

    def reasons(self, problem: Problem) -> dict[str, str | None]:
        """For every backend: None when it can serve the problem, else why not."""
        answer: dict[str, str | None] = {}
        for name, backend in backends.BACKENDS.items():
            reason = backend.reason_against(problem.device)
            if reason is None and name not in self.bound:
                reason = f"does not implement {self.name}"
            answer[name] = self.bound[name].supports(problem) if reason is None else reason
        return answer

    def refusals(self, problem: Problem) -> str:
        """Of every backend that cannot serve the problem its name and why, in one line."""
        return "; ".join(f"{name}: {reason}" for name, reason in self.reasons(problem).items() if reason is not None)

    def resolve(self, problem: Problem, backend: str | None = None) -> Bound:
        """The backend that serves this problem; BackendUnsupported when there is none, or not the forced one."""
        forced = backend if backend is not None else _forced["backend"]
        if forced is not None:
            candidates: Sequence[str] = (backends.check_name(forced),)
        else:
            candidates = backends.PRIORITY.get(problem.device, backends.DEFAULT_PRIORITY)
            wish = self.preference(problem)
            if wish is not None:
                candidates = (wish.backend, *candidates)
        for name in candidates:
            bound = self.bound.get(name)
            if bound is None or backends.BACKENDS[name].reason_against(problem.device) is not None:
                continue
            if bound.supports(problem) is None:
                return bound
        raise BackendUnsupported(self._complaint(problem, forced))

    def preference(self, problem: Problem) -> preference.Preference | None:
        """What is faster here, as measured before; None for ops that have no preferences, and off CPUs and GPUs."""
        if self.preference_class is None:
            return None
        if problem.device == "cuda":
            return preference.preferred_on_gpus()
        if problem.device != "cpu" or backends.probe("cpu") is not None:
            return None
        return preference.preferred(self.name, self.preference_class(problem))

    def resolve_cached(self, key: Any, problem: Callable[[], Problem], backend: str | None) -> Bound:
        """`resolve` for eager code: `key` stands for everything that `problem()` would hold."""
        key = (key, backend, _forced["backend"])
        bound = self._chosen.get(key)
        if bound is None:
            if len(self._chosen) >= 4096:
                self._chosen.clear()
            bound = self._chosen[key] = self.resolve(problem(), backend)
        return bound

    def attempt(self, *args: Any, visible: bool = False) -> Any:
        """The native kernel's result for CPU tensors as they are, without a detour; None when it is not the automatic
        choice or refuses them. visible: of the visible results only.

        For eager calls of the commonest form. Native kernels check all that they depend on before they touch memory,
        and the op has checked what only it knows. What is refused here is then validated, and served or told why not.
        """
        if (
            _forced["backend"] is not None or args[0].dtype not in KERNEL_DTYPES  # a refusal takes ten times as long
            or (self._native is None and not self._has_native())
        ):  # fmt: skip
            return None
        native: Any = self._native
        run = native.run_visible if visible else native.run
        try:
            return run(*args)
        except RuntimeError:
            _served["cpu"] -= 1
            return None

    def _has_native(self) -> bool:
        """Whether the native kernels are the automatic choice for CPU tensors; then they are in _native."""
        if backends.PRIORITY["cpu"][0] != "cpu" or backends.probe("cpu") is not None:
            return False
        self._native = self.bound["cpu"]
        return True

    def _complaint(self, problem: Problem, forced: str | None) -> str:
        what = f"backend {forced!r} was asked for and cannot serve" if forced else "no backend can serve"
        lines = [f"{self.name}: {what} this call", f"  {describe(problem)}"]
        lines += [f"  {name}: {reason or 'could serve it'}" for name, reason in self.reasons(problem).items()]
        return "\n".join(lines)


@contextlib.contextmanager
def observed(around: Callable[[Bound, Any], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """Within the block every call in eager code is served inside of `around(bound, problem)`. Process-wide.

    problem: what the op asked its backends about; None for calls that went straight to the native kernel.
    """
    problems: dict[str, Any] = {}
    run, compute, visible, resolve = Bound.run, Bound.compute, Bound.compute_visible, Op.resolve_cached

    def hearing(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Bound, *args: Any) -> Any:
            with around(self, problems.pop(self.op.name, None)):
                return plain(self, *args)

        return call

    def resolved(self: Op, key: Any, problem: Callable[[], Any], backend: str | None) -> Bound:
        problems[self.name] = given = problem()
        return self.resolve(given, backend)

    Bound.run, Bound.compute = hearing(run), hearing(compute)  # type: ignore[method-assign]
    Bound.compute_visible, Op.resolve_cached = hearing(visible), resolved  # type: ignore[method-assign]
    try:
        yield
    finally:
        Bound.run, Bound.compute = run, compute  # type: ignore[method-assign]
        Bound.compute_visible, Op.resolve_cached = visible, resolve  # type: ignore[method-assign]


class NativeKernel:
    """A kernel that is registered under the schema's own name, by fastattn._C for one; calls go straight to that torch
    op."""

    def __init__(self, name: str, backend: str) -> None:
        self.name, self.backend = name, backend
        self._overload: Any = None

    @property
    def overload(self) -> Any:
        if self._overload is None:
            self._overload = getattr(getattr(torch.ops.fastattn, self.name), self.backend)
        return self._overload

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args)


def _entry(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel without frames of Python around it: what torch's overload calls in the end."""
    return getattr(kernel.overload, "_op", kernel) if isinstance(kernel, NativeKernel) else kernel


def _direct(kernel: Callable[..., Any], name: str = "") -> Callable[..., Any] | None:
    """A native kernel, or the variant of it that has this name, as a function that passes torch's dispatcher by where
    that has nothing to add (csrc/bindings/direct.h); None for others."""
    if not isinstance(kernel, NativeKernel) or not backends.has_native_module():
        return None
    defaults = (a.default_value for a in kernel.overload._schema.arguments if a.has_default_value())
    direct: Callable[..., Any] | None
    direct = backends.native_module().direct(name or kernel.name, _entry(kernel), *defaults)
    return direct


def native(op: Op, supports: Callable[[Any], str | None] = takes_dtype) -> Implementation:
    """The cpu backend's side of an op: its kernels are in fastattn._C."""
    return Implementation(
        supports, NativeKernel(f"{op.name}_forward", "cpu"), NativeKernel(f"{op.name}_backward", "cpu")
    )


def _without_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The op's public function has cast what autocast casts; torch ops inside of a kernel must not cast again."""

    @functools.wraps(kernel)
    def run(*args: Any) -> Any:
        if not _any_autocast():
            return kernel(*args)
        device = args[0].device.type
        if not autocast_enabled(device):
            return kernel(*args)
        with torch.autocast(device, enabled=False):
            return kernel(*args)

    return run


def _without_result(formula: Callable[..., int]) -> Callable[..., int]:
    """As torch's counter calls formulas: it passes the shapes of the results, too."""

    def count(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return formula(*args, **kwargs)

    return count


def _opaque(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Inside a torch op autograd is already dealt with; outputs may not alias inputs."""

    def run(*args: Any) -> Any:
        with torch.no_grad():
            return kernel(*args)

    return run


def _vmap_by_loop(overload: Any, info: Any, in_dims: Any, *args: Any) -> Any:
    """Batching rule of every kernel: one call per element of the mapped dimension, results stacked in front."""
    results = [
        overload(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(column) for column in zip(*results, strict=True)), (0,) * len(results[0])


def describe(problem: Problem) -> str:
    """One line with every field of a problem."""
    return ", ".join(f"{f.name}={getattr(problem, f.name)}" for f in fields(problem))


@dataclass(frozen=True)
class Explanation:
    """What dispatch would do with a call: the problem, the backend chosen (None: it would raise), every reason.

    preference: what decided between backends that can serve it, where the op has preferences and none was forced.
    notes: what integrations have to say: which of torch's functions come here, and which calls were left to torch.
    """

    op: str
    problem: Problem
    backend: str | None
    reasons: dict[str, str | None]
    preference: preference.Preference | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend or 'no backend can serve this call'}", f"  {describe(self.problem)}"]
        for name, reason in self.reasons.items():
            verdict = "serves it" if name == self.backend else (reason or "could serve it")
            lines.append(f"  {name}: {verdict}")
        if self.preference is not None:
            lines.append(f"  {self.preference}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


#: Called with an op's name; integrations add theirs.
NOTES: list[Callable[[str], Sequence[str]]] = []


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would serve `function(*args, **kwargs)`, and why not the others; nothing is computed.

    function: a public op such as fastattn.scaled_dot_product_attention. The arguments are those of the call; they
    are validated as the call would.
    """
    prepare = getattr(function, "prepare", None)
    if prepare is None:
        raise TypeError(f"explain() takes a fastattn op, not {function!r}")
    op, problem = prepare(*args, **kwargs)
    forced = kwargs.get("backend") is not None or _forced["backend"] is not None
    try:
        chosen: str | None = op.resolve(problem, kwargs.get("backend")).backend
    except BackendUnsupported:
        chosen = None
    notes = tuple(line for note in NOTES for line in note(op.name))
    wish = None if forced else op.preference(problem)
    return Explanation(op.name, problem, chosen, op.reasons(problem), wish, notes)


set_backend(env.forced_backend())
