"""What tests themselves keep to: they wait for conditions, leave no thread that keeps them from
ending, look inside in few named places, and import helpers, never each other.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILES = sorted(TESTS.rglob("*.py"))
MODULES = [path for path in FILES if path.parent.name != "helpers"]

# Where time passes on purpose: the function, and why it sleeps. `sleep(0)`, which only lets others
# go on, is free to all.
SLEEPS = {
    "helpers/waits.py wait_until": "it asks again",
    "helpers/waits.py wait_in_loop_until": "it asks again",
    "helpers/server_load.py answer_of": "a caller that leaves before it has an answer",
    "server/test_bounds.py replies_to": "a reader that is slow",
    "server/test_clients.py test_clients_that_write_a_byte_now_and_then_are_cut_off": "a writer"
    " that is slow",
    "server/test_faults.py Scene": "the delay is the fault",
    "frontends/test_faults.py Scene": "the delay is the fault",
    "frontends/test_threaded_engine.py test_a_request_that_comes_while_the_engine_breaks_is_told": (
        "a chance for what must not happen"
    ),
    "frontends/test_threaded_engine.py test_a_row_that_another_thread_is_about_to_queue_is_work": (
        "a chance for what must not happen"
    ),
    "text/test_tokenizer.py test_other_threads_run_while_a_text_is_encoded": "it counts ticks",
    "bench/test_open_loop.py test_times_count_from_when_a_request_was_due": "a server that is slow",
}

# The private names that a test module reaches for, and why no public fact and no helper tells it.
PRIVATE = {
    "bench/test_compare.py": ("_process", "a peer's process, which is killed and interrupted"),
    "bench/test_peaks.py": ("_SECONDS _TRIED_BYTES _TRIED_ROUNDS", "sizes, made small"),
    "decoders/test_cuda_decoder.py": (
        "_attended _hidden _inner _model _normed _query _sampler _slots", "bytes held, counted",
    ),
    "decoders/test_select.py": ("_has_gpu", "a machine with a GPU"),
    "engine/test_drafts.py": ("_closed _draw _rows _sources", "what of a row is kept; a close"),
    "engine/test_queue.py": ("_heap", "the weight of rows that have left"),
    "hf/test_assisted.py": ("_packed", "whose engine has drafted"),
    "hf/test_checksums.py": ("_CHUNK", "a size, made small"),
    "hf/test_class.py": (
        "_attn_implementation _auto_class _extra_content _from_config _init_weights _model_mapping",
        "names of transformers'",
    ),
    "hf/test_notices.py": ("_has_gpu", "a machine with a GPU"),
    "hf/test_options.py": ("_PROCESSORS", "the classes that are read, and their order"),
    "hf/test_weights.py": (
        "_attn_implementation _fastgen _init_weights _packed _version",
        "names of transformers', and a twin's own weights",
    ),
    "project/test_cli.py": ("_parser", "flags without a process for each"),
    "project/test_imports.py": ("_MODULES", "the table of exports"),
    "sampling/test_definition.py": ("_pick _tensor _uniforms", "the torch sampler's parts"),
}  # fmt: skip
THREADS = {"threading.Thread", "threading.Timer", "Thread", "Timer"}
NAMEDTUPLE = {"_asdict", "_fields", "_make", "_replace"}  # public, in spite of their names


def name_of(path: Path) -> str:
    return path.relative_to(TESTS).as_posix()


def sleeps_in(source: str) -> set[str]:
    """The functions, methods by their class, that sleep for a time."""
    return {
        getattr(outer, "name", "<module>")
        for outer in ast.parse(source).body
        for node in ast.walk(outer)
        if isinstance(node, ast.Call) and _is_sleep(node.func)
        if not (isinstance(node.args[0], ast.Constant) and node.args[0].value == 0)
    }


def _is_sleep(function: ast.expr) -> bool:
    return getattr(function, "attr", getattr(function, "id", "")) == "sleep"


def lasting_threads(source: str) -> set[str]:
    """Those that are no daemons: one that hangs keeps a process whose test has failed. Also in the
    programs that tests give to other processes.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in THREADS:
            if not any(ast.unparse(keyword) == "daemon=True" for keyword in node.keywords):
                found.add(ast.unparse(node))
        elif isinstance(node, ast.Constant) and re.search(r"\b(Thread|Timer)\(", str(node.value)):
            with suppress(SyntaxError):  # a text that is no program
                found |= lasting_threads(str(node.value))
    return found


