"""Repairs Triton's interpreter (TRITON_INTERPRET=1), which computes some things otherwise than any GPU.

| as it comes (3.6 to 3.9)                                  | repaired                                        |
|-----------------------------------------------------------|-------------------------------------------------|
| dot products and arithmetic of bfloat16 take its bits for | computed in float32, rounded to nearest even    |
| integers                                                  |                                                 |
| float32 is cut off, not rounded, to bfloat16              | rounded to nearest even                         |
| `range` with a tensor for a bound raises (3.6)            | the tensor's value                              |
| the constant bfloat16 does not exist (3.6)                | it does                                         |
| NumPy warns of infinities and NaN that kernels mean       | silent                                          |
| every call of a device function patches the language      | once per launch: most of the time it takes      |
| every sum of integers is computed again in 64 bits        | left away: as long again                        |

The triton backend calls `repair` when it is probed in that mode; nothing else loads this module.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np


def bfloat16_bits(values: Any) -> np.ndarray:
    """float32 rounded to the nearest bfloat16, ties to even, as uint16; NaN stays NaN."""
    x = np.ascontiguousarray(values, dtype=np.float32)
    bits = x.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded).reshape(np.shape(values))


@functools.cache
def repair() -> None:
    """Changes the interpreter of this process, once."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def is_bfloat16(operand: Any) -> bool:
        return operand.dtype.scalar == tl.bfloat16

    def widened(operand: Any) -> np.ndarray:
        if is_bfloat16(operand):
            return (operand.data.astype(np.uint32) << 16).view(np.float32)
        return operand.data

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        if a.dtype.scalar.is_int():
            product = np.matmul(a.data.astype(np.int32), b.data.astype(np.int32))
        else:
            product = np.matmul(widened(a).astype(np.float32, copy=False), widened(b).astype(np.float32, copy=False))
        return handle((product + d.data).astype(d.data.dtype, copy=False), d.dtype.scalar)

    cast_as_it_comes = builder.cast_impl

    def cast(self: Any, source: Any, to: Any) -> Any:
        wide = handle(widened(source), tl.float32) if is_bfloat16(source) else source
        if to.scalar != tl.bfloat16:
            return wide if to.scalar == wide.dtype.scalar else cast_as_it_comes(self, wide, to)
        return source if is_bfloat16(source) else handle(bfloat16_bits(wide.data), tl.bfloat16)

    binary_as_it_comes = builder.binary_op
    comparisons = {
        np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal,
    }  # fmt: skip

    def binary(self: Any, left: Any, right: Any, operation: Any) -> Any:
        if not (is_bfloat16(left) and is_bfloat16(right)):
            return binary_as_it_comes(self, left, right, operation)
        result = operation(widened(left), widened(right))
        return handle(result if operation in comparisons else bfloat16_bits(result), tl.bfloat16)

    fp_to_fp_as_it_comes = builder.create_fp_to_fp

    def float_to_float(self: Any, source: Any, to: Any, rounding: Any) -> Any:
        usual = {tl.bfloat16, tl.float16, tl.float32}
        if {source.dtype.scalar, to.scalar} <= usual:
            return cast(self, source, to)
        return fp_to_fp_as_it_comes(self, source, to, rounding)

    builder.create_dot = dot
    builder.cast_impl = cast
    builder.binary_op = binary
    builder.create_fp_to_fp = float_to_float
    if not hasattr(builder, "get_bf16"):
        builder.get_bf16 = lambda self, value: cast(self, self.get_fp32(value), tl.bfloat16)

    patch_as_it_comes = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, *rest: Any, **named: Any) -> Any:
        result = patch_as_it_comes(tensor, *rest, **named)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])
        return result

    interpreter._patch_lang_tensor = patch_tensor

    # What a launch patched need not be patched by every call of a device function: nine tenths of such a call.
    patched: set[int] = set()

    def launch(self: Any, *args: Any, **named: Any) -> Any:
        patched.clear()
        with np.errstate(all="ignore"):
            return launch_as_it_comes(self, *args, **named)

    def call(self: Any, *args: Any, **named: Any) -> Any:
        modules = {id(value) for value in self.fn.__globals__.values() if value is tl or value is tl.core}
        if not modules <= patched:
            interpreter._patch_lang(self.fn)
            patched.update(modules)
        return self.rewrite()(*args, **named)

    launch_as_it_comes = interpreter.GridExecutor.__call__
    interpreter.GridExecutor.__call__ = launch
    interpreter.InterpretedFunction.__call__ = call
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )
