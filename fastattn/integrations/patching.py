"""fastattn.patch(model): the modules of a model on our kernels, in place, and back again.

A module is replaced by giving it another class: one that is made of a mixin of ours and the class that the module had.
The module itself stays: parameters, buffers, hooks, whoever refers to it. The new class is a subclass of the old one,
has its name, and is made again from its parts where a module is unpickled or copied.
"""

from __future__ import annotations

import copyreg
import fnmatch
import functools
import types
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from fastattn.dispatch import BackendUnsupported
from fastattn.integrations.recognition import Form, Parts, Unrecognised, parts_of, recognise
from fastattn.nn.activations import GELUForward, LogSoftmaxForward, SiLUForward, SoftmaxForward
from fastattn.nn.attention import MultiheadAttentionForward
from fastattn.nn.linear import LinearForward
from fastattn.nn.losses import CrossEntropyLossForward
from fastattn.nn.norms import LayerNormForward, RMSNormForward
from fastattn.nn.served import Served
from fastattn.nn.transformer import TransformerDecoderLayerForward, TransformerEncoderLayerForward

#: torch's class -> (the mixin that serves it, its methods that the mixin stands for).
SERVED: dict[type[nn.Module], tuple[type, tuple[str, ...]]] = {
    nn.Linear: (LinearForward, ("forward",)),
    nn.LayerNorm: (LayerNormForward, ("forward",)),
    nn.RMSNorm: (RMSNormForward, ("forward",)),
    nn.GELU: (GELUForward, ("forward",)),
    nn.SiLU: (SiLUForward, ("forward",)),
    nn.Softmax: (SoftmaxForward, ("forward",)),
    nn.LogSoftmax: (LogSoftmaxForward, ("forward",)),
    nn.CrossEntropyLoss: (CrossEntropyLossForward, ("forward",)),
    nn.MultiheadAttention: (MultiheadAttentionForward, ("forward",)),
    nn.TransformerEncoderLayer: (TransformerEncoderLayerForward, ("forward", "_sa_block", "_ff_block")),
    nn.TransformerDecoderLayer: (
        TransformerDecoderLayerForward,
        ("forward", "_sa_block", "_mha_block", "_ff_block"),
    ),
}
#: Subclasses of torch's that are asked what they compute, although they have a forward of their own.
KNOWN_OVERRIDES = {"timm.layers.norm.LayerNorm", "timm.layers.norm.LayerNormFp32"}
#: Without modules in them these compute nothing.
NOTHING = (nn.Identity, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


# ---- classes ----


@functools.cache
def served_class(original: type, form: Form, strict: bool) -> type:
    """The subclass of `original` with the form's mixin in front: one class for the same arguments."""
    members = {
        **dict(form.options),
        "fastattn_strict": strict,
        "_fastattn_parts": Parts(original, form, strict),
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce,
    }
    return types.new_class(original.__name__, (form.mixin, original), exec_body=lambda body: body.update(members))


def _patched_base(cls: type) -> type | None:
    """The class that patch made among a class and its bases."""
    return next((base for base in cls.__mro__ if parts_of(base) is not None), None)


def _reduce(self: Any, protocol: Any) -> Any:
    """As the original pickles, but the class is named by its parts."""
    cls = type(self)
    reduced = super(_patched_base(cls), self).__reduce_ex__(max(int(protocol), 2))  # type: ignore[arg-type]
    parts = parts_of(cls)
    if parts is None or not isinstance(reduced, tuple) or reduced[:1] != (copyreg.__newobj__,):  # type: ignore[attr-defined]
        return reduced
    return (_new, (*parts, *reduced[1][1:]), *reduced[2:])


def _new(original: type, form: Form, strict: bool, *args: Any) -> nn.Module:
    """A bare instance, whose state pickle or copy fills in."""
    cls = served_class(original, form, strict)
    module: nn.Module = cls.__new__(cls, *args)
    return module


def _rebased(cls: type, old: type, new: type) -> type:
    """A class that torch made at run time for one module (parametrizations, FSDP), on another base."""
    bases = tuple(new if base is old else base for base in cls.__bases__)
    members = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__", "_fastattn_before")}
    return types.new_class(cls.__name__, bases, exec_body=lambda body: body.update(members))


def _class_with(module: nn.Module, form: Form, strict: bool) -> type:
    """The class that the module gets."""
    cls: type = type(module)
    if not is_parametrized(module):
        return served_class(cls, form, strict)
    # torch takes parametrizations off by going back to the base of a class that it made for this module.
    base = cls.__bases__[0]
    new = _rebased(cls, base, served_class(base, form, strict))
    new._fastattn_before = cls  # type: ignore[attr-defined]
    return new


def _class_without(module: nn.Module) -> type | None:
    """The class that the module had; None where patch did nothing."""
    cls = type(module)
    patched = _patched_base(cls)
    if patched is None:
        return None
    parts = parts_of(patched)
    assert parts is not None
    if cls is patched:
        return parts.original
    before = cls.__dict__.get("_fastattn_before")
    if before is not None and vars(before).keys() == vars(cls).keys() - {"_fastattn_before"}:
        return before
    return _rebased(cls, patched, parts.original)


# ---- reports ----


@dataclass(frozen=True)
class Entry:
    """path: of the module in the model ("" for the model itself); module: its class; what: by what, or why not."""

    path: str
    module: str
    what: str


@dataclass(frozen=True)
class PatchReport:
    """What patch did. Printed it is a table, one line for modules of one class with one fate.

    replaced: modules that have our kernels now, and which. left: modules that fastattn has kernels for and that stay as
    they are, and why. already: modules that were ours before. others: how many modules of which class fastattn has no
    kernel for; modules that only call others are not counted.
    """

    replaced: tuple[Entry, ...] = ()
    left: tuple[Entry, ...] = ()
    already: tuple[Entry, ...] = ()
    others: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        if not (self.replaced or self.left or self.already):
            return f"nothing to patch: fastattn has no kernel for {_counted(self.others) or 'anything in it'}"
        lines = [f"{len(self.replaced)} modules replaced, {len(self.left)} left, {len(self.already)} were ours already"]
        for title, entries in (("replaced", self.replaced), ("left", self.left), ("already", self.already)):
            groups: dict[tuple[str, str], list[str]] = {}
            for entry in entries:
                groups.setdefault((entry.module, entry.what), []).append(entry.path or "(the model)")
            for (module, what), paths in groups.items():
                where = paths[0] if len(paths) == 1 else f"{paths[0]} ... {paths[-1]}"
                lines.append(f"  {title:9}{module:28}{len(paths):5}  {what}: {where}")
        if self.others:
            lines.append(f"  no kernel for {_counted(self.others)}")
        return "\n".join(lines)


def _counted(classes: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in sorted(classes.items()))


# ---- what is to be done ----


@dataclass(frozen=True)
class Verdict:
    """form: what would serve a module; why: why nothing does although there is a kernel. Both None: there is none."""

    form: Form | None = None
    why: str | None = None


def judge(module: nn.Module) -> Verdict:
    """What patch does with a module that is not ours yet; nothing is changed."""
    cls = type(module)
    if is_parametrized(module):
        cls = cls.__bases__[0]
    torchs = next((base for base in cls.__mro__ if base in SERVED), None)
    try:
        if torchs is None:
            form = None if cls.__module__.split(".")[0] == "torch" else recognise(module)
        else:
            mixin, methods = SERVED[torchs]
            changed = [name for name in methods if getattr(cls, name) is not getattr(torchs, name)]
            if changed and f"{cls.__module__}.{cls.__qualname__}" in KNOWN_OVERRIDES:
                form = recognise(module)
            elif changed:
                return Verdict(why=f"a subclass of {torchs.__name__} with a {' and a '.join(changed)} of its own")
            else:
                form = Form(mixin)
    except Unrecognised as unrecognised:
        return Verdict(why=str(unrecognised))
    if form is None:
        return Verdict()
    if isinstance(module, LazyModuleMixin):
        return Verdict(why="its parameters are not there yet: call the model once before patching")
    if "forward" in module.__dict__:
        return Verdict(why="its forward has been replaced on the module itself")
    return Verdict(form)


def _excluded(path: str, module: nn.Module, exclude: tuple[str | type, ...]) -> bool:
    return any(
        fnmatch.fnmatchcase(path, rule) if isinstance(rule, str) else isinstance(module, rule) for rule in exclude
    )


def patch(model: nn.Module, *, strict: bool = False, exclude: Iterable[str | type] = ()) -> PatchReport:
    """Gives the modules of a model our kernels, in place.

    Replaced are torch.nn's Linear, LayerNorm, RMSNorm, GELU, SiLU, Softmax, LogSoftmax, CrossEntropyLoss,
    MultiheadAttention, TransformerEncoderLayer and TransformerDecoderLayer, subclasses that do not change what is
    replaced, other libraries' norms, activations and Conv1D that compute the same (fastattn.integrations.recognition),
    and the cross entropy in the loss_function of Transformers' models. state_dict, parameters, buffers, hooks,
    parametrizations and references to modules stay; isinstance, deepcopy and pickle work. Calls that our kernels do not
    serve go to the original forward (fastattn.explain(model, ...) shows them).

    Args:
        model: any module; itself, or whatever is in it, is replaced. Modules that are ours already are left alone.
        strict: raise where a module could not be replaced, and let modules raise in calls that they cannot serve.
        exclude: modules to leave: patterns of paths ("*.lm_head", as fnmatch has them), or classes.

    Returns: what was replaced, what was left, and why; print it.

    Raises:
        TypeError: model is not a module.
        BackendUnsupported: strict, and a module with a kernel of ours cannot be replaced. Nothing is changed then, nor
            after any other exception.
    """
    _check(model, "patch")
    rules = tuple(exclude)
    for rule in rules:
        if not isinstance(rule, (str, type)):
            raise TypeError(f"patch: exclude holds patterns and classes, got {rule!r}")
    replaced: list[Entry] = []
    left: list[Entry] = []
    already: list[Entry] = []
    others: dict[str, int] = {}
    inside: set[int] = set()  # activations that are part of what was replaced
    changes: list[tuple[nn.Module, type]] = []
    for path, module in model.named_modules():
        name = type(module).__name__
        if type(module) is NonDynamicallyQuantizableLinear:
            continue  # MultiheadAttention reads its parameters and never calls it
        if isinstance(module, Served):
            parts = parts_of(type(module))
            if parts is not None and parts.strict != strict:
                changes.append((module, served_class(parts.original, parts.form, strict)))
            already.append(Entry(path, name, _title(type(module))))
            continue
        verdict = judge(module)
        if verdict.form is not None and _excluded(path, module, rules):
            left.append(Entry(path, name, "excluded"))
        elif verdict.form is not None:
            new = _class_with(module, verdict.form, strict)
            changes.append((module, new))
            replaced.append(Entry(path, name, _title(new)))
            part = dict(verdict.form.options).get("fastattn_act")
            inside |= {id(module._modules[part])} if part else set()
        elif verdict.why is not None:
            left.append(Entry(path, name, verdict.why))
        elif not module._modules and id(module) not in inside and not isinstance(module, NOTHING):
            others[name] = others.get(name, 0) + 1
    report = PatchReport(tuple(replaced), tuple(left), tuple(already), others)
    refused = [entry for entry in left if entry.what != "excluded"]
    if strict and refused:
        raise BackendUnsupported(f"patch(strict=True) changed nothing: {PatchReport(left=tuple(refused))}")
    _assign(changes)
    return report


def unpatch(model: nn.Module) -> int:
    """Gives the modules of a model back the classes that they had before `patch`; how many there were.

    Modules that were made as fastattn.nn's stay that. TypeError: model is not a module.
    """
    _check(model, "unpatch")
    changes = [(module, _class_without(module)) for module in model.modules()]
    found = [(module, cls) for module, cls in changes if cls is not None]
    _assign(found)
    return len(found)


def _title(cls: type) -> str:
    """The mixin's name, as reports have it."""
    mixin = next(base for base in cls.__mro__ if issubclass(base, Served) and not issubclass(base, nn.Module))
    return f"fastattn's {mixin.__name__.removesuffix('Forward').removeprefix('Recognised')}"


def _check(model: Any, name: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} takes a torch.nn.Module, got {type(model).__name__}")


def _assign(changes: list[tuple[nn.Module, type]]) -> None:
    """All of them, or none."""
    before = [(module, type(module)) for module, _ in changes]
    try:
        for module, cls in changes:
            module.__class__ = cls
    except BaseException:
        for module, cls in before:
            module.__class__ = cls
        raise
