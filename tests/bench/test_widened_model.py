"""tools/widen_model.py: a wider, deeper checkpoint that computes what its source does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fastgen
from data_files import HELD_OUT
from fastgen.frontends.generator import BUNDLED_MODEL
from fastgen.text.tokenizer import Tokenizer
from reference import ReferenceGPT2
from scripts import load_script
from variants import save_variant

tool = load_script("tools/widen_model.py")
VARIANTS = ("plain", "one_layer", "untied", "both_heads_differ", "n_inner", "inverse_layer",
            "fp16_file", "width_100", "act_gelu", "epsilon")  # fmt: skip
VOCAB = 4200  # of the bundled model, padded


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, twice as wide, with one layer and some ids more."""
    folder: Path = tool.widen(BUNDLED_MODEL, tmp_path_factory.mktemp("wide"), 2, 7, VOCAB)
    return folder


@pytest.fixture(scope="module")
def held_out() -> list[int]:
    tokenizer = Tokenizer.from_folder(BUNDLED_MODEL)
    assert tokenizer is not None
    return tokenizer.encode([HELD_OUT.read_text()[:1000]])[0]


def logits_of(folder: Path, token_ids: list[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return ReferenceGPT2(folder).logits(token_ids)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("times", "bound"), [(2, 1e-9), (3, 2e-6)])
def test_logits_stay(name: str, times: int, bound: float, tmp_path: Path) -> None:
    """In float64: halves of numbers are exact, thirds are rounded to float32."""
    source = save_variant(name, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    target = tool.widen(source, tmp_path / "target", times, config["n_layer"] + 2)
    token_ids = np.random.default_rng(0).integers(0, config["vocab_size"], 12).tolist()
    expected = logits_of(source, token_ids)
    error = np.abs(logits_of(target, token_ids) - expected).max()
    assert error < bound * np.abs(expected).max()


def test_the_shape_is_the_wider_ones(tmp_path: Path) -> None:
    source = save_variant("n_inner", tmp_path / "source")
    before = json.loads((source / "config.json").read_text())
    target = tool.widen(source, tmp_path / "target", 3, 5)
    with fastgen.load(target) as model:
        config = model.config
    assert (config.num_layers, config.vocab_size) == (5, before["vocab_size"])
    assert config.hidden_size == 3 * before["n_embd"]
    assert config.num_heads == 3 * before["n_head"] and config.inner_size == 3 * before["n_inner"]


def test_further_layers_are_computed_and_add_nothing(tmp_path: Path) -> None:
    source = save_variant("plain", tmp_path / "source")
    own = json.loads((source / "config.json").read_text())["n_layer"]
    tensors = load_file(tool.widen(source, tmp_path / "target", 2, own + 1) / "model.safetensors")
    added = {name: tensor for name, tensor in tensors.items() if name.startswith(f"h.{own}.")}
    for name, tensor in added.items():
        like = tensors[name.replace(f"h.{own}.", "h.0.", 1)]
        if ".c_proj." in name:
            assert like.any() and not tensor.any()
        else:
            assert np.array_equal(tensor, like)
    assert sum(".c_proj." in name for name in added) == 4


def test_padding_is_never_near_being_drawn(wide: Path, held_out: list[int]) -> None:
    """Its logit is the same whatever the text, and no other logit feels it."""
    before, after = logits_of(BUNDLED_MODEL, held_out), logits_of(wide, held_out)
    own = before.shape[1]
    assert after.shape == (len(held_out), VOCAB)
    assert np.abs(after[:, own:] - tool.PAD_LOGIT).max() < 1e-3
    assert after[:, :own].max(1).min() > tool.PAD_LOGIT + 60
    assert np.abs(after[:, :own] - before).max() < 1e-5
    second, first = np.sort(before, 1)[:, -2:].T
    is_clear = first - second > 1e-4
    assert is_clear.mean() > 0.9
    assert np.array_equal(after.argmax(1)[is_clear], before.argmax(1)[is_clear])


@pytest.mark.parametrize("load", [{"dtype": "float32"}, {"quantize": "int8"}], ids=str)
def test_it_reads_and_writes_text(wide: Path, load: dict[str, Any]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 24, "ignore_eos": True, "seed": 3, "n": 4}
    with fastgen.load(wide, **load) as model:
        [made] = model.generate(["And God said, "], temperature=1.5, **options)
    for completion in made.completions:
        assert completion.text and max(completion.token_ids) < 4096


def test_a_sampled_text_is_the_sources(wide: Path) -> None:
    """Padding comes after all other ids, so the same uniforms draw the same ids."""
    texts = []
    for folder in (BUNDLED_MODEL, wide):
        with fastgen.load(folder, dtype="float32") as model:
            texts.append(model("In the beginning", max_new_tokens=16, seed=5))
    assert texts[0] == texts[1]


def test_check_tells_another_model(tmp_path: Path) -> None:
    source = save_variant("gpt2_vocab", tmp_path / "source")
    target = tool.widen(source, tmp_path / "target", 2, 2)
    assert "none is padding" in tool.check(source, target)
    path = target / "model.safetensors"
    tensors = load_file(path)
    tensors["h.1.mlp.c_proj.bias"][0] = 1
    save_file(tensors, path)
    with pytest.raises(ValueError, match="log-probabilities differ"):
        tool.check(source, target)


@pytest.mark.parametrize(
    ("times", "layers", "vocab", "told"),
    [(0, 12, 0, "cannot be made"), (2, 5, 0, "6 layers"), (2, 6, 4095, "4096 ids"),
     (1, 6, 4097, "twice as wide")],
)  # fmt: skip
def test_what_cannot_be_made(
    times: int, layers: int, vocab: int, told: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=told):
        tool.widen(BUNDLED_MODEL, tmp_path / "target", times, layers, vocab)
    assert not (tmp_path / "target").exists()
