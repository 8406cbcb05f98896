"""A checkpoint and a cache of packed weights of a test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from packed_files import checkpoint_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoint_of(tmp_path / "model")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """It is not there yet, and neither is the folder that it is to be in."""
    return tmp_path / "above" / "cache"
