"""The template for chats that lies beside a tokenizer, against transformers on the same folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from fastgen.errors import CheckpointError
from fastgen.text.tokenizer import Tokenizer
from text_parts import tokenizer_at
from tokenizer_folders import write_bert, write_json, write_sentencepiece, write_vocab_and_merges

CHAT = "{% for m in messages %}\r\n{{ m['content'] }}{% endfor %}é"
TEMPLATES: list[Any] = [
    *(CHAT, "", None, {"default": CHAT, "x": "X"}),
    *([], [{"name": "default", "template": CHAT}], [{"name": "x", "template": CHAT}]),
    [{"name": "x", "template": "X"}, {"name": "default", "template": CHAT}],
]


def chat_template(theirs: Any) -> str | None:
    try:
        template: str = theirs.get_chat_template()
    except ValueError:
        return None  # there is none, or none of several is the default
    return template


@pytest.mark.parametrize("write", [write_vocab_and_merges, write_bert, write_sentencepiece])
@pytest.mark.parametrize("file", [None, CHAT, "", "a\nb\r\n"])
def test_the_chat_template_is_that_of_transformers(
    write: Callable[[Path], None], file: str | None, tmp_path: Path
) -> None:
    write(tmp_path)
    write_json(tmp_path, "config.json", {"model_type": "gpt2"})
    config = tmp_path / "tokenizer_config.json"
    before = json.loads(config.read_text("utf-8")) if config.exists() else {}
    if file is not None:
        (tmp_path / "chat_template.jinja").write_bytes(file.encode())
    for template in TEMPLATES:
        write_json(tmp_path, config.name, before | {"chat_template": template})
        assert tokenizer_at(tmp_path).chat_template == chat_template(
            transformers.AutoTokenizer.from_pretrained(tmp_path)
        )


@pytest.mark.parametrize(
    "template",
    [5, True, ["a"], [{"name": "a"}], [{"template": "a"}], [{"name": 1, "template": "a"}],
     {"default": 5}, [[]]],
)  # fmt: skip
def test_a_chat_template_that_is_none_is_refused(template: Any, tmp_path: Path) -> None:
    write_vocab_and_merges(tmp_path)
    write_json(tmp_path, "tokenizer_config.json", {"chat_template": template})
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template must be a"):
        Tokenizer.from_folder(tmp_path)


def test_a_chat_template_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    write_vocab_and_merges(tmp_path)
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: is not UTF-8 text"):
        Tokenizer.from_folder(tmp_path)
    path.unlink()
    path.symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        Tokenizer.from_folder(tmp_path)
