"""Sample problems of what attention can do beyond attn_mask, causality and dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastattn.cases import Arguments, Case, Sampler
from fastattn.numerics import accumulation_dtype
from fastattn.ops.attention.samples import (
    NEAR_KEYS_FIRST,
    OF_SINKS,
    ONE_VISIBLE_KEY,
    ROUNDING_ONLY,
    WITH_MASK,
    additive_mask,
    bool_mask,
    bshd_order,
    dead_rows,
    large,
    of_shape,
    padding,
    pattern,
    unfused_peer,
)


def _lenient(case: Case) -> Case:
    """A case of features; results of few elements, or of few queries or keys, are drawn more often."""
    if "alibi additive mask" in case.name:
        return replace(case, draws=16, **NEAR_KEYS_FIRST)
    if "additive mask" in case.name:
        return replace(unfused_peer(case), draws=8)
    if "sinks" in case.name or "everything" in case.name:
        return replace(case, draws=16, **OF_SINKS)
    return replace(unfused_peer(case), draws=4)


# Features: arguments beside the tensors, some of them tensors themselves.


def _slopes(s: Sampler, heads: int) -> Tensor:
    """As Press et al. 2022 choose them: a geometric sequence."""
    return torch.tensor([2.0 ** (-8.0 * (h + 1) / heads) for h in range(heads)], device=s.device)


def _ids(s: Sampler, *shape: int, documents: int = 4) -> Tensor:
    """Documents one behind the other, cut at random places."""
    return s.integers(*shape, high=documents).sort(-1).values


FEATURES: dict[str, Callable[[Sampler, tuple[int, ...]], Arguments]] = {
    "window": lambda s, n: {"window": (20, 9)},
    "window causal": lambda s, n: {"window": (33, -1), "is_causal": True},
    "softcap": lambda s, n: {"softcap": 1.5},
    "alibi": lambda s, n: {"alibi_slopes": _slopes(s, n[1])},
    "sinks": lambda s, n: {"sinks": s.normal(n[1])},
    "documents": lambda s, n: {"document_ids": (_ids(s, n[0], n[2]), _ids(s, n[0], n[3]))},
    "prefix": lambda s, n: {"prefix_len": s.integers(n[0], high=n[3] + 1), "is_causal": True},
}
WITH_SINKS = ("query", "key", "value", "sinks")


def _featured(shape: tuple[int, int, int, int, int], *names: str, **rest: Any) -> Callable[[Sampler], Arguments]:
    """The arguments of a problem with some of FEATURES."""
    plain = of_shape(shape, **rest)

    def build(s: Sampler) -> Arguments:
        arguments = plain(s)
        for name in names:
            arguments |= FEATURES[name](s, shape[:4])
        return arguments

    return build


def all_cases() -> Iterator[Case]:
    """Every feature alone, with every other one, and at its edges."""
    return map(_lenient, _features())


def _features() -> Iterator[Case]:
    for name in FEATURES:
        several: dict[str, tuple[int, int, int, int, int]] = {
            "": (2, 2, 150, 150, 32), " 40 of 300": (2, 2, 40, 300, 24), " 300 of 40": (1, 2, 300, 40, 24),
            " long": (1, 1, 400, 400, 16),
        }  # fmt: skip
        for suffix, shape in several.items():
            for alignment in ("top_left", "bottom_right"):
                if alignment == "top_left" or shape[2] != shape[3]:
                    call = {"causal_alignment": alignment, "return_lse": suffix != ""}
                    yield Case(
                        f"{name}{suffix} {alignment}",
                        _featured(shape, name, **call),
                        differentiable=WITH_SINKS if name == "sinks" else None,
                        core=suffix == " 40 of 300" and alignment == "bottom_right",
                    )
        rest: dict[str, dict[str, Any]] = {
            "gqa bshd": {"kv_heads": 2, "draw": bshd_order}, "dropout": {"dropout_p": 0.3, "seed": 17},
            "padding": {"mask": padding}, "bool mask": {"mask": bool_mask},
        }  # fmt: skip
        for what, call in rest.items():
            yield Case(f"{name} {what}", _featured((2, 4, 90, 140, 16), name, **call))
        for what, mask in (("", additive_mask), (" of each key", pattern(additive_mask, (False, True, False, True)))):
            build = _featured((2, 4, 90, 140, 16), name, mask=mask)
            yield Case(f"{name} additive mask{what}", build, differentiable=WITH_MASK)
        for other in FEATURES:
            if name < other:
                yield Case(f"{name} and {other}", _featured((2, 2, 130, 200, 16), name, other))
    every = ("window causal", "softcap", "alibi", "sinks", "documents", "prefix")
    everywhere: dict[str, Any] = {"kv_heads": 2, "mask": additive_mask, "dropout_p": 0.2, "seed": 4, "return_lse": True}
    yield Case(
        "everything at once",
        _featured((2, 4, 150, 190, 24), *every, causal_alignment="bottom_right", **everywhere),
        differentiable=(*WITH_MASK, "sinks"),
        core=True,
    )
    for window in ((0, 0), (0, 3), (5, 0), (-1, 3), (5, -1), (1000, 1000), (63, 64), (2**40, 0), (0, 2**62)):
        for shape in ((1, 2, 200, 200, 16), (1, 2, 70, 300, 16)):
            build = of_shape(shape, window=window, causal_alignment="bottom_right", return_lse=True)
            one = {"differentiable": ("value",), **ONE_VISIBLE_KEY} if window == (0, 0) else {}
            yield Case(f"window {window[0]} {window[1]} {shape[2]}x{shape[3]}", build, core=window == (5, 0), **one)
    for width in (100, 300):
        build = of_shape((1, 2, 700, 700, 16), window=(width, -1), is_causal=True)
        yield Case(f"window of {width} in 700", build, core=width == 300)
    yield Case("window before all keys", of_shape((1, 2, 100, 20, 16), window=(3, 0), return_lse=True), core=True)

    def with_arguments(shape: tuple[int, int, int, int, int], make: Callable[[Sampler], Arguments], **call: Any) -> Any:
        plain = of_shape(shape, **call)
        return lambda s: {**plain(s), **make(s)}

    def arguments(
        name: str, make: Callable[[Sampler], Arguments], shape: tuple[int, int, int, int, int], **call: Any
    ) -> Case:
        return Case(name, with_arguments(shape, make, **call))

    small = (2, 3, 140, 140, 16)
    yield arguments("documents of all", lambda s: {"document_ids": _ids(s, 140)}, small)
    yield arguments("documents int32", lambda s: {"document_ids": _ids(s, 2, 140).int()}, small)
    yield arguments("documents shuffled", lambda s: {"document_ids": s.integers(2, 140, high=5)}, small)
    yield replace(
        arguments(
            "documents of one query", lambda s: {"document_ids": s.integers(2, 140, low=-(2**62), high=2**62)}, small
        ),
        differentiable=ROUNDING_ONLY,
        **ONE_VISIBLE_KEY,
    )
    yield arguments(
        "documents nobody has", lambda s: {"document_ids": (_ids(s, 60), _ids(s, 140) + 2)}, (2, 3, 60, 140, 16),
        return_lse=True,
    )  # fmt: skip
    yield arguments("documents of 600", lambda s: {"document_ids": _ids(s, 600, documents=7)}, (1, 2, 600, 600, 16))
    yield arguments("documents of 1", lambda s: {"document_ids": _ids(s, 600, documents=1)}, (1, 1, 600, 600, 16))
    yield arguments("slopes of a batch", lambda s: {"alibi_slopes": _slopes(s, 6).reshape(2, 3)}, small)
    yield arguments("slopes of 0 and below", lambda s: {"alibi_slopes": torch.tensor([0.0, -0.01, 0.5])}, small)
    for prefix in (0, 1, 64, 100, 140):
        yield Case(f"prefix {prefix}", of_shape(small, prefix_len=prefix, is_causal=True))
    yield arguments("prefix lifts window", lambda s: {"prefix_len": 13, "window": (10, 10)}, (1, 2, 500, 500, 16))
    for value, name in ((-torch.inf, "no"), (30.0, "large"), (-30.0, "small")):
        make = lambda s, v=value: {"sinks": torch.full((3,), v).to(s.device, s.dtype)}  # noqa: E731
        yield arguments(f"{name} sinks", make, small, return_lse=True)
    yield Case(
        "sinks of dead rows",
        with_arguments(small, lambda s: {"sinks": s.normal(3)}, mask=dead_rows, return_lse=True),
        differentiable=WITH_SINKS,
        core=True,
    )
    yield arguments("float sinks", lambda s: {"sinks": s.normal(3, dtype=accumulation_dtype(s.dtype))}, small)
    yield arguments("sinks without keys", lambda s: {"sinks": s.normal(3)}, (2, 3, 5, 0, 8), return_lse=True)
    for cap in (0.5, 50.0):
        yield Case(f"softcap {cap}", of_shape((1, 2, 70, 90, 32), softcap=cap, draw=large))
    yield arguments("softcap of scale 0", lambda s: {"softcap": 2.0, "scale": 0.0}, (1, 2, 30, 40, 16))

    def five_dims(s: Sampler) -> Arguments:
        return {
            "query": s.normal(2, 2, 3, 70, 16), "key": s.normal(2, 2, 3, 70, 16), "value": s.normal(2, 2, 3, 70, 16),
            "document_ids": _ids(s, 2, 2, 70), "prefix_len": s.integers(2, 2, high=70), "is_causal": True,
        }  # fmt: skip

    yield Case("features of 5 dims", five_dims)
