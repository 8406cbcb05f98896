"""Triton's interpreter, made several times as fast; what it computes stays as it is.

Before each kernel, and before each call of a function within one, the interpreter looks for
builtins in triton.language and patches them. Here that happens once for each module, and for good.
It also computes sums and products of integers a second time, in 64 bits, to compare them with
bounds, and drops the result unless it debugs; and it makes types and shapes anew for each value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import prod
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle

OWN_SORT = tl.sort
_seen: set[str] = set()  # modules whose functions have been called within kernels
_patch_lang = interpreter._patch_lang
_numpy_dtype = interpreter._get_np_dtype
_make_block_type = tl.core.block_type.__init__
_numpy_dtypes: dict[str, Any] = {}  # by the name of Triton's
_block_types: dict[tuple[Any, ...], dict[str, Any]] = {}  # attributes, by element and shape


def _patch_once(function: Any) -> Any:
    """What its module sees of the language; other modules, at their first call."""
    module = function.__module__
    if module not in _seen:
        _seen.add(module)
        _patch_lang(function)
    return interpreter._LangPatchScope()  # nothing is to be restored


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A function within a kernel."""
    _patch_once(self.fn)
    return self.rewrite()(*args, **kwargs)


def _patch_attr(owner: Any, name: str, member: Callable[..., Any], _: Any, scope: Any) -> None:
    """A builtin is told how values are computed, whatever its caller says of that."""
    builtin: Any = getattr(member, "__wrapped__", member)  # without the check that it was told

    def told(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = interpreter.interpreter_semantic
        return builtin(*args, **kwargs)

    scope.set_attr(owner, name, told)


def _numpy_dtype_of(dtype: Any) -> Any:
    found = _numpy_dtypes.get(dtype.name)
    if found is None:
        found = _numpy_dtypes[dtype.name] = _numpy_dtype(dtype)
    return found


def _init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    key = (element_ty.name, *shape)
    if key not in _block_types:
        _make_block_type(self, element_ty, shape)
        _block_types[key] = vars(self).copy()
    vars(self).update(_block_types[key])


@cache
def _sizes(shape: tuple[int, ...]) -> tuple[Any, Any]:
    """As a tensor has them: its shape, and the number of its elements."""
    return tl.core.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(prod(shape))


def _init_tensor(self: Any, handle: Any, kind: Any) -> None:
    self.handle, self.type, self.dtype = handle, kind, kind.scalar
    self.shape, self.numel = _sizes(tuple(kind.shape) if kind.is_block() else ())


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
    builder: Any = interpreter.interpreter_builder
    assert not builder.options.debug  # else what does not fit into an integer is an error
    builder.options = replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang = _patch_once
    interpreter._patch_attr = _patch_attr
    interpreter._get_np_dtype = _numpy_dtype_of
    InterpretedFunction.__call__ = _call
    tl.core.block_type.__init__ = _init_block_type
    tl.core.tensor.__init__ = _init_tensor
    tl.sort = _numpy_sort  # it takes two seconds for Triton's own sort of 1,024 values
