"""What happens before the first token, in a process that has imported everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from models import PRECISIONS

import fastgen
from fastgen.checkpoints.checkpoint import Checkpoint, open_checkpoint
from fastgen.frontends.generator import BUNDLED_MODEL
from fastgen.text.tokenizer import Tokenizer

HEAVY = ("GPT2LMHeadModel", "accelerate")  # they load torch and transformers
NAMES = [name for name in fastgen.__all__ if name not in ("__version__", *HEAVY)]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_load(precision: str, timed: Any, describe: Any) -> None:
    """The bundled model: read, checked and packed, without a cache."""
    models: list[fastgen.Generator] = []

    def close_last() -> None:
        while models:
            models.pop().close()

    def call(_: None) -> None:
        models.append(fastgen.load(device="cpu", **PRECISIONS[precision]))

    timed(call, close_last, group="loading: the bundled model", rounds=10)
    [model] = models
    assert model.plan.weights == precision
    assert model("In the beginning", max_new_tokens=4, temperature=0)
    describe(weights_mb=round(model.plan.memory.weights / 1e6, 1))
    close_last()


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_load_from_the_cache(
    precision: str, share: bool, timed: Any, describe: Any, tmp_path: Path
) -> None:
    """The bundled model, packed before: read, or mapped to be shared."""
    options = {"device": "cpu", "cache": tmp_path, "share_weights": share}
    models: list[fastgen.Generator] = []

    def close_last() -> None:
        while models:
            models.pop().close()

    def call(_: None) -> None:
        models.append(fastgen.load(**options, **PRECISIONS[precision]))

    call(None)
    assert len(list(tmp_path.iterdir())) == 1
    timed(call, close_last, group="loading: the bundled model", rounds=10)
    describe(weights_mb=round(models[0].plan.memory.weights / 1e6, 1))
    close_last()


def test_open_checkpoint(timed: Any, describe: Any) -> None:
    """Config and header, checked; no weight is read."""

    def call(_: None) -> Checkpoint:
        return open_checkpoint(BUNDLED_MODEL)

    checkpoint = timed(call, group="loading: files", rounds=50)
    assert checkpoint.config.num_layers == 6 and checkpoint.tied
    describe(tensors=len(list(checkpoint.tensors())))


def test_read_tensors(timed: Any, describe: Any) -> None:
    """All weights, each checked to be finite."""
    checkpoint = open_checkpoint(BUNDLED_MODEL)
    names = [name for name, _ in checkpoint.tensors()]

    def call(_: None) -> int:
        return sum(checkpoint.read(name).nbytes for name in names)

    num_bytes = timed(call, group="loading: files", rounds=20)
    assert 0 < num_bytes <= (BUNDLED_MODEL / "model.safetensors").stat().st_size
    describe(tensors=len(names), megabytes=num_bytes / 1e6)


def test_open_tokenizer(timed: Any, describe: Any) -> None:
    def call(_: None) -> Tokenizer | None:
        return Tokenizer.from_folder(BUNDLED_MODEL)

    tokenizer = timed(call, group="loading: files", rounds=20)
    [ids] = tokenizer.encode(["In the beginning"])
    assert tokenizer.decode(ids) == "In the beginning"
    describe(kilobytes=round((BUNDLED_MODEL / "tokenizer.json").stat().st_size / 1e3))


def test_bind_names(timed: Any, describe: Any) -> None:
    """First use of fastgen's public names, their modules being loaded."""

    def forget() -> None:
        for name in NAMES:
            vars(fastgen).pop(name, None)

    def call(_: None) -> list[Any]:
        return [getattr(fastgen, name) for name in NAMES]

    assert None not in timed(call, forget, group="loading: names", rounds=100)
    assert vars(fastgen).keys() >= set(NAMES)
    describe(names=len(NAMES))
