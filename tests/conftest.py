"""Shared fixtures, and the one table of tolerances."""

from __future__ import annotations

import gc
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from fastgen.decoders.machine import granted_cores

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["FASTGEN_CACHE"] = "off"  # not the user's own; tests of the cache have folders
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # PyTorch's threads wait for each other by spinning: there must not be more of them than cores.
    share = granted_cores() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

import fastgen
import processes
from engine_threads import Clock

HAS_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
if HAS_INTERPRETER:
    from triton.runtime import interpreter

    import triton_interpreter

    triton_interpreter.speed_up()

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs behind it
    signal.signal(signal.SIGINT, signal.default_int_handler)  # for the tests of Ctrl-C
signal.signal(signal.SIGTERM, signal.default_int_handler)  # tests end what they have started


# Files that take longest. They start first where files run side by side, so that all processors
# have something to do until the end.
LONG = (
    "hf/test_generate", "project/test_packaging", "native/test_sanitizers",
    "kernels/test_resources", "decoders/test_cuda_decoder", "decoders/test_interface",
    "kernels/test_sampling", "kernels/test_attention", "engine/test_random_steps",
    "checkpoints/test_variants", "decoders/test_quantization",
)  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # one of several processes
        place = {name: at for at, name in enumerate(LONG)}
        items.sort(
            key=lambda item: place.get(f"{item.path.parent.name}/{item.path.stem}", len(LONG))
        )


@pytest.fixture(autouse=True)
def no_child_left() -> Iterator[None]:
    """A test ends the processes that it has started."""
    before = processes.children()
    yield
    left = {pid: processes.command_of(pid) for pid in processes.children() - before}
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


@pytest.fixture
def own_garbage() -> None:
    """For tests that collect garbage: what others have left goes before, and is not held against
    them.
    """
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gc.collect()
    finally:
        sys.unraisablehook = hook


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time of engines' threads."""
    made = Clock()
    monkeypatch.setattr("fastgen.frontends.engine_thread.time", made)
    return made


@pytest.fixture
def products_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of equal bits in Triton's interpreter; a GPU needs no such help."""
    if HAS_INTERPRETER:
        builder = interpreter.InterpreterBuilder
        monkeypatch.setattr(builder, "create_dot", triton_interpreter.dot_in_order)


@pytest.fixture(scope="session")
def model() -> Iterator[fastgen.Generator]:
    """The bundled model. Shared: tests leave its engine idle."""
    with fastgen.load() as loaded:
        yield loaded


@pytest.fixture
def idle_model(model: fastgen.Generator) -> Iterator[fastgen.Generator]:
    """The bundled model, checked afterwards: no row left, every block free."""
    yield model
    assert model.engine.num_unfinished == 0
    assert model.engine.num_free_blocks == model.plan.limits.num_blocks


@pytest.fixture(scope="session")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a random checkpoint, by the name of its variant; saved once."""
    saved: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in saved:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # transformers' own, while it saves
                from variants import save_variant

                saved[name] = save_variant(name, tmp_path_factory.mktemp(name))
        return saved[name]

    return folder
