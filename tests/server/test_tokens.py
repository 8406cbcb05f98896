"""Texts to ids and back over HTTP, and what lm-evaluation-harness' remote tokenizer asks for."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import transformers

import fastgen
from fastgen.server.service import Keys
from fastgen.text.special_tokens import ROLES
from json_client import call, exchange, refusal
from server_harness import MODEL, RunningServer, serving
from text_parts import tokenizer_of
from tokenizer_folders import write_bert

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


def test_gpt2s_tokenizer_adds_no_special_tokens(server: RunningServer) -> None:
    plain = call(server, "/tokenize", {"prompt": "test"})
    for value in (True, False, None):
        sent = {"prompt": "test", "add_special_tokens": value}
        assert call(server, "/tokenize", sent) == plain
    sent = {"prompt": "test", "add_special_tokens": "yes"}
    assert refusal(server, sent, "/tokenize")["param"] == "add_special_tokens"


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled weights with BERT's tokenizer and a template for chats."""
    folder = tmp_path_factory.mktemp("bert")
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((fastgen.BUNDLED_MODEL / name).read_bytes())
    write_bert(folder, "BertTokenizer", chat_template="{{ messages }}")
    return folder


@pytest.fixture(scope="module")
def bert(bert_folder: Path) -> Iterator[RunningServer]:
    with fastgen.load(bert_folder, max_batch_size=2) as model, serving({MODEL: model}) as running:
        yield running


@pytest.mark.parametrize("prompt", ["hello world", "", "[CLS] a [SEP]", "你好 b"])
def test_special_tokens_are_added_where_that_is_asked_for(
    prompt: str, bert: RunningServer, bert_folder: Path
) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(bert_folder)
    for adds in (True, False, None):
        sent = {"prompt": prompt, "add_special_tokens": adds}
        wanted = theirs(prompt, add_special_tokens=adds is True)["input_ids"]
        assert call(bert, "/tokenize", sent)["tokens"] == wanted


def test_a_prompt_with_special_tokens_is_the_prompt_of_their_ids(bert: RunningServer) -> None:
    texts = ["hello world", "a"]
    ids = [call(bert, "/tokenize", {"prompt": text, "add_special_tokens": True})["tokens"]
           for text in texts]  # fmt: skip
    options = {"max_tokens": 4, "temperature": 0, "echo": True, "logprobs": 1, "n": 2, "seed": 1}

    def answer(prompt: Any, **more: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = call(
            bert, "/v1/completions", {"prompt": prompt, **options, **more}
        )["choices"]
        return found

    wanted = answer(ids)
    assert answer(texts, add_special_tokens=True) == answer(ids, add_special_tokens=True) == wanted
    assert answer(texts[0], add_special_tokens=True) == wanted[:2]
    plain = answer(texts)
    assert answer(texts, add_special_tokens=None) == plain != wanted
    assert plain[0]["text"].startswith("hello world")
    assert wanted[0]["text"].startswith("[CLS] hello world [SEP]")


def test_a_stream_of_a_prompt_with_special_tokens(bert: RunningServer) -> None:
    sent = {"prompt": "hello", "add_special_tokens": True, "max_tokens": 4, "temperature": 0}
    [choice] = call(bert, "/v1/completions", sent)["choices"]
    with openai.OpenAI(base_url=f"{bert.url}/v1", api_key="any", max_retries=0) as client:
        stream = client.completions.create(
            model=MODEL, prompt="hello", max_tokens=4, temperature=0, stream=True,
            extra_body={"add_special_tokens": True},
        )  # fmt: skip
        assert "".join(event.choices[0].text for event in stream) == choice["text"]


def test_the_tokens_that_begin_and_end_texts(
    server: RunningServer, model: fastgen.Generator, theirs: Any
) -> None:
    info = call(server, "/tokenizer_info")
    assert info == {role: getattr(theirs, role) for role in ROLES} | {"chat_template": None}
    for role, token_id in [("bos_token", model.config.bos_token_id),
                           ("eos_token", model.config.eos_token_ids[0])]:  # fmt: skip
        # As lm-evaluation-harness finds the ids.
        sent = {"prompt": info[role], "add_special_tokens": False}
        assert call(server, "/tokenize", sent)["tokens"] == [token_id]
    assert call(server, f"/tokenizer_info?model={MODEL}") == info


def test_roles_and_the_chat_template_are_the_tokenizers(
    bert: RunningServer, bert_folder: Path
) -> None:
    """config.json names other ids than this tokenizer's."""
    theirs = transformers.AutoTokenizer.from_pretrained(bert_folder)
    info = call(bert, "/tokenizer_info")
    assert info.pop("chat_template") == theirs.get_chat_template() == "{{ messages }}"
    assert info == {role: getattr(theirs, role) for role in ROLES}
    assert (info["cls_token"], info["pad_token"], info["eos_token"]) == ("[CLS]", "[PAD]", None)


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