def private_in(source: str) -> set[str]:
    """The private names of others that it reads, imports or replaces."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        found.update(_names_in(node))
    return {name for name in found if name.startswith("_") and not name.endswith("__")} - NAMEDTUPLE


def _names_in(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
        yield node.attr
    elif isinstance(node, ast.ImportFrom):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.Call) and "setattr" in ast.unparse(node.func):
        yield from (
            part.value
            for part in node.args
            if isinstance(part, ast.Constant) and isinstance(part.value, str)
        )


def imports_of_tests(source: str) -> set[str]:
    """The test modules that it imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {
        name
        for name in names
        if any(part == "tests" or part.startswith("test_") for part in name.split("."))
    }


def test_time_passes_only_where_it_is_the_point() -> None:
    found = {f"{name_of(path)} {name}" for path in FILES for name in sleeps_in(path.read_text())}
    assert found == SLEEPS.keys()


@pytest.mark.parametrize("path", [p for p in FILES if p != Path(__file__)], ids=name_of)
def test_no_thread_keeps_a_test_from_ending(path: Path) -> None:
    assert lasting_threads(path.read_text()) == set()


def test_what_is_private_is_reached_for_in_few_places() -> None:
    found = defaultdict(set)
    for path in MODULES:
        if names := private_in(path.read_text()):
            found[name_of(path)] = names
    assert found == {name: set(names.split()) for name, (names, _) in PRIVATE.items()}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_test_module_is_imported(path: Path) -> None:
    """What two of them need stands in helpers/."""
    assert imports_of_tests(path.read_text()) == set()


def test_the_readme_names_every_helper() -> None:
    text = (TESTS / "README.md").read_text()
    assert len(text.splitlines()) <= 40
    for path in (TESTS / "helpers").glob("*.py"):
        assert f"`{path.stem}`" in text, path.name


@pytest.mark.parametrize(
    ("rule", "source", "found"),
    [
        (sleeps_in, "def f():\n    time.sleep(0.1)", {"f"}),
        (sleeps_in, "class A:\n    async def f():\n        await asyncio.sleep(x)", {"A"}),
        (sleeps_in, "from time import sleep\nsleep(1)", {"<module>"}),
        (sleeps_in, "async def f():\n    await asyncio.sleep(0)", set()),
        (lasting_threads, "threading.Thread(target=f)", {"threading.Thread(target=f)"}),
        (lasting_threads, "x = '''\nThread()\n'''", {"Thread()"}),
        (lasting_threads, "Thread(target=f, daemon=True)\n'a Thread('", set()),
        (private_in, "engine._scheduler.pool", {"_scheduler"}),
        (private_in, "from fastgen.cli import _parser", {"_parser"}),
        (private_in, "patch.setattr(engine, '_inbox', None)", {"_inbox"}),
        (private_in, "self._own, draw._replace(ok=True), x.__dict__", set()),
        (imports_of_tests, "from test_codec import x", {"test_codec.x"}),
        (imports_of_tests, "import tests.text.test_tokenizer", {"tests.text.test_tokenizer"}),
        (imports_of_tests, "from text_parts import tokenizer_of", set()),
    ],
)
def test_breaches_are_found(rule: Callable[[str], set[str]], source: str, found: set[str]) -> None:
    assert rule(source) == found
