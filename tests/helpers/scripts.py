"""Modules of tools/ and benchmarks/, which are scripts: no package, and on no path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def load_script(name: str) -> Any:
    """The module at `name` of the repository, such as "tools/widen_model.py".

    What it imports from its own folder must have been loaded before.
    """
    path = ROOT / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look there, and so do its neighbours
    spec.loader.exec_module(module)
    return module
