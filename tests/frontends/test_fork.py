"""Processes: forked before, after and between uses of a model, spawned, and under gunicorn.

A forked child shares its parent's weights and has threads of its own.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import fastgen
import processes
from cpu_decoders import plan_of
from fastgen.frontends.generator import find_tokenizer
from fastgen.native import native
from tiny_checkpoints import run_python
from waits import WITHIN, wait_until

TESTS = Path(__file__).parents[1] / "helpers"
ROOT = Path(__file__).parents[2]

PROMPT = "And it came to pass"
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 20}
NUM_WORKERS = 4

pytestmark = [
    pytest.mark.skipif(native is None, reason="the C++ extension is not built"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
]

# More threads than cores are granted, so that there are some to lose in a fork.
_MODEL = """
import os, sys, threading
sys.path.insert(0, sys.argv[1])
from cpu_decoders import plan_of
from forked import in_child
from waits import wait_until
from fastgen.errors import ForkedEngineError
from fastgen.frontends.generator import Generator, find_tokenizer

def load():
    checkpoint, plan = plan_of(None, sys.argv[3], num_threads=3)
    return Generator(checkpoint, find_tokenizer(checkpoint), plan)

def text(model):
    return model("And it came to pass", temperature=0, max_new_tokens=20)

def refused(why, call, *given, **options):
    try:
        call(*given, **options)
    except ForkedEngineError as error:
        assert why in str(error), error
        return True
"""
STORIES = {
    "before a load": """
in_child(lambda: text(load()))
assert text(load()) == sys.argv[2]
""",
    "after a load": """
model = load()
in_child(lambda: text(model))
assert text(model) == sys.argv[2]
in_child(lambda: text(model))
""",
    "after use": """
model = load()
assert text(model) == sys.argv[2]
for _ in range(3):
    in_child(lambda: text(model))
    assert text(model) == sys.argv[2]
""",
    "between the tokens of a stream": """
model = load()
pieces = model.stream("And it came to pass", temperature=0, max_new_tokens=20)
begun = "".join(str(next(pieces)) for _ in range(5))
in_child(lambda: begun + "".join(map(str, pieces)))
in_child(lambda: text(model))
assert begun + "".join(map(str, pieces)) == sys.argv[2]
""",
    "of a child's child": """
model = load()
text(model)
def with_a_child_of_its_own():
    in_child(lambda: text(model))
    return text(model)
in_child(with_a_child_of_its_own)
assert text(model) == sys.argv[2]
""",
    "of a child that closes and loads": """
model = load()
text(model)
def again():
    model.close()
    return text(load())
in_child(again)
assert text(model) == sys.argv[2]
""",
    "of a child that ends as Python does": """
model = load()
text(model)
pid = os.fork()
same = text(model) == sys.argv[2]
if pid == 0:
    sys.exit(0 if same else 3)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 and same
""",
    "while another thread draws a progress bar": """
from tqdm import tqdm
model = load()
held, done = threading.Event(), threading.Event()
def draw():
    with tqdm.get_lock():
        held.set()
        done.wait()
thread = threading.Thread(target=draw, daemon=True)
thread.start()
held.wait()
try:
    in_child(lambda: text(model))
finally:
    done.set()
    thread.join()
""",
    "while other threads generate": """
model = load()
stop = threading.Event()
def work():
    own = load()
    while not stop.is_set():
        text(own)
threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(20):
    in_child(lambda: text(model))
stop.set()
for thread in threads:
    thread.join()
assert text(model) == sys.argv[2]
""",
    "while other threads use the same model": """
model = load()
stop = threading.Event()
def work():
    while not stop.is_set():
        model.generate("The king", n=2, max_new_tokens=100, ignore_eos=True)
def alone():
    texts = [text(model), text(model)]
    assert model.engine.num_unfinished == 0, "what the parent's threads wait for has ended"
    model.close()
    return texts[0] if texts[0] == texts[1] else None
threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(20):
    steps = model.engine.stats.steps
    wait_until(lambda: model.engine.stats.steps > steps)
    in_child(alone)
