"""Tokenizers that are known to be there, where fastgen answers None for a model without one."""

from __future__ import annotations

from pathlib import Path

import fastgen
from fastgen.text.tokenizer import Tokenizer


def tokenizer_at(folder: Path) -> Tokenizer:
    """The one of a folder's files."""
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None, folder
    return tokenizer


def tokenizer_of(model: fastgen.Generator) -> Tokenizer:
    assert model.tokenizer is not None
    return model.tokenizer
