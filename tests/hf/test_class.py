"""What transformers decides by a model's class, its module and its name: as for its own class."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, pipeline
from transformers.conversion_mapping import get_model_conversion_mapping

import fastgen

Model = Any

THEIRS: Any = transformers.GPT2LMHeadModel
OURS: Any = fastgen.GPT2LMHeadModel
BOTH = (THEIRS, OURS)
SIZES = {"n_layer": 3, "n_head": 4, "n_embd": 32, "vocab_size": 97, "n_positions": 40}
MISSING = {
    "attention's c_proj": ["attn.c_proj.weight"],
    "one c_proj": ["h.1.mlp.c_proj.weight"],
    "biases of c_proj": ["c_proj.bias"],
    "c_fc and c_attn": ["c_fc.weight", "c_attn.weight"],
    "a layer": ["h.1."],
    "all layers": ["h."],
    "norms": ["ln_1.weight", "ln_f."],
    "positions": ["wpe"],
    "embedding": ["wte"],
    "embedding and head": ["wte", "lm_head"],
    "head": ["lm_head"],
    "everything but positions": ["h.", "wte", "ln_f", "lm_head"],
}


class TheirSubclass(THEIRS):
    pass


class OurSubclass(OURS):
    pass


def _config(**settings: Any) -> GPT2Config:
    return GPT2Config(**SIZES, **settings)


def _assert_same_weights(one: Model, other: Model) -> None:
    ones, others = one.state_dict(), other.state_dict()
    assert ones.keys() == others.keys()
    for name, tensor in ones.items():
        assert torch.equal(tensor, others[name]) and tensor.dtype == others[name].dtype, name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a head of its own, by transformers."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    THEIRS(_config(tie_word_embeddings=False)).save_pretrained(folder)
    return folder


@pytest.fixture
def told() -> Iterator[list[str]]:
    """transformers' own log messages."""
    messages: list[str] = []

    class Telling(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Telling()
    root = logging.getLogger("transformers")
    root.addHandler(handler)
    yield messages
    root.removeHandler(handler)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("missing", MISSING)
def test_what_a_checkpoint_lacks_is_initialized_alike(
    missing: str, tied: bool, saved: Path, tmp_path: Path
) -> None:
    weights = load_file(saved / "model.safetensors")
    if tied:
        del weights["lm_head.weight"]
    kept = {
        name: tensor
        for name, tensor in weights.items()
        if not any(part in name.removeprefix("transformer.") for part in MISSING[missing])
    }
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((saved / "config.json").read_text())
    config["tie_word_embeddings"] = tied
    (tmp_path / "config.json").write_text(json.dumps(config))
    for settings in ({}, {"dtype": torch.bfloat16}):
        loaded = []
        for kind in BOTH:
            torch.manual_seed(3)
            model, info = kind.from_pretrained(tmp_path, output_loading_info=True, **settings)
            loaded.append((model, info, torch.rand(4)))
        (theirs, their_info, their_next), (ours, our_info, our_next) = loaded
        _assert_same_weights(theirs, ours)
        assert our_info == their_info and torch.equal(our_next, their_next)


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": False}, {"n_inner": 50}])
@pytest.mark.parametrize("kinds", [BOTH, (TheirSubclass, OurSubclass)])
def test_new_models_are_initialized_alike(kinds: Any, settings: dict[str, Any]) -> None:
    made = []
    for kind in kinds:
        torch.manual_seed(5)
        model = kind(_config(**settings))
        model.apply(model._init_weights)
        model.resize_token_embeddings(103)
        made.append((model, kind._from_config(_config(**settings)), torch.rand(4)))
    (theirs, their_other, their_next), (ours, our_other, our_next) = made
    _assert_same_weights(theirs, ours)
    _assert_same_weights(their_other, our_other)
    assert torch.equal(their_next, our_next)


def test_a_subclass_is_loaded_as_one_of_theirs(saved: Path, tmp_path: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "c_proj.weight" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(saved / "config.json", tmp_path)
    loaded = []
    for kind in (TheirSubclass, OurSubclass):
        torch.manual_seed(3)
        loaded.append(kind.from_pretrained(tmp_path))
    _assert_same_weights(*loaded)
    assert TheirSubclass.is_custom_code() and OurSubclass.is_custom_code()


def test_the_class_inherits_the_generation_mixin_itself() -> None:
    """As transformers' own suite asks of every generative class, and by the same order of bases."""
    assert "GenerationMixin" in str(OURS.__bases__)
    assert OURS.__mro__[1:] == THEIRS.__mro__


def test_what_a_class_says_of_itself() -> None:
    """Every value on the class, and every question that it answers without arguments."""
    own = {"is_custom_code", "last_path", "last_reason", "_packed"}
    own |= {"_own_forward", "_check_unseen", "_first_way"}
    assert {name for name in dir(OURS) if not hasattr(THEIRS, name)} <= own
    for name in dir(THEIRS):
        one, other = (inspect.getattr_static(kind, name) for kind in BOTH)
        if isinstance(one, classmethod) and _takes_nothing(getattr(THEIRS, name)):
            assert getattr(OURS, name)() == getattr(THEIRS, name)(), name
        elif not name.startswith("__") and not callable(one):
            assert type(one) is type(other), name
            if not isinstance(one, (property, classmethod, staticmethod)):
                assert one == other, name
    assert OURS.__name__ == THEIRS.__name__ and not OURS.is_custom_code()


def _takes_nothing(method: Any) -> bool:
    parameters = inspect.signature(method).parameters.values()
    return all(p.default is not p.empty for p in parameters) and method.__name__ not in (
        "register_for_auto_class",  # it changes the class
    )


def test_signatures_and_documentation() -> None:
    """Trainer, generate and export ask for the arguments of these."""
    for name in ("forward", "generate", "__init__", "prepare_inputs_for_generation"):
        one, other = (getattr(kind, name) for kind in BOTH)
        assert inspect.signature(one) == inspect.signature(other), name
        assert one.__doc__ == other.__doc__ and one.__name__ == other.__name__


def test_what_an_instance_holds() -> None:
    made = []
    for kind in BOTH:
        torch.manual_seed(1)
        made.append(kind(_config()))
    theirs, ours = made
    assert vars(theirs).keys() == vars(ours).keys() and repr(theirs) == repr(ours)
    for name, value in vars(theirs).items():
        if isinstance(value, (bool, int, str, set, frozenset, list, tuple, type(None))):
            assert vars(ours)[name] == value, name
    assert theirs.loss_type == ours.loss_type
    assert theirs.loss_function is ours.loss_function
    assert theirs.all_tied_weights_keys == ours.all_tied_weights_keys
    assert theirs.generation_config.to_dict() == ours.generation_config.to_dict()
    conversions = [[repr(each) for each in get_model_conversion_mapping(m)] for m in made]
    assert conversions[0] == conversions[1]


def test_saved_files_are_the_same(tmp_path: Path, saved: Path) -> None:
    folders = []
    for kind in BOTH:
        folder = tmp_path / kind.__module__
        kind.from_pretrained(saved).save_pretrained(folder, max_shard_size="20KB")
        folders.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert folders[0] == folders[1] and len(folders[0]) > 3
    config = json.loads(folders[1]["config.json"])
    assert config["architectures"] == ["GPT2LMHeadModel"] and "auto_map" not in config


@pytest.mark.parametrize("kind", ["eager", "sdpa", "paged|eager", "no such", {"": "eager"}])
def test_another_attention(kind: Any) -> None:
    outcomes = []
    for model_class in BOTH:
        model = model_class(_config())
        try:
            model.set_attn_implementation(kind)
            outcomes.append(model.config._attn_implementation)
        except Exception as error:
            outcomes.append((type(error), str(error)))
    assert outcomes[0] == outcomes[1]


def test_registered_with_the_auto_class(monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    mapping = AutoModelForCausalLM._model_mapping
    monkeypatch.setattr(mapping, "_extra_content", {})  # what others have registered
    assert type(AutoModelForCausalLM.from_pretrained(saved)) is THEIRS
    AutoModelForCausalLM.register(GPT2Config, OURS, exist_ok=True)
    assert type(AutoModelForCausalLM.from_pretrained(saved)) is OURS
    assert type(AutoModelForCausalLM.from_config(_config())) is OURS


def test_a_pipeline_knows_the_class(told: list[str]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(fastgen.BUNDLED_MODEL)
    texts = []
    for kind in BOTH:
        model = kind.from_pretrained(fastgen.BUNDLED_MODEL)
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
        texts.append(generator("The king", max_new_tokens=8, do_sample=False))
    assert texts[0] == texts[1]
    assert not [message for message in told if "is not supported" in message]


def test_pickles_and_copies_are_of_this_class() -> None:
    model = OURS(_config()).eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = model(ids).logits
        for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), copy.copy(model)):
            assert type(again) is OURS and torch.equal(again(ids).logits, expected)
    assert pickle.loads(pickle.dumps(OURS)) is OURS


def test_wrong_arguments_are_refused_alike() -> None:
    cases: list[tuple[Any, ...]] = [(), ({},), ("gpt2",)]
    for arguments in cases:
        errors = []
        for kind in BOTH:
            with pytest.raises(TypeError) as caught:
                kind(*arguments)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]


def test_registered_as_code_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the user says that it is custom; transformers' class is not concerned."""
    monkeypatch.setattr(OURS, "_auto_class", None)
    OURS.register_for_auto_class("AutoModelForCausalLM")
    assert OURS.is_custom_code() and OURS.is_remote_code()
    assert not THEIRS.is_custom_code()
