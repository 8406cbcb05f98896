"""ONNX Runtime as a peer: its graph is the same model, whatever has been run before."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from fastgen.bench.compare import Comparison, own_candidates, verdict
from fastgen.bench.peer_process import INSTALL, PeerProcess
from fastgen.bench.plain_checkpoint import write_plain
from fastgen.bench.shapes import SHAPES, random_prompts, save_checkpoint
from fastgen.checkpoints.checkpoint import open_checkpoint
from fastgen.frontends.generator import BUNDLED_MODEL

PEER = "onnxruntime"
MISSING = [name for name in ("onnxruntime", "onnx") if find_spec(name) is None]
BATCH, PROMPT, NEW = 4, 8, 12

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} missing: {INSTALL[PEER]}")


def comparison(folder: Path, scratch: Path) -> Comparison:
    return Comparison(
        folder=folder, scratch=scratch, peers=(PEER,), pythons={}, precision="float32",
        device="cpu", load={}, threads=2, batches=(BATCH,), prompt_len=PROMPT, output_len=NEW,
        rounds=1, vocab=open_checkpoint(folder).config.vocab_size,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Every bias and every norm is random, the head is the embedding's."""
    folder = save_checkpoint(tmp_path_factory.mktemp("tiny"), SHAPES["tiny"])
    return comparison(folder, tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """A trained model: what is likely is far more so than the rest."""
    folder = write_plain(open_checkpoint(BUNDLED_MODEL), tmp_path_factory.mktemp("plain"))
    return comparison(folder, tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="module")
def peer(tiny: Comparison) -> Iterator[PeerProcess]:
    with tiny.start(PEER, "float32", BATCH, exact=True) as process:
        assert process.why_not is None
        yield process


@pytest.mark.parametrize("batch", [BATCH, 1, 3])
def test_its_tokens_are_fastgens(batch: int, peer: PeerProcess, tiny: Comparison) -> None:
    """One process runs all of these in turn; keys and values of earlier rows stay in its memory."""
    prompts = random_prompts(batch, PROMPT, np.random.default_rng(batch))
    found = verdict(own_candidates(tiny, prompts, NEW), peer.generate(prompts, NEW).ids)
    assert "why_not" not in found and found["tokens_agree"] > 0.5, found


def test_prompts_may_be_of_any_length(peer: PeerProcess, tiny: Comparison) -> None:
    for length in (1, PROMPT - 1):
        prompts = random_prompts(2, length, np.random.default_rng(length))
        found = verdict(own_candidates(tiny, prompts, NEW), peer.generate(prompts, NEW).ids)
        assert "why_not" not in found and found["tokens_agree"] > 0.5, found


def test_a_head_and_widths_of_their_own(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "n_embd": 48, "n_layer": 3, "n_head": 3, "n_inner": 80, "vocab_size": 61,
        "n_positions": 32, "layer_norm_epsilon": 0.01, "initializer_range": 0.2,
    }  # fmt: skip
    config = transformers.GPT2Config(
        **options, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "source")
    plain = write_plain(open_checkpoint(tmp_path / "source"), tmp_path / "plain")
    job = comparison(plain, tmp_path)
    prompts = random_prompts(BATCH, PROMPT, np.random.default_rng(7), job.vocab)
    with job.start(PEER, "float32", BATCH, exact=True) as process:
        assert process.why_not is None
        found = verdict(own_candidates(job, prompts, NEW), process.generate(prompts, NEW).ids)
    assert "why_not" not in found and found["tokens_agree"] > 0.5, found


def test_int8_is_the_same_model_in_fewer_bytes(bundled: Comparison) -> None:
    prompts = random_prompts(BATCH, PROMPT, np.random.default_rng(8), bundled.vocab)
    likely = own_candidates(bundled, prompts, 1)
    sizes = {}
    for precision in ("float32", "int8"):
        with bundled.start(PEER, precision, BATCH) as process:
            assert process.why_not is None
            made = process.generate(prompts, NEW).ids
        assert all(row[0] in top for row, [top] in zip(made, likely, strict=True))
        files = (bundled.scratch / f"{PEER}-{precision}").iterdir()
        sizes[precision] = sum(path.stat().st_size for path in files)
    assert sizes["int8"] < 0.5 * sizes["float32"]


def test_what_it_does_not_have(tiny: Comparison) -> None:
    with tiny.start(PEER, "bfloat16", BATCH) as process:
        assert process.why_not == "has no bfloat16 on cpu"
