"""No source file of the package can run code that a checkpoint brings along.

Pickles, `eval` and its like, and the parts of transformers that import what a config names are not
used anywhere; each of them is shown to be found if it were.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastgen

MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CALLS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    *("torch.load", "torch.jit.load", "torch.package", "torch.hub", "numpy.load"),
    *("os.system", "os.popen", "importlib.util.spec_from_file_location"),
}
WORDS = {
    *("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer"),
    *("trust_remote_code", "allow_pickle"),
}
SOURCES = sorted(Path(fastgen.__file__).parent.rglob("*.py"))


def banned_uses(source: str) -> list[str]:
    """Each banned thing that the source uses, with its line."""
    tree = ast.parse(source)
    names = dict(_imports(tree))
    described = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        for use in _uses(node, names, described):
            found.append(f"line {getattr(node, 'lineno', '?')}: {use}")
    return found


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Local name -> full name of everything that is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                yield (alias.asname, alias.name) if alias.asname else (top, top)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _uses(node: ast.AST, names: dict[str, str], described: set[int]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (a.name for a in node.names if a.name.partition(".")[0] in MODULES)
    elif isinstance(node, ast.ImportFrom):
        full = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name for name in full if name.partition(".")[0] in MODULES)
        yield from (name for name in full if _is_banned(name))
    elif isinstance(node, ast.Name):
        if node.id in CALLS | WORDS:
            yield node.id
    elif isinstance(node, ast.Attribute):
        full_name = _full_name(node, names)
        if node.attr in WORDS or _is_banned(full_name):
            yield full_name
    elif isinstance(node, ast.keyword) and node.arg in WORDS:
        yield str(node.arg)
    elif isinstance(node, ast.Constant) and id(node) not in described:
        yield from _strings(node.value)


def _is_banned(full_name: str) -> bool:
    module, _, last = full_name.rpartition(".")
    return (
        full_name in ATTRIBUTES
        or any(full_name.startswith(f"{name}.") for name in ATTRIBUTES)
        or last in WORDS
        or (module == "builtins" and last in CALLS)
    )


def _full_name(node: ast.AST, names: dict[str, str]) -> str:
    """`np.load` -> "numpy.load"; what hangs on anything but a name begins with "?"."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    return (
        f"{_full_name(node.value, names)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"
    )


def _strings(value: object) -> Iterator[str]:
    """Names that `getattr` or `import_module` could be given; texts that describe do not count."""
    if isinstance(value, str):
        yield from sorted(set(value.split()) & (MODULES | WORDS | {"__import__"}))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_source_uses_nothing_banned(path: Path) -> None:
    assert banned_uses(path.read_text(encoding="utf-8")) == []


def test_sources_are_found() -> None:
    assert {"__init__.py", "checkpoint.py", "tokenizer.py", "in_memory.py"} <= {
        path.name for path in SOURCES
    }


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "import os, marshal",
        "from shelve import open",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "import torch as t\nload = t.load",
        "from torch import load",
        "from torch import load as read",
        "import torch.hub\ntorch.hub.load('x', 'y')",
        "import numpy\nnumpy.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=False)",
        "from numpy import load",
        "eval('1')",
        "run = exec",
        "def f():\n    __import__('os')",
        "import builtins\nbuiltins.eval('1')",
        "from builtins import exec as run",
        "import importlib\nimportlib.import_module('pickle')",
        "import transformers\ntransformers.AutoModel.from_pretrained('x')",
        "from transformers import AutoConfig",
        "from transformers import AutoTokenizer as T",
        "import transformers\ngetattr(transformers, 'AutoModel')",
        "NAMES = 'GPT2Tokenizer AutoTokenizer'.split()",
        "open_model('x', trust_remote_code=True)",
        "open_model('x', **{'trust_remote_code': True})",
        "import os\nos.system('x')",
    ],
)
def test_banned_use_is_found(source: str) -> None:
    assert banned_uses(source)


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    '''Never torch.load, eval or pickle; no AutoModel.'''",
        "model.eval()",
        "import json\njson.load(file)",
        "import numpy as np\nnp.loadtxt('x')",
        "import re\nre.compile('x')",
        "self.load(key)",
    ],
)
def test_harmless_use_is_let_through(source: str) -> None:
    assert banned_uses(source) == []
