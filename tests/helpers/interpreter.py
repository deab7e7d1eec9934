"""Triton's interpreter with less work of its own: most of the suite's time is spent in it."""

import functools
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def hasten() -> None:
    """Leave out what the interpreter does again at every call of a device function, with the same results.

    It replaces the builtins of `triton.language` before each such call, most often by themselves, and looks all members
    of four namespaces through for it; and it makes a table of all dtypes for each dtype that it looks up.
    """
    if hasattr(interpreter._patch_lang, "__wrapped__"):
        return
    interpreter._patch_lang = _unless_patched(interpreter._patch_lang)
    interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)


def _unless_patched(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(patch)
    def patch_lang(fn: Any) -> Any:
        names = [lang.load for lang in fn.__globals__.values() if lang is tl or lang is tl.core]
        if names and not any(map(tl.core.is_builtin, [*names, tl.tensor.to])):
            return interpreter._LangPatchScope()  # within a kernel, whose end restores all of it
        return patch(fn)

    return patch_lang


def _remembered(find: Callable[[Any], Any]) -> Callable[[Any], Any]:
    known: dict[str, Any] = {}

    @functools.wraps(find)
    def get_np_dtype(dtype: Any) -> Any:
        if type(dtype) is not tl.dtype:  # pointers and blocks
            return find(dtype)
        if dtype.name not in known:
            known[dtype.name] = find(dtype)
        return known[dtype.name]

    return get_np_dtype
