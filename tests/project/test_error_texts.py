"""No code of the package decides anything by the words of an error: they may be worded freely.

Classes, codes and options are there for that. Each way of looking into a message is shown to be
found.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastgen

SOURCES = sorted(Path(fastgen.__file__).parent.rglob("*.py"))
ERRORS = {"error", "err", "exc", "exception", "cause", "failure", "caught"}
TEXTS = {"message", "problem"}  # names of variables and attributes that hold an error's words
TO_TEXT = {"str", "repr", "format", "message_of", "shown"}
LOOKS = {
    *("startswith", "endswith", "find", "rfind", "index", "rindex", "count", "replace"),
    *("removeprefix", "removesuffix", "partition", "rpartition", "split", "rsplit"),
    *("lower", "upper", "casefold", "strip", "lstrip", "rstrip", "translate"),
}
BY_VALUE = (ast.Eq, ast.NotEq, ast.In, ast.NotIn)
PATTERNS = {"match", "search", "fullmatch", "findall", "finditer", "sub", "subn", "split"}

ALLOWED = {"refused != self._refused"}  # a reason is told anew if it is not the one told before


class Finder:
    """Where a source looks into the words of an error."""

    def __init__(self, source: str) -> None:
        self._tree = ast.parse(source)
        handlers = (n for n in ast.walk(self._tree) if isinstance(n, ast.ExceptHandler))
        self._errors = ERRORS | {handler.name for handler in handlers if handler.name}
        self._texts = set(TEXTS)
        for node in ast.walk(self._tree):  # names that are given an error's words
            value = getattr(node, "value", None)
            if isinstance(node, (ast.Assign, ast.NamedExpr, ast.AnnAssign)) and value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if self._is_text(value):
                    self._texts |= {t.id for t in targets if isinstance(t, ast.Name)}

    def found(self) -> list[str]:
        return [
            f"line {node.lineno}: {ast.unparse(node)[:80]}"
            for node in ast.walk(self._tree)
            if isinstance(node, (ast.expr, ast.Match)) and self._looks(node)
            if ast.unparse(node) not in ALLOWED
        ]

    def _looks(self, node: ast.expr | ast.stmt) -> bool:
        if isinstance(node, ast.Compare):
            by_value = any(isinstance(operator, BY_VALUE) for operator in node.ops)
            return by_value and any(map(self._is_text, [node.left, *node.comparators]))
        if isinstance(node, ast.Match):
            return self._is_text(node.subject)
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            return False
        if node.func.attr in LOOKS and self._is_text(node.func.value):
            return True
        return node.func.attr in PATTERNS and any(map(self._is_text, node.args))

    def _is_text(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Name):
            return node.id in self._texts
        if isinstance(node, ast.Attribute):  # a completion's error is its message
            return node.attr in TEXTS or node.attr == "error" or self._is_args(node)
        if isinstance(node, ast.Subscript):  # but a name in an ASGI message is no word of one
            is_name = isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str)
            return not is_name and self._is_text(node.value)
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                return node.func.id in TO_TEXT and any(map(self._is_error, node.args))
            return isinstance(node.func, ast.Attribute) and self._is_text(node.func.value)
        if isinstance(node, ast.JoinedStr):
            return any(self._is_error(part) for part in _formatted(node))
        return isinstance(node, ast.BoolOp) and any(map(self._is_text, node.values))

    def _is_args(self, node: ast.Attribute) -> bool:
        return node.attr == "args" and self._is_error(node.value)

    def _is_error(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Attribute):
            return node.attr in {"error", "value", "__cause__", "__context__"}
        return isinstance(node, ast.Name) and node.id in self._errors


def _formatted(node: ast.JoinedStr) -> Iterator[ast.expr]:
    return (part.value for part in node.values if isinstance(part, ast.FormattedValue))


@pytest.mark.parametrize(
    "source",
    [
        "str(error) == 'closed'",
        "if 'closed' in str(error): pass",
        "str(error).startswith('this engine')",
        "str(error).lower() == 'closed'",
        "message.startswith(('this engine', 'this model'))",
        "message == str(NothingToDrawError())",
        "message.split(':')[0] == 'closed'",
        "re.match('unknown option', message)",
        "_UNKNOWN.match(str(error))",
        "re.search('x', error.args[0])",
        "error.args[0].endswith('closed')",
        "completion.error == 'closed'",
        "(completion.error or '').startswith('closed')",
        "f'{error}'.find('closed')",
        "repr(error).count('x')",
        "message_of(row.error) == 'closed'",
        "why = str(error)\nif why == 'closed': pass",
        "try: f()\nexcept OSError as problem_of_file:\n    str(problem_of_file).index('x')",
        "match str(error):\n    case 'closed': pass",
        "_ABOUT.sub('', error.problem)",
    ],
)
def test_looking_into_a_message_is_found(source: str) -> None:
    assert Finder(source).found()


@pytest.mark.parametrize(
    "source",
    [
        "raise EngineError(f'generation failed: {error}') from error",
        "if completion.error is not None: pass",
        "error.code == 'closed'",
        "isinstance(error, EngineClosedError)",
        "error.name not in ('torch', 'transformers')",
        "told = message_of(error)[:500]",
        "if len(message) > 1000: message = message[:1000] + '...'",
        "NAMES.get(error.option, error.option) == error.option",
        "line.startswith('model name')",
        "message['type'] == 'http.disconnect'",
        "error is request.error",
    ],
)
def test_saying_a_message_is_not(source: str) -> None:
    assert Finder(source).found() == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_module_looks_into_messages(path: Path) -> None:
    assert Finder(path.read_text()).found() == []
