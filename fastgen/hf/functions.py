"""Whether the functions that transformers' forward and loops run are those of its own files.

A name counts if one of these functions reads it: what `forward` reads, what that reads, and so on,
in the classes and modules below. Each has to be what it was when this module was imported, and to
come from the files of transformers or PyTorch. What is set under another name, nothing reads.

Not compared: the methods of tensors, and of PyTorch's operators those that are neither in `torch`
nor in `torch.nn.functional`.
"""

from __future__ import annotations

import operator
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
import transformers
from torch import nn
from transformers import activations, cache_utils, masking_utils, modeling_layers, modeling_utils
from transformers.generation import logits_process as processors
from transformers.generation import stopping_criteria as criteria
from transformers.generation import utils as loops
from transformers.models.gpt2 import modeling_gpt2
from transformers.pytorch_utils import Conv1D
from transformers.utils import generic, output_capturing

Owner = Any  # a class or a module
_ABSENT = object()
_REMEMBERED = "_cached_value"  # how names end that transformers adds to classes

# How Python calls methods without naming them.
_PROTOCOLS = (
    *("__call__", "__getattr__", "__getattribute__", "__getitem__", "__iter__", "__len__"),
    *("__bool__", "__contains__", "__eq__", "__hash__"),
)
LAYERS = (
    *(modeling_gpt2.GPT2Model, modeling_gpt2.GPT2Block, modeling_gpt2.GPT2Attention),
    *(modeling_gpt2.GPT2MLP, Conv1D),
    *(nn.Embedding, nn.Linear, nn.LayerNorm, nn.Dropout, nn.ModuleList),
)
# By the name in a config: all that fastgen's decoders know.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu_new": activations.NewGELUActivation,
    "gelu_pytorch_tanh": activations.GELUTanh,
    "gelu_fast": activations.FastGELUActivation,
    "gelu": activations.GELUActivation,
    "gelu_python": activations.GELUActivation,
    "quick_gelu": activations.QuickGELUActivation,
    "relu": nn.ReLU,
    "silu": activations.SiLUActivation,
    "swish": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
# The kinds of attention that all compute the same; others may have been registered.
ATTENTION = (
    *(None, "eager", "sdpa", "flex_attention"),
    *("flash_attention_2", "flash_attention_3", "flash_attention_4"),
)
_REGISTRIES = (modeling_utils.ALL_ATTENTION_FUNCTIONS, masking_utils.ALL_MASK_ATTENTION_FUNCTIONS)
_REGISTERED = {kind: [registry.get(kind) for registry in _REGISTRIES] for kind in ATTENTION}

_MADE = (cache_utils.DynamicCache, cache_utils.DynamicLayer)  # in a forward
_FORWARD = (
    *(modeling_gpt2.GPT2LMHeadModel, *LAYERS, *ACTIVATIONS.values(), *map(type, _REGISTRIES)),
    *_MADE,
)
_TABLES = [
    kind
    for module in (processors, criteria, loops)
    for kind in vars(module).values()
    if isinstance(kind, type) and kind.__module__ == module.__name__ and not is_dataclass(kind)
]
_MODULES = (
    *(modeling_gpt2, modeling_layers, modeling_utils, masking_utils, generic, output_capturing),
    *(nn, nn.functional, torch),
)


class Functions:
    """What some functions read, in some classes (and their bases) and modules. Thread-safe.

    Attributes:
        read: the names.
        codes: the code of the functions among them.
    """

    def __init__(
        self, classes: Iterable[type], modules: Iterable[ModuleType], roots: Iterable[str]
    ) -> None:
        bases = [base for kind in classes for base in kind.__mro__ if _is_own_class(base)]
        homes = [sys.modules[kind.__module__] for kind in classes]
        owners = list(dict.fromkeys([*bases, *homes, *modules]))
        read = _closure(owners, [*_PROTOCOLS, *roots])
        self.read = frozenset(name for name in read if not name.endswith(_REMEMBERED))
        made = {base for kind in _MADE for base in kind.__mro__}
        self._namespaces = [
            _Namespace(owner, self.read | {"__init__"} if owner in made else self.read)
            for owner in owners
        ]
        self._functions = [f for namespace in self._namespaces for f in namespace.functions]
        self._codes = [function.__code__ for function in self._functions]
        self.codes = frozenset(self._codes)

    def why_not(self) -> str:
        """The first name that is not transformers' or PyTorch's own now; "" if all are."""
        for namespace in self._namespaces:
            if not namespace.is_as_seen() and (reason := namespace.why_not()):
                return reason
        codes = [function.__code__ for function in self._functions]
        if codes == self._codes:
            return ""
        pairs = zip(self._functions, self._codes, strict=True)
        changed = [function.__qualname__ for function, code in pairs if function.__code__ != code]
        return f"{changed[0]} has other code than its own"


