"""Texts to ids and back over HTTP, and what lm-evaluation-harness' remote tokenizer asks for."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import transformers

import fastgen
from fastgen.server.service import Keys
from json_client import call, exchange, refusal
from server_harness import MODEL, RunningServer, serving
from text_parts import tokenizer_of

EOS = "<|endoftext|>"
TEXTS = [
    "And it came to pass", "", "é😀 \n", "word " * 300, EOS, f"a{EOS}b", f"{EOS}{EOS} {EOS}\n",
    f"é{EOS}\u0301 <|endoftext", "\0\x7f\u2028", "\ufffd",
]  # fmt: skip


@pytest.fixture(scope="module")
def theirs() -> Any:
    return transformers.AutoTokenizer.from_pretrained(fastgen.BUNDLED_MODEL)


def test_what_tokenize_makes_of_a_text_comes_back_as_that_text(
    server: RunningServer, theirs: Any
) -> None:
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        found = call(server, "/tokenize", {"model": MODEL, "prompt": text})
        assert found == {"tokens": ids, "count": len(ids), "max_model_len": 1024}
        assert call(server, "/detokenize", {"tokens": ids}) == {"prompt": text}


def test_any_ids_have_the_text_that_they_have_in_transformers(
    server: RunningServer, theirs: Any
) -> None:
    rng = random.Random(5)
    for _ in range(40):
        ids = [rng.choice([0, rng.randrange(4096)]) for _ in range(rng.randrange(12))]
        assert call(server, "/detokenize", {"tokens": ids}) == {"prompt": theirs.decode(ids)}


def test_no_special_tokens_are_added_and_none_can_be(server: RunningServer) -> None:
    plain = call(server, "/tokenize", {"prompt": "test"})
    for value in (False, None):
        sent = {"prompt": "test", "add_special_tokens": value}
        assert call(server, "/tokenize", sent) == plain
    error = refusal(server, {"prompt": "test", "add_special_tokens": True}, "/tokenize")
    assert error["param"] == "add_special_tokens"


def test_the_tokens_that_begin_and_end_texts(
    server: RunningServer, model: fastgen.Generator, theirs: Any
) -> None:
    info = call(server, "/tokenizer_info")
    assert set(info) == {"bos_token", "eos_token", "pad_token", "chat_template"}
    for role in ("bos_token", "eos_token", "pad_token"):
        assert info[role] == getattr(theirs, role)
    assert info["chat_template"] is None
    for role, token_id in [("bos_token", model.config.bos_token_id),
                           ("eos_token", model.config.eos_token_ids[0])]:  # fmt: skip
        # As lm-evaluation-harness finds the ids.
        sent = {"prompt": info[role], "add_special_tokens": False}
        assert call(server, "/tokenize", sent)["tokens"] == [token_id]
    assert call(server, f"/tokenizer_info?model={MODEL}") == info


def test_of_several_models_one_is_named(model: fastgen.Generator) -> None:
    with fastgen.load(max_batch_size=1) as other, serving({"a": model, "b": other}) as server:
        assert call(server, "/tokenizer_info?model=b")["eos_token"] == EOS
        for path, status in (("/tokenizer_info", 400), ("/tokenizer_info?model=c", 404)):
            found, answer, _ = exchange(server, b"", path, "GET")
            assert found == status and answer["error"]["code"] == "model_not_found"


def test_a_key_is_needed_where_there_are_keys(model: fastgen.Generator) -> None:
    with serving({MODEL: model}, keys=Keys(["key"])) as server:
        assert exchange(server, b"", "/tokenizer_info", "GET")[0] == 401


def test_a_model_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((fastgen.BUNDLED_MODEL / name).read_bytes())
    with fastgen.load(tmp_path, max_batch_size=1) as model, serving({MODEL: model}) as server:
        found, answer, _ = exchange(server, b"", "/tokenizer_info", "GET")
        assert found == 400 and "no tokenizer" in answer["error"]["message"]
        # A new document begins all the same.
        answer = call(server, "/v1/completions", {"max_tokens": 3, "temperature": 0})
        [wanted] = model.generate([[0]], max_new_tokens=3, temperature=0)
        sent = {"prompt": [0], "max_tokens": 3, "temperature": 0, "return_token_ids": True}
        [choice] = call(server, "/v1/completions", sent)["choices"]
        assert choice["token_ids"] == [*wanted.completions[0].token_ids]
        assert answer["usage"] == {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}


def test_what_a_model_says_of_itself_is_its_tokenizers(model: fastgen.Generator) -> None:
    assert tokenizer_of(model).token_text(model.config.eos_token_ids[0]) == EOS
