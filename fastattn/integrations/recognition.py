"""Modules that are none of torch's and compute what our kernels compute: norms, activations, Conv1D, SwiGLU layers;
and Transformers' models, which compute a loss.

A class is never taken for what its name says. The name only says what to try: the module's own forward runs on a small
random input, with small random parameters in a copy of it, and what comes out must keep the accuracy law beside the
formula: in float64 it is the truth, in float32 it is torch's result. So a library need not be imported to be
recognised, and a class that computes something else is left alone.

What was found is a Form: the mixin that serves it, and the options that the mixin needs to know.
"""

from __future__ import annotations

import copy
import functools
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import ops
from fastattn.nn.served import Served, hooked, refusal
from fastattn.numerics import error, violation
from fastattn.ops.linear.op import prefers_torch

ROWS, WIDTH = 3, 8
#: Modules without a number of their own for it have it in their forward.
USUAL_EPS = (1e-5, 1e-6, 1e-12)
#: The class of Transformers' models: its module and name.
MODEL = ("transformers.modeling_utils", "PreTrainedModel")
#: Of the rows that norms are tried on: about the root of every usual eps, and far above it.
SCALES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e4)


@dataclass(frozen=True)
class Form:
    """mixin: what serves a module; options: (name, value) attributes of the class that is put in front of its own."""

    mixin: type
    options: tuple[tuple[str, Any], ...] = ()


class Parts(NamedTuple):
    """What patch makes a class of, which has them as _fastattn_parts."""

    original: type
    form: Form
    strict: bool


def parts_of(cls: type) -> Parts | None:
    """None for classes that patch did not make, subclasses of such among them."""
    return cls.__dict__.get("_fastattn_parts")


class Unrecognised(Exception):
    """The module computes something else; the message says what was tried."""


# ---- what serves them ----


class _NormForward(Served):
    """fastattn_norm: what computes it; _affine: its parameters' names, None for one that is not there; _eps: an
    attribute's name, or the number; _offset: what is added to the weight; _result: whose dtype the result has."""

    fastattn_norm: Callable[..., Tensor]
    fastattn_affine: tuple[str | None, ...]
    fastattn_eps: str | float
    fastattn_offset: float
    fastattn_result: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        affine = [None if name is None else getattr(self, name) for name in self.fastattn_affine]
        reason: str | None = "called with more than one tensor"
        if len(args) == 1 and not kwargs:
            reason = refusal(args[0], *affine)
        if reason is not None:
            self._left_to_torch(reason)
            return super().forward(*args, **kwargs)
        (x,), weight = args, affine[0]
        eps = getattr(self, self.fastattn_eps) if isinstance(self.fastattn_eps, str) else self.fastattn_eps
        dtype = x.dtype
        if weight is not None and weight.dtype != dtype and self.fastattn_result != "input":
            promoted = torch.promote_types(dtype, weight.dtype)
            dtype = promoted if self.fastattn_result == "promoted" else weight.dtype
            x = x.to(promoted)
        normed = self.fastattn_norm(x, x.shape[-1:], *affine, eps, weight_offset=self.fastattn_offset)
        return normed.to(dtype)


class RecognisedRMSNorm(_NormForward):
    """An RMSNorm over the last dimension on fastattn.rms_norm."""

    fastattn_norm = staticmethod(ops.rms_norm)


class RecognisedLayerNorm(_NormForward):
    """A LayerNorm over the last dimension on fastattn.layer_norm."""

    fastattn_norm = staticmethod(ops.layer_norm)


