"""Triton's interpreter, made two to three times as fast; what it computes stays as it is.

Before each kernel, and before each call of a function within one, the interpreter looks for
builtins in triton.language and patches them. That takes most of its time. The builtins are always
the same, and within a kernel they are patched already.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle

OWN_SORT = tl.sort
_seen: set[str] = set()  # modules whose functions have been called within kernels


@cache
def _builtins_of(package: Any) -> list[tuple[str, Any]]:
    return [pair for pair in inspect.getmembers(package) if tl.core.is_builtin(pair[1])]


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    for name, member in _builtins_of(package):
        if getattr(package, name) is member:
            interpreter._patch_attr(package, name, member, builder, scope)


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A function within a kernel, which has patched what its own module sees of the language.

    What other modules see besides (tl.core) is patched at their first call, and stays so.
    """
    module = self.fn.__module__
    if module not in _seen:
        _seen.add(module)
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


def _numpy_sort(x: Any, descending: bool) -> Any:
    values = np.sort(x.handle.data)[::-1] if descending else np.sort(x.handle.data)
    return tl.core.tensor(TensorHandle(values.copy(), x.handle.dtype), x.type)


def dot_in_order(self: Any, a: Any, b: Any, sums: Any, *_: Any) -> TensorHandle:
    """As create_dot, step by step: NumPy's matrix product gives equal rows different bits at
    different places, on some processors.
    """
    product = np.zeros_like(sums.data)
    left, right = a.data.astype(product.dtype), b.data.astype(product.dtype)
    for at in range(left.shape[-1]):
        product += left[..., at : at + 1] * right[..., at : at + 1, :]
    return TensorHandle(product + sums.data, sums.dtype.scalar)


def speed_up() -> None:
    interpreter._patch_builtin = _patch_builtin
    InterpretedFunction.__call__ = _call
    tl.sort = _numpy_sort  # it takes two seconds for Triton's own sort of 1,024 values