pieces = model.stream("And it came to pass", temperature=0, max_new_tokens=20)
begun = str(next(pieces))
in_child(lambda: begun + "".join(map(str, pieces)))
assert begun + "".join(map(str, pieces)) == sys.argv[2]
stop.set()
for thread in threads:
    thread.join()
assert text(model) == sys.argv[2]
""",
    "of several threads at once, with several models": """
models = [load(), load()]
failed = []
def work(mine, other):
    try:
        for _ in range(5):
            text(mine)
            in_child(lambda: text(other))
    except BaseException as error:
        failed.append(error)
pairs = (models, models[::-1]) * 2
threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in pairs]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failed, failed
""",
    "from within a step": """
model = load()
def forks(ids, scores):
    in_child(lambda: sys.argv[2])
    return scores
[generation] = model.generate("a", max_new_tokens=3, ignore_eos=True, logits_processor=forks)
assert generation.completions[0].finish_reason == "length", generation
assert text(model) == sys.argv[2]
""",
    "while a step does not end": """
from fastgen.engine import forks
forks.longest_wait = 0.05
model, other = load(), load()
entered, done = threading.Event(), threading.Event()
def waits(ids, scores):
    entered.set()
    done.wait()
    return scores
def all_refused():
    why = "another thread's step had not ended"
    mine = [refused(why, text, model), refused(why, list, pieces), refused(why, model.warmup),
            refused(why, model.score, "And it came")]
    pieces.close()
    model.close()
    return text(other) if all(mine) else mine
pieces = model.stream("a")
next(pieces)
thread = threading.Thread(daemon=True, target=lambda: model.generate("a", logits_processor=waits))
thread.start()
entered.wait()
in_child(all_refused)
done.set()
thread.join()
in_child(lambda: text(model))
""",
    "with a torch decoder": """
import fastgen
model = fastgen.load(decoder="torch")
wanted, pieces = text(model), model.stream("a", max_new_tokens=9, ignore_eos=True)
next(pieces)
def all_refused():
    why = "its decoder's threads or device are those of the process"
    mine = [refused(why, text, model), refused(why, list, pieces), refused(why, model.warmup),
            refused(why, model.score, "And it came")]
    pieces.close()
    model.close()
    in_child(lambda: text(load()))
    return text(load()) if all(mine) else mine
in_child(all_refused)
assert len(list(pieces)) == 8 and text(model) == wanted
""",
    "with an engine on a thread": """
import asyncio
import fastgen
from fastgen.frontends.fair_lock import FairLock
GREEDY = {"temperature": 0, "max_new_tokens": 20}
config = fastgen.QueueConfig(fair_lock=FairLock())
model = load()
def all_refused():
    why = "the process that this one was forked from"
    mine = [refused(why, engine.submit, "a"), refused(why, next, pieces),
            refused(why, future.result), refused(why, engine.score, "a"),
            refused(why, late.generate("a" * 9999).send, None),
            refused(why, late.stream("a").__anext__().send, None)]
    assert not engine.ready and engine.drain()
    pieces.close()
    engine.close()
    with fastgen.ThreadedEngine(model, config) as own:
        told = own.submit("And it came to pass", **GREEDY).result().text
    return told if all(mine) else mine
engine, late = fastgen.ThreadedEngine(model, config), fastgen.AsyncEngine(model, config)
for _ in range(5):
    future = engine.submit("The king", max_new_tokens=200, ignore_eos=True)
    pieces = engine.stream("The king", max_new_tokens=200, ignore_eos=True)
    num_read = len(next(pieces).token_ids)
    in_child(all_refused)
    assert len(future.result().completions[0].token_ids) == 200
    assert num_read + sum(len(piece.token_ids) for piece in pieces) == 200
