"""Modules that are none of torch's and compute what our kernels compute: norms, GELUs, Conv1D, SwiGLU layers.

A class is never taken for what its name says. The name only says what to try: the module's own forward runs on a small
random input, with small random parameters in a copy of it, and what comes out must be what the formula gives. So a
library need not be imported to be recognised, and a class that computes something else is left alone.

What was found is a Form: the mixin that serves it, and the options that the mixin needs to know.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import ops
from fastattn.nn.served import Served, hooked, refusal
from fastattn.ops.linear.op import prefers_torch

ROWS, WIDTH = 3, 8
#: Modules without a number of their own for it have it in their forward.
USUAL_EPS = (1e-5, 1e-6, 1e-12)


@dataclass(frozen=True)
class Form:
    """mixin: what serves a module; options: (name, value) attributes of the class that is put in front of its own."""

    mixin: type
    options: tuple[tuple[str, Any], ...] = ()


class Unrecognised(Exception):
    """The module computes something else; the message says what was tried."""


# ---- what serves them ----


class _NormForward(Served):
    """fastattn_weight, _bias: names of parameters, None without; _eps: an attribute's name, or the number; _offset:
    what is added to the weight; _result: whose dtype the result has."""

    fastattn_weight: str | None
    fastattn_bias: str | None
    fastattn_eps: str | float
    fastattn_offset: float
    fastattn_result: str

    def _norm(self, x: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        weight = None if self.fastattn_weight is None else getattr(self, self.fastattn_weight)
        bias = None if self.fastattn_bias is None else getattr(self, self.fastattn_bias)
        reason: str | None = "called with more than one tensor"
        if len(args) == 1 and not kwargs:
            reason = refusal(args[0], weight, bias)
        if reason is not None:
            self._left_to_torch(reason)
            return super().forward(*args, **kwargs)
        (x,) = args
        eps = getattr(self, self.fastattn_eps) if isinstance(self.fastattn_eps, str) else self.fastattn_eps
        dtype = x.dtype
        if weight is not None and weight.dtype != dtype and self.fastattn_result != "input":
            promoted = torch.promote_types(dtype, weight.dtype)
            dtype = promoted if self.fastattn_result == "promoted" else weight.dtype
            x = x.to(promoted)
        return self._norm(x, weight, bias, eps).to(dtype)


class RecognisedRMSNorm(_NormForward):
    """An RMSNorm over the last dimension on fastattn.rms_norm."""

    def _norm(self, x: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:
        return ops.rms_norm(x, x.shape[-1:], weight, eps, weight_offset=self.fastattn_offset)


class RecognisedLayerNorm(_NormForward):
    """A LayerNorm over the last dimension on fastattn.layer_norm."""

    def _norm(self, x: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:
        normed: Tensor = ops.layer_norm(x, x.shape[-1:], weight, bias, eps, weight_offset=self.fastattn_offset)
        return normed


class RecognisedGELU(Served):
    """A GELU on fastattn.gelu."""

    fastattn_approximate: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        reason = refusal(args[0]) if len(args) == 1 and not kwargs else "called with more than one tensor"
        if reason is not None:
            self._left_to_torch(reason)
            return super().forward(*args, **kwargs)
        return ops.gelu(args[0], self.fastattn_approximate)


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
        elif type(act) is not self.fastattn_silu or hooked(act) or None in projections:
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


def _drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")


def _agree(result: Tensor, expected: Tensor) -> bool:
    return result.shape == expected.shape and torch.allclose(result.double(), expected, rtol=1e-4, atol=1e-5)


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
    parameters = {name: _drawn(width, seed=i) for i, name in enumerate(names)}
    # Rows that eps matters to, and rows that a mean is in.
    x = _drawn(ROWS, width, seed=7) * torch.tensor([[1e-3], [1.0], [1e4]], device="cpu")
    x[1] += 0.5
    result = _computed(module, parameters, x, **attributes)
    for mixin, offset, eps in _candidates(module, weight is not None, bias is not None):
        number = getattr(module, eps) if isinstance(eps, str) else eps
        if _agree(result, _normed(mixin, x.double(), parameters, weight, bias, offset, number)):
            options = {"weight": weight, "bias": bias, "eps": eps, "offset": offset}
            options["result"] = _result_rule(module, parameters, x, weight, **attributes)
            return Form(mixin, tuple((f"fastattn_{key}", value) for key, value in options.items()))
    raise Unrecognised("it computes neither RMSNorm nor LayerNorm over the last dimension")


def _candidates(module: nn.Module, weight: bool, bias: bool) -> Iterator[tuple[type, float, str | float]]:
    numbers: list[str | float] = [k for k, v in module.__dict__.items() if "eps" in k.lower() and isinstance(v, float)]
    for eps in numbers or USUAL_EPS:
        for mixin in (RecognisedLayerNorm,) if bias else (RecognisedRMSNorm, RecognisedLayerNorm):
            for offset in (0.0, 1.0) if weight else (0.0,):
                yield mixin, offset, eps


def _normed(
    mixin: type,
    x: Tensor,
    parameters: dict[str, Tensor],
    weight: str | None,
    bias: str | None,
    offset: float,
    eps: float,
) -> Tensor:
    if mixin is RecognisedLayerNorm:
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    x = x if weight is None else x * (parameters[weight].double() + offset)
    return x if bias is None else x + parameters[bias].double()


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


def _gelu_form(module: nn.Module) -> Form:
    if _names(module):
        raise Unrecognised("it has parameters")
    # Far out there may be limits that are not GELU's.
    x = torch.linspace(-8.0, 8.0, 257, dtype=torch.float32, device="cpu")
    x = torch.cat((x, torch.tensor([-1e4, -100.0, -20.0, 20.0, 100.0, 1e4], device="cpu")))
    result = _computed(module, {}, x)
    for approximate in ("none", "tanh"):
        expected = F.gelu(x.double(), approximate=approximate)
        if torch.allclose(result.double(), expected, rtol=1e-6, atol=2e-6):
            if _computed(module, {}, x.bfloat16()).dtype != torch.bfloat16:
                raise Unrecognised("its result has another dtype than its input")
            return Form(RecognisedGELU, (("fastattn_approximate", approximate),))
    raise Unrecognised("it computes neither of torch's GELUs")


def _conv1d_form(module: nn.Module) -> Form:
    if _names(module) != ["weight", "bias"] or module.weight.ndim != 2:
        raise Unrecognised("it is not a weight and a bias")
    parameters = {"weight": _drawn(WIDTH, 5, seed=0), "bias": _drawn(5, seed=1)}
    x = _drawn(2, ROWS, WIDTH, seed=2)
    result = _computed(module, parameters, x, nx=WIDTH, nf=5)
    if not _agree(result, x.double() @ parameters["weight"].double() + parameters["bias"].double()):
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
        x = torch.linspace(-8.0, 8.0, 257, dtype=torch.float32, device="cpu")
        try:
            if not _agree(_computed(act, {}, x), F.silu(x.double())):
                return None
            small = {name: _product(WIDTH, 2 * 5 // len(gate), seed) for seed, name in enumerate(gate)}
            small |= {down: _product(5, WIDTH, 2), rest[0]: act}
            x = _drawn(ROWS, WIDTH, seed=7)
            result = _computed(module, {}, x, _modules=small)
        except Unrecognised:
            return None
        # In float64, which autocast leaves alone.
        weights = {name: small[name].weight.detach().double() for name in (*gate, down)}
        products = torch.cat([x.double() @ weights[name].t() for name in gate], -1)
        expected = (F.silu(products[:, :5]) * products[:, 5:]) @ weights[down].t()
        options = {"gate": gate, "down": down, "act": rest[0], "silu": type(act)}
        if _agree(result, expected):
            return Form(RecognisedSwiGLU, tuple((f"fastattn_{key}", value) for key, value in options.items()))
    return None


def _product(width: int, outputs: int, seed: int) -> Any:
    layer = nn.Linear(width, outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(_drawn(outputs, width, seed=seed))
    return layer


#: (pattern of class names, what to try), in this order.
PROBES: tuple[tuple[str, Callable[[nn.Module], Form | None]], ...] = (
    (r"norm(?!al)", _norm_form),
    (r"gelu", _gelu_form),
    (r"^conv1d$", _conv1d_form),
    (r"mlp$|feed_?forward|ffn$|swiglu", _gated_form),
)