class _ActivationForward(Served):
    """fastattn_activation: what computes it; _form: its arguments beside the input."""

    fastattn_activation: Callable[..., Tensor]
    fastattn_form: tuple[str, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        reason = refusal(args[0]) if len(args) == 1 and not kwargs else "called with more than one tensor"
        if reason is not None:
            self._left_to_torch(reason)
            return super().forward(*args, **kwargs)
        return self.fastattn_activation(args[0], *self.fastattn_form)


class RecognisedGELU(_ActivationForward):
    """A GELU on fastattn.gelu, in one of its forms."""

    fastattn_activation = staticmethod(ops.gelu)


class RecognisedSiLU(_ActivationForward):
    """A SiLU on fastattn.silu."""

    fastattn_activation = staticmethod(ops.silu)


class RecognisedConv1D(Served):
    """x @ weight + bias, Transformers' Conv1D, on fastattn.linear."""

    weight: Any
    bias: Any

    def forward(self, x: Tensor) -> Any:
        weight, bias = self.weight.t(), self.bias
        reason = refusal(x, self.weight, bias)
        if reason is not None:
            self._left_to_torch(reason)
        elif not prefers_torch(x, weight):
            return ops.linear(x, weight, bias)
        return super().forward(x)


def _original(module: Any) -> type:
    """The class that a module has, or had before patch gave it one of ours."""
    parts = parts_of(type(module))
    return type(module) if parts is None else parts.original


class RecognisedSwiGLU(Served):
    """down(silu(gate(x)) * up(x)) with fastattn.swiglu between the products. fastattn_gate: names of the parts for gate
    and up, or of one that computes both; _down, _act: of the others; _silu: the class of act."""

    fastattn_gate: tuple[str, ...]
    fastattn_down: str
    fastattn_act: str
    fastattn_silu: type

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        act, projections = self._modules[self.fastattn_act], [self._modules[name] for name in self.fastattn_gate]
        reason: str | None = None
        if len(args) != 1 or kwargs:
            reason = "called with more than one tensor"
        elif _original(act) is not self.fastattn_silu or hooked(act) or None in projections:
            reason = "its activation has hooks or was replaced"
        if reason is not None:
            self._note(reason)
            return super().forward(*args, **kwargs)
        products = [projection(args[0]) for projection in projections]  # type: ignore[misc]
        gate, up = products if len(products) == 2 else products[0].chunk(2, -1)
        reason = refusal(gate, up)
        if reason is not None:
            self._left_to_torch(reason)
            return self._modules[self.fastattn_down](act(gate) * up)  # type: ignore[misc]
        return self._modules[self.fastattn_down](ops.swiglu(gate, up))  # type: ignore[misc]


# ---- how they are recognised ----


def recognise(module: nn.Module) -> Form | None:
    """The form of a module that is none of torch's classes; None for what nobody would take for one of them.

    Unrecognised: it is called like one of them, and computes something else.
    """
    if any((base.__module__, base.__name__) == MODEL for base in type(module).__mro__):
        return _loss_form(module)
    name = type(module).__name__
    for pattern, probe in PROBES:
        if re.search(pattern, name, re.IGNORECASE):
            return probe(module)
    return None


def _shadow(module: nn.Module, parameters: dict[str, Tensor], **attributes: Any) -> nn.Module:
    """A copy of the module with other parameters: the module itself is not run, hooks are not called."""
    shadow = copy.copy(module)
    shadow.__dict__["_parameters"] = {name: parameters.get(name) for name in module._parameters}
    shadow.__dict__.update(attributes)
    return shadow


def _computed(module: nn.Module, parameters: dict[str, Tensor], x: Tensor, **attributes: Any) -> Tensor:
    """What the module's forward makes of x; Unrecognised where that is no tensor of its own making."""
    shadow, given = _shadow(module, parameters, **attributes), x.clone()
    before = dict(shadow.__dict__)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of dtypes that differ: nobody asked for them
            result = type(module).forward(shadow, given)
    except Exception as error:  # whatever a foreign forward does not like
        raise Unrecognised(f"its forward does not take a tensor: {type(error).__name__}: {error}") from error
    if not isinstance(result, Tensor):
        raise Unrecognised(f"its forward returns a {type(result).__name__}")
    same = before.keys() == shadow.__dict__.keys() and all(v is shadow.__dict__[k] for k, v in before.items())
    if not same or not torch.equal(given, x):
        raise Unrecognised("its forward changes the module or its input")
    return result


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")


def _agree(result: Tensor, formula: Callable[..., Tensor], *inputs: Tensor | None) -> bool:
    """Whether a result is the formula's of these float32 inputs, by the accuracy law."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        peer, truth = formula(*inputs), formula(*(None if tensor is None else tensor.double() for tensor in inputs))
    if result.shape != peer.shape or result.dtype != peer.dtype:
        return False
    return violation(error(result, truth), error(peer, truth), result.dtype) is None


def _elementwise(module: nn.Module, formula: Callable[[Tensor], Tensor]) -> bool:
    """Whether the module computes this formula of each element.

    In parts, since the law is relative to the largest number: near zero, where the curve is, and far out, where there
    may be limits that are not the formula's.
    """
    for limit in (1e-2, 1.0, 8.0, 100.0, 1e4):
        x = torch.linspace(-limit, limit, 257, dtype=torch.float32, device="cpu")
        if not _agree(_computed(module, {}, x), formula, x):
            return False
    return True


def _names(module: nn.Module) -> list[str]:
    """Names of the module's parameters; Unrecognised for modules with parts or buffers."""
    if module._modules or any(buffer is not None for buffer in module._buffers.values()):
        raise Unrecognised("it has parts or buffers")
    return [name for name, parameter in module._parameters.items() if parameter is not None]


def _norm_form(module: nn.Module) -> Form:
    names = _names(module)
    bias = "bias" if "bias" in names else None
    rest = [name for name in names if name != bias]
    shapes = {tuple(module._parameters[name].shape) for name in names}  # type: ignore[union-attr]
    if len(rest) > 1 or (bias and not rest) or any(len(shape) != 1 for shape in shapes):
        raise Unrecognised(f"its parameters are no vector and a bias: {', '.join(names)} of shapes {sorted(shapes)}")
    weight = rest[0] if rest else None
    width = next(iter(shapes))[0] if shapes else WIDTH
    attributes = {"normalized_shape": (width,)} if not shapes and hasattr(module, "normalized_shape") else {}
    parameters = {name: _random(width, seed=i) for i, name in enumerate(names)}
    # Rows that every usual eps is large and small for, and that a mean is in.
    x = _random(len(SCALES), width, seed=7).add_(0.5).mul_(torch.tensor(SCALES, device="cpu").unsqueeze(-1))
    result = _computed(module, parameters, x, **attributes)
    for mixin, offset, eps in _candidates(module, weight is not None, bias is not None):
        number = getattr(module, eps) if isinstance(eps, str) else eps
        affine = (weight, bias) if mixin is RecognisedLayerNorm else (weight,)
        given = (None if name is None else parameters[name] for name in affine)
        if _agree(result, functools.partial(FORMULAS[mixin], eps=number, offset=offset), x, *given):
            options = {"affine": affine, "eps": eps, "offset": offset}
            options["result"] = _result_rule(module, parameters, x, weight, **attributes)
            return Form(mixin, tuple((f"fastattn_{key}", value) for key, value in options.items()))
    raise Unrecognised("it computes neither RMSNorm nor LayerNorm over the last dimension")


def _candidates(module: nn.Module, weight: bool, bias: bool) -> Iterator[tuple[type, float, str | float]]:
    numbers: list[str | float] = [k for k, v in module.__dict__.items() if "eps" in k.lower() and isinstance(v, float)]
    for eps in numbers or USUAL_EPS:
        for mixin in (RecognisedLayerNorm,) if bias else (RecognisedRMSNorm, RecognisedLayerNorm):
            for offset in (0.0, 1.0) if weight else (0.0,):
                yield mixin, offset, eps


def _rms_norm(x: Tensor, weight: Tensor | None, *, eps: float, offset: float) -> Tensor:
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x if weight is None else x * (weight + offset)


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, offset: float) -> Tensor:
    x = _rms_norm(x - x.mean(-1, keepdim=True), weight, eps=eps, offset=offset)
    return x if bias is None else x + bias