assert engine.submit("And it came to pass", **GREEDY).result().text == sys.argv[2]
engine.close()
asyncio.run(late.close())
""",
}


@pytest.fixture(scope="module")
def wanted() -> str:
    with fastgen.load(decoder="cpu") as model:
        return str(model(PROMPT, **GREEDY))


@pytest.mark.parametrize("story", STORIES)
def test_a_fork(story: str, wanted: str) -> None:
    run_python(_MODEL + STORIES[story], TESTS, wanted, "float16_weights")


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16", "int8"])
def test_a_fork_after_use(arithmetic: str) -> None:
    checkpoint, plan = plan_of(None, arithmetic)
    with fastgen.Generator(checkpoint, find_tokenizer(checkpoint), plan) as model:
        wanted = model(PROMPT, **GREEDY)
    run_python(_MODEL + STORIES["after use"], TESTS, wanted, arithmetic)


_POOLS = """
import multiprocessing, sys
import fastgen

def text(_):
    with fastgen.load(decoder="cpu") as model:
        return model("And it came to pass", temperature=0, max_new_tokens=20)

if __name__ == "__main__":
    for method in multiprocessing.get_all_start_methods():
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map(text, range(3)) == [text(0)] * 3 == [sys.argv[1]] * 3, method
"""


def test_pools_of_multiprocessing(tmp_path: Path, wanted: str) -> None:
    """Forked, spawned and by a fork server."""
    (tmp_path / "pools.py").write_text(_POOLS)
    command = (sys.executable, tmp_path / "pools.py", wanted)
    process = processes.run(command)
    assert process.returncode == 0, process.stderr


_APP = """
import json, os
from cpu_decoders import plan_of
from fastgen.frontends.generator import Generator, find_tokenizer

checkpoint, plan = plan_of(None, "float16_weights", num_threads=3)
model = Generator(checkpoint, find_tokenizer(checkpoint), plan)
PROMPT, GREEDY = "And it came to pass", {"temperature": 0, "max_new_tokens": 20}
before = model(PROMPT, **GREEDY)
parent = os.getpid()

def app(environ, start_response):
    text = model(PROMPT, **GREEDY)
    answer = {"pid": os.getpid(), "parent": parent, "before": before, "text": text}
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(answer).encode()]
"""


@contextmanager
def gunicorn(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The running server, and its address."""
    log = folder / "log"
    command = ("-m", "gunicorn", "--preload", "--workers", NUM_WORKERS, "--bind", "127.0.0.1:0")
    options = ("--timeout", "600", "--log-file", log, "--chdir", folder, "app:app")
    with processes.started(
        (sys.executable, *command, *options),
        env={**os.environ, "PYTHONPATH": f"{TESTS}:{ROOT}"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as server:  # fmt: skip
        listening = re.compile(r"Listening at: (http://\S+)")
        wait_until(lambda: listening.search(read(log)) or server.poll() is not None)
        found = listening.search(read(log))
        assert found, read(log)
        yield server, found[1]


def read(log: Path) -> str:
    return log.read_text() if log.exists() else ""


def test_gunicorn_preloads_and_forks(tmp_path: Path, wanted: str) -> None:
    (tmp_path / "app.py").write_text(_APP)

    def ask(_: int) -> dict[str, Any]:
        with urllib.request.urlopen(address, timeout=WITHIN) as answer:
            return dict(json.load(answer))

    answers: list[dict[str, Any]] = []
    with gunicorn(tmp_path) as (server, address), ThreadPoolExecutor(2 * NUM_WORKERS) as threads:

        def all_answered() -> bool:
            answers.extend(threads.map(ask, range(4 * NUM_WORKERS)))
            return len({answer["pid"] for answer in answers}) == NUM_WORKERS

        wait_until(all_answered)
        server.send_signal(signal.SIGTERM)
        output, _ = server.communicate()
        assert server.returncode == 0, output + read(tmp_path / "log")
    assert {answer["text"] for answer in answers} == {wanted}
    assert {answer["before"] for answer in answers} == {wanted}, "the model was used before"
    assert {answer["parent"] for answer in answers} == {server.pid}, "loaded once, before the fork"
    for pid in {answer["pid"] for answer in answers}:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert "ERROR" not in read(tmp_path / "log") and "Traceback" not in output
