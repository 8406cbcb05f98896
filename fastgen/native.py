"""The C++ extension, if it was built. A missing one is None; a broken one raises here."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any


def _load() -> Any:
    if importlib.util.find_spec("fastgen._native") is None:
        return None
    return importlib.import_module("fastgen._native")


native = _load()
