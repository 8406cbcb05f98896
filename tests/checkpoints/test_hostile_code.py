"""Checkpoint folders that hold code, as pickles or as Python files: none of it is ever run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from tiny_checkpoints import (
    TOKENIZER,
    assert_loads,
    assert_refused,
    random_array,
    run_python,
    write_checkpoint,
    write_config,
    write_json,
    write_vocabulary,
)


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.canary), "w"))


def test_bomb_goes_off(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "canary"))).close()
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "file",
    [
        *("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth"),
        *("model.ckpt", "flax_model.msgpack", "tf_model.h5"),
    ],
)
def test_only_a_pickle(tmp_path: Path, file: str) -> None:
    folder, canary = tmp_path / "model", tmp_path / "canary"
    folder.mkdir()
    write_config(folder)
    (folder / file).write_bytes(pickle.dumps(Bomb(canary)))
    assert_refused(folder, f"{file}: only safetensors files are read", "save_pretrained(")
    assert not canary.exists()


@pytest.mark.parametrize("weights", [b"", b"broken", None])
def test_no_fallback_to_a_pickle(tmp_path: Path, weights: bytes | None) -> None:
    """Neither if model.safetensors is broken, nor if it is itself a pickle (None)."""
    folder, canary = write_checkpoint(tmp_path / "model"), tmp_path / "canary"
    bomb = pickle.dumps(Bomb(canary))
    (folder / "pytorch_model.bin").write_bytes(bomb)
    (folder / "model.safetensors").write_bytes(bomb if weights is None else weights)
    assert_refused(folder, "model.safetensors: not a valid safetensors file")
    assert not canary.exists()


def test_pickles_beside_good_weights_are_not_opened(tmp_path: Path) -> None:
    folder, canary = write_checkpoint(tmp_path / "model"), tmp_path / "canary"
    for file in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl"):
        (folder / file).write_bytes(pickle.dumps(Bomb(canary)))
    assert_loads(folder)
    assert not canary.exists()


def test_no_weights(tmp_path: Path) -> None:
    write_config(tmp_path)
    assert_refused(tmp_path, "holds neither model.safetensors nor model.safetensors.index.json")


def test_only_an_adapter(tmp_path: Path) -> None:
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA"})
    save_file({"lora_A.weight": random_array(2)}, tmp_path / "adapter_model.safetensors")
    assert_refused(tmp_path, "adapter_config.json: an unmerged adapter", "merge_and_unload")


_WATCHED_LOAD = """
import sys, fastgen

def load(folder):
    with fastgen.load(folder, device="cpu", max_batch_size=2) as model:
        model.generate("ab", max_new_tokens=2)

def watch(event, arguments):
    told = " ".join(str(getattr(a, "co_filename", a)) for a in arguments[:2])
    code = event in ("open", "compile", "exec", "import") and sys.argv[2] in told and ".py" in told
    if code or event.startswith(FORBIDDEN) or (event == "import" and "evil" in told):
        seen.append(event)

FORBIDDEN = ("subprocess", "os.system", "os.exec", "socket.connect", "pickle.find_class")
seen = []
load(sys.argv[1])  # whatever Python itself imports is imported here
sys.addaudithook(watch)
load(sys.argv[2])
print(seen)
open(sys.argv[2] + "/evil.py").close()
print(seen)
"""
_CODE = {
    "auto_map": {"AutoTokenizer": "evil.Evil", "AutoModelForCausalLM": "evil.GPT2LMHeadModel"},
    "custom_pipelines": {"text-generation": {"impl": "evil.Evil"}},
    "_attn_implementation_internal": "someone/evil",
    "_attn_implementation": "someone/evil",
    "_name_or_path": "someone/evil",
    "architectures": ["evil.Evil"],
    "trust_remote_code": True,
}


def add_code(folder: Path, canary: Path, tokenizer_class: str) -> None:
    """Python files in the folder, each of which tells if it is run, and settings that name them."""
    write_config(folder, **_CODE)
    tokenizer = {
        "tokenizer_class": tokenizer_class,
        "chat_template": "{{ cycler.__init__ }}",
        **_CODE,
    }
    write_json(folder / "tokenizer_config.json", tokenizer)
    write_json(folder / "generation_config.json", _CODE)
    for name in ("evil", "__init__", "configuration_gpt2", "modeling_gpt2", "tokenization_gpt2"):
        (folder / f"{name}.py").write_text(f"open({str(canary)!r}, 'w')")


_CLASS_OF = {"tokenizer.json": "Evil", "vocab.json": "GPT2Tokenizer", "vocab.txt": "BertTokenizer"}


@pytest.mark.parametrize("tokenizer", _CLASS_OF)
def test_code_beside_the_weights_is_never_run(tmp_path: Path, tokenizer: str) -> None:
    """It loads as data; the .py files are not even opened, and nothing is asked of a network."""
    if tokenizer == "tokenizer.json":
        pytest.importorskip("transformers")  # which says that it has no such class
    good, hostile, canary = tmp_path / "good", tmp_path / "hostile", tmp_path / "canary"
    for folder in (good, hostile):
        write_checkpoint(folder)
        write_vocabulary(folder)
        write_json(folder / "tokenizer.json", TOKENIZER)
        (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nab\n")
        for other in _CLASS_OF:
            if other != tokenizer:
                (folder / other).unlink()
        if tokenizer != "vocab.json":
            (folder / "merges.txt").unlink()
        name = {"tokenizer_class": _CLASS_OF[tokenizer].replace("Evil", "Unknown")}
        write_json(folder / "tokenizer_config.json", name)
    add_code(hostile, canary, _CLASS_OF[tokenizer])
    output = run_python(_WATCHED_LOAD, good, hostile, HF_HUB_OFFLINE="1")
    assert output.splitlines() == ["[]", "['open']"]
    assert not canary.exists()


@pytest.mark.parametrize("tokenizer", ["vocab.json", "vocab.txt"])
def test_a_tokenizer_that_is_code_is_refused(tmp_path: Path, tokenizer: str) -> None:
    """A vocabulary says nothing of how text is cut up; what the class would do is not known."""
    folder, canary = write_checkpoint(tmp_path / "model"), tmp_path / "canary"
    if tokenizer == "vocab.json":
        write_vocabulary(folder)
    else:
        (folder / tokenizer).write_text("[UNK]\nab\n")
    add_code(folder, canary, "Evil")
    assert_refused(folder, f"{tokenizer}: tokenizer_class 'Evil' is not supported")
    assert not canary.exists()