#: What they compute, in plain torch.
FORMULAS: dict[type, Callable[..., Tensor]] = {RecognisedRMSNorm: _rms_norm, RecognisedLayerNorm: _layer_norm}


def _result_rule(
    module: nn.Module, parameters: dict[str, Tensor], x: Tensor, weight: str | None, **attributes: Any
) -> str:
    """Whose dtype the result has where input and weight differ: "input", "weight", or "promoted" of both."""
    low, high = torch.bfloat16, torch.float32
    found: list[torch.dtype | None] = []
    for kind, other in ((low, high), (high, low), (low, low)):
        given = {name: parameter.to(other) for name, parameter in parameters.items()}
        try:
            found.append(_computed(module, given, x.to(kind), **attributes).dtype)
        except Unrecognised:
            found.append(None)  # dtypes that it refuses need no rule
    rules = {"input": (low, high), "promoted": (high, high), "weight": (high, low)}
    for rule, expected in rules.items() if weight is not None else [("input", (low, high))]:
        if all(dtype in (None, wanted) for dtype, wanted in zip(found, (*expected, low), strict=True)):
            return rule
    raise Unrecognised(f"its result is {', '.join(map(str, found))} for inputs and weights of other dtypes")


#: What serves activations, its arguments, and what they compute.
ACTIVATIONS: tuple[tuple[type, tuple[str, ...], Callable[[Tensor], Tensor]], ...] = (
    (RecognisedGELU, ("none",), F.gelu),
    (RecognisedGELU, ("tanh",), functools.partial(F.gelu, approximate="tanh")),
    (RecognisedGELU, ("sigmoid",), lambda x: x * torch.sigmoid(1.702 * x)),
    (RecognisedSiLU, (), F.silu),
)


