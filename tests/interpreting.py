"""Patches for Triton's interpreter: bfloat16 as on a GPU, and a third of the time."""

import functools
import inspect

import torch
from triton import language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def _to_bfloat16(builder, source, dtype):
    """Round to the nearest; the interpreter itself truncates."""
    if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
        rounded = torch.from_numpy(source.data).to(torch.bfloat16).view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, tl.bfloat16)
    return builder.cast_impl(source, dtype)


def _dot(builder, a, b, *arguments, multiply=interpreter.InterpreterBuilder.create_dot):
    """Multiply bfloat16 numbers by value; the interpreter itself multiplies their bits as integers."""
    return multiply(builder, *map(_to_float32, (a, b)), *arguments)


def _to_float32(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    numbers = torch.from_numpy(handle.data).view(torch.bfloat16).float().numpy()
    return interpreter.TensorHandle(numbers, tl.float32)


class _PatchOnce:
    """Patches ``triton.language`` once per launch; the interpreter does so at every call of a helper."""

    def __init__(self, patch):
        self._patch = patch
        self._patched = None

    def __call__(self, function):
        languages = _languages(function)
        if self._patched is None:
            scope = self._patch(function)
            if scope is None:  # Triton before 3.5, whose patches stay
                return None
            self._patched, restore = languages, scope.restore

            def end():
                self._patched = None
                restore()

            scope.restore = end
            return scope
        if not languages <= self._patched:
            self._patched |= languages
            return self._patch(function)
        return None


@functools.cache
def _languages(function):
    """Those of Triton's language modules that a function's globals refer to."""
    values = function.__globals__.values()
    return {id(value) for value in values if inspect.ismodule(value) and value in (tl, tl.core)}


_np_dtype_of_scalars = functools.cache(interpreter._get_np_dtype)


def _np_dtype(dtype, otherwise=interpreter._get_np_dtype):
    """NumPy's dtype for one of Triton's; cached for scalars."""
    return _np_dtype_of_scalars(dtype) if type(dtype) is tl.dtype else otherwise(dtype)


def _check_no_overflow(semantic, left, right, operator):
    """Do nothing: the interpreter's check costs eight operators per integer sum; a GPU has none."""


interpreter.InterpreterBuilder.create_fp_trunc = _to_bfloat16
interpreter.InterpreterBuilder.create_dot = _dot
interpreter._patch_lang = _PatchOnce(interpreter._patch_lang)
interpreter._get_np_dtype = _np_dtype
TritonSemantic.binary_op_sanitize_overflow_impl = _check_no_overflow
