"""Parts between text and ids: tokenizers that must be there, and what tests strike or count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fastgen
from fastgen.frontends.codec import RequestCodec
from fastgen.text.detokenizer import Sink, TextSink
from fastgen.text.tokenizer import Tokenizer


def tokenizer_at(folder: Path) -> Tokenizer:
    """The one of a folder's files."""
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None, folder
    return tokenizer


def tokenizer_of(model: fastgen.Generator) -> Tokenizer:
    assert model.tokenizer is not None
    return model.tokenizer


def library_of(tokenizer: Tokenizer) -> Any:
    """The tokenizer library's object that it encodes and decodes with."""
    return tokenizer._backend


def codec_of(model: fastgen.Generator) -> RequestCodec:
    """What turns a model's prompts into ids, and its rows into completions."""
    return model.job_maker._codec


def detokenizer_of(sink: Sink | None) -> Any:
    """What turns a row's ids into text, one by one."""
    assert isinstance(sink, TextSink)
    return sink._detokenizer
