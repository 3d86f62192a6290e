"""Triton's interpreter as these tests need it: rounding to bfloat16 as GPUs do, and in half the time."""

import inspect

import torch
from triton import language as tl
from triton.runtime import interpreter


def _to_bfloat16(builder, source, dtype):
    """Round to the nearest: the interpreter cuts bits off."""
    if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
        rounded = torch.from_numpy(source.data).to(torch.bfloat16).view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, tl.bfloat16)
    return builder.cast_impl(source, dtype)


class _PatchOnce:
    """Patches ``triton.language`` once a launch, where the interpreter does so at every call of a helper."""

    def __init__(self, patch):
        self._patch = patch
        self._patched = None

    def __call__(self, function):
        languages = {
            id(value)
            for value in function.__globals__.values()
            if inspect.ismodule(value) and value in (tl, tl.core)
        }
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


interpreter.InterpreterBuilder.create_fp_trunc = _to_bfloat16
interpreter._patch_lang = _PatchOnce(interpreter._patch_lang)