def _activation_form(module: nn.Module) -> Form:
    if _names(module):
        raise Unrecognised("it has parameters")
    for mixin, form, formula in ACTIVATIONS:
        if _elementwise(module, formula):
            x = torch.zeros(ROWS, dtype=torch.bfloat16, device="cpu")
            if _computed(module, {}, x).dtype != torch.bfloat16:
                raise Unrecognised("its result has another dtype than its input")
            return Form(mixin, (("fastattn_form", form),))
    raise Unrecognised("it computes neither SiLU nor GELU by erf, tanh or a sigmoid")


def _conv1d_form(module: nn.Module) -> Form:
    if _names(module) != ["weight", "bias"] or module.weight.ndim != 2:
        raise Unrecognised("it is not a weight and a bias")
    parameters = {"weight": _random(WIDTH, 5, seed=0), "bias": _random(5, seed=1)}
    x = _random(2, ROWS, WIDTH, seed=2)
    result = _computed(module, parameters, x, nx=WIDTH, nf=5)
    if not _agree(result, lambda x, weight, bias: x @ weight + bias, x, parameters["weight"], parameters["bias"]):
        raise Unrecognised("it does not compute x @ weight + bias")
    return Form(RecognisedConv1D)


#: Names of the parts of gated feed-forward layers: gate and up, or both in one; down.
GATED = ((("gate_proj", "up_proj"), "down_proj"), (("w1", "w3"), "w2"), (("gate_up_proj",), "down_proj"))


def _gated_form(module: nn.Module) -> Form | None:
    """SwiGLU; None for whatever else is called a feed-forward layer: it is no more than the modules that it calls."""
    if any(parameter is not None for parameter in module._parameters.values()):
        return None
    for gate, down in GATED:
        (*rest,) = module._modules.keys() - {*gate, down}
        if len(rest) != 1 or not {*gate, down} < module._modules.keys():
            continue
        act: Any = module._modules[rest[0]]
        try:
            if not _elementwise(act, F.silu):
                return None
            small = {name: _product(WIDTH, 2 * 5 // len(gate), seed) for seed, name in enumerate(gate)}
            small |= {down: _product(5, WIDTH, 2), rest[0]: act}
            x = _random(ROWS, WIDTH, seed=7)
            result = _computed(module, {}, x, _modules=small)
        except Unrecognised:
            return None
        weights = [small[name].weight.detach() for name in (*gate, down)]
        options = {"gate": gate, "down": down, "act": rest[0], "silu": _original(act)}
        if _agree(result, _swiglu, x, *weights):
            return Form(RecognisedSwiGLU, tuple((f"fastattn_{key}", value) for key, value in options.items()))
    return None


def _swiglu(x: Tensor, *weights: Tensor) -> Tensor:
    *gates, down = weights
    gate, up = torch.cat([x @ weight.t() for weight in gates], -1).chunk(2, -1)
    return (F.silu(gate) * up) @ down.t()


def _product(width: int, outputs: int, seed: int) -> Any:
    layer = nn.Linear(width, outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(_random(outputs, width, seed=seed))
    return layer


def _loss_form(module: nn.Module) -> Form | None:
    """Of a model that asks for a loss."""
    try:
        from fastattn.integrations.transformers import loss
    except ImportError as error:
        raise Unrecognised(str(error)) from error
    if not loss.asked_for(module):
        return None
    if loss.replaced(module):
        raise Unrecognised("its loss_function is one of its own")
    return Form(loss.LossFunction)


#: (pattern of class names, what to try), in this order.
PROBES: tuple[tuple[str, Callable[[nn.Module], Form | None]], ...] = (
    (r"norm(?!al)", _norm_form),
    (r"gelu|silu|^swish", _activation_form),
    (r"^conv1d$", _conv1d_form),
    (r"mlp$|feed_?forward|ffn$|swiglu", _gated_form),
)