class _Namespace:
    """The names of a class or module. Names are looked at one by one only after one has changed.

    Of a class, added names count too: a property comes before what an instance has.
    """

    def __init__(self, owner: Owner, read: frozenset[str]) -> None:
        self._owner, self._read = owner, read
        self._first = {name: value for name, value in vars(owner).items() if name in read}
        self._foreign = {name for name, value in self._first.items() if not _is_own(value)}
        self._is_class = isinstance(owner, type)
        self._values = operator.itemgetter(*self._first, "__name__")
        self._seen: Any = None

    @property
    def functions(self) -> list[FunctionType]:
        return [f for value in self._first.values() for f in _functions_in(value)]

    def is_as_seen(self) -> bool:
        own = vars(self._owner)
        if self._is_class:
            return bool(own == self._seen)  # by identity, and in C
        try:
            return bool(self._values(own) == self._seen)
        except KeyError:
            return False

    def why_not(self) -> str:
        now = dict(vars(self._owner))
        added = now.keys() & self._read if self._is_class else ()
        for name in sorted(self._first.keys() | added):
            if not self._is_first(name, now.get(name, _ABSENT)):
                return f"{self._owner.__name__}.{name} is not the library's own"
        self._seen = now if self._is_class else self._values(now)
        return ""

    def _is_first(self, name: str, value: Any) -> bool:
        if name in self._foreign:  # replaced before the import; it may have been put back
            return _is_own(value) and getattr(value, "__name__", None) == name
        return value is self._first.get(name, _ABSENT)


def _closure(owners: list[Owner], roots: Iterable[str]) -> frozenset[str]:
    """The roots, and all names that functions with such a name read."""
    read: set[str] = set()
    new = set(roots)
    while new:
        read |= new
        new = {
            word
            for owner in owners
            for name in new & vars(owner).keys()
            for function in _functions_in(vars(owner)[name])
            for word in _words(function.__code__)
        } - read
    return frozenset(read)


def _words(code: CodeType) -> Iterator[str]:
    """Names that code reads, and texts that may be names, for `getattr`."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _words(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            yield constant


def _functions_in(value: Any) -> Iterator[FunctionType]:
    """The Python functions of an entry of a namespace, with those that they wrap."""
    if isinstance(value, property):
        for accessor in (value.fget, value.fset, value.fdel):
            yield from _functions_in(accessor)
    elif isinstance(value, (classmethod, staticmethod)):
        yield from _functions_in(value.__func__)
    elif isinstance(value, FunctionType):
        yield value
        yield from _functions_in(getattr(value, "__wrapped__", None))


def _folder(module: ModuleType) -> str:
    return os.path.join(os.path.dirname(os.path.abspath(str(module.__file__))), "")


_OWN_FOLDERS = (_folder(transformers), _folder(torch))
_STANDARD = os.path.join(sysconfig.get_paths()["stdlib"], "")
_INSTALLED = tuple(sysconfig.get_paths()[key] for key in ("purelib", "platlib"))


def _is_own(value: Any) -> bool:
    """Whether functions come from the files of transformers, PyTorch or Python. Of other values it
    is only seen that they are replaced."""
    return all(_is_own_file(function.__code__.co_filename) for function in _functions_in(value))


def _is_own_file(name: str) -> bool:
    file = os.path.abspath(name)
    if file.startswith(_OWN_FOLDERS):
        return True
    return file.startswith(_STANDARD) and not file.startswith(_INSTALLED)


def _is_own_class(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("transformers", "torch")


def why_not_registered(kind: Any) -> str:
    """Why the functions of this kind of attention are not transformers' own; "" if they are."""
    if kind not in _REGISTERED:
        return f"its attention is {kind!r}"
    for registry, first in zip(_REGISTRIES, _REGISTERED[kind], strict=True):
        if registry.get(kind) is not first or not _is_own(first):
            return f"the attention functions of {kind!r} are not transformers' own"
    return ""


_ROOTS = {
    function.__name__: sys.modules[function.__module__]
    for registered in _REGISTERED.values()
    for function in registered
    if function is not None
}
FORWARD = Functions(
    _FORWARD, (*_MODULES, *_ROOTS.values()), ("forward", "get_layer_types_and_kwargs", *_ROOTS)
)
LOOPS = Functions(
    (modeling_gpt2.GPT2LMHeadModel, *_TABLES, *_MADE),
    (loops, processors, criteria, nn.functional, torch),
    ("_sample", "_beam_search", "_assisted_decoding", "_prefill"),
)
