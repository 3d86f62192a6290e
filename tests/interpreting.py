"""Triton's interpreter as these tests need it: bfloat16 as GPUs have it, and in a third of the time."""

import functools
import inspect

import torch
from triton import language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def _to_bfloat16(builder, source, dtype):
    """Round to the nearest: the interpreter cuts bits off."""
    if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
        rounded = torch.from_numpy(source.data).to(torch.bfloat16).view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, tl.bfloat16)
    return builder.cast_impl(source, dtype)


def _dot(builder, a, b, *arguments, multiply=interpreter.InterpreterBuilder.create_dot):
    """Multiply what bfloat16 numbers are: the interpreter multiplies their bits, as integers."""
    return multiply(builder, *map(_to_float32, (a, b)), *arguments)


def _to_float32(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    numbers = torch.from_numpy(handle.data).view(torch.bfloat16).float().numpy()
    return interpreter.TensorHandle(numbers, tl.float32)


class _PatchOnce:
    """Patches ``triton.language`` once a launch, where the interpreter does so at every call of a helper."""

    def __init__(self, patch):
        self._patch = patch
        self._patched = None

    def __call__(self, function):
        languages = _languages(function)
        if self._patched is None:
            scope = self._patch(function)
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
    """Which of Triton's modules a function knows by a name."""
    values = function.__globals__.values()
    return {id(value) for value in values if inspect.ismodule(value) and value in (tl, tl.core)}


_np_dtype_of_scalars = functools.cache(interpreter._get_np_dtype)


def _np_dtype(dtype, otherwise=interpreter._get_np_dtype):
    """NumPy's dtype for one of Triton's; of scalars, known once it was asked for."""
    return _np_dtype_of_scalars(dtype) if type(dtype) is tl.dtype else otherwise(dtype)


def _check_no_overflow(semantic, left, right, operator):
    """Nothing: the interpreter makes eight operators of each sum of integers, which no GPU does."""


interpreter.InterpreterBuilder.create_fp_trunc = _to_bfloat16
interpreter.InterpreterBuilder.create_dot = _dot
interpreter._patch_lang = _PatchOnce(interpreter._patch_lang)
interpreter._get_np_dtype = _np_dtype
TritonSemantic.binary_op_sanitize_overflow_impl = _check_no_overflow
