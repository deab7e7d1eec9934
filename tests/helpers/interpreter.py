"""Triton's interpreter with less work of its own: most of the suite's time is spent in it."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

SHAPES_KNOWN = 4096
EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def hasten() -> None:
    """Leave out what the interpreter does again at every call of a device function, with the same results.

    It replaces the builtins of `triton.language` before each such call, most often by themselves, and looks all members
    of four namespaces through for it; it makes a table of all dtypes for each dtype that it looks up; and each value
    gets a shape of its own objects, though few shapes are different. For every sum and product of integers it
    computes with six operations whether it overflows, and then drops the answer: here it is one, and an error.
    """
    if hasattr(interpreter._patch_lang, "__wrapped__"):
        return
    interpreter._patch_lang = _unless_patched(interpreter._patch_lang)
    interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)
    tl.block_type.__init__ = _one_of_a_shape(tl.block_type.__init__)
    tl.tensor.__init__ = _with_the_shape_of_its_type(tl.tensor.__init__)
    TritonSemantic.broadcast_impl_value = _unless_alike(TritonSemantic.broadcast_impl_value)
    TritonSemantic.binary_op_sanitize_overflow_impl = _no_overflow


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


def _one_of_a_shape(init: Callable[..., None]) -> Callable[..., None]:
    known: dict[Any, dict[str, Any]] = {}

    @functools.wraps(init)
    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = str(element_ty), *(n.value if isinstance(n, tl.constexpr) else n for n in shape)
        if key in known:
            vars(self).update(known[key], element_ty=element_ty)
            return
        init(self, element_ty, shape)
        if len(known) < SHAPES_KNOWN:
            known[key] = vars(self).copy()

    return block_type


def _with_the_shape_of_its_type(init: Callable[..., None]) -> Callable[..., None]:
    known: dict[Any, dict[str, Any]] = {}

    @functools.wraps(init)
    def tensor(self: Any, handle: Any, type: Any) -> None:
        key = (*type.shape,) if type.is_block() else ()
        if key in known:
            vars(self).update(known[key], handle=handle, type=type, dtype=type.scalar)
            return
        init(self, handle, type)
        if len(known) < SHAPES_KNOWN:
            known[key] = {name: value for name, value in vars(self).items() if name not in ("handle", "type", "dtype")}

    return tensor


def _unless_alike(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(broadcast)
    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        if lhs.type.is_block() and rhs.type.is_block() and (*lhs.type.shape,) == (*rhs.type.shape,):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    return broadcast_impl_value


def _no_overflow(self: Any, lhs: Any, rhs: Any, binary_op: Callable[..., Any]) -> None:
    if lhs.dtype.int_bitwidth >= 64 or lhs.dtype.is_bool():
        return
    exact = EXACT[binary_op.__name__](lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
    limits = np.iinfo(interpreter._get_np_dtype(lhs.dtype))
    if exact.min() < limits.min or exact.max() > limits.max:
        raise OverflowError(f"{lhs.dtype} overflows in {binary_op.__name__}: {exact.min()} to {exact.max()}")
