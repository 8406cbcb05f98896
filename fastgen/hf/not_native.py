"""NotNative: a call takes a slower, more general path."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any


class NotNative(Exception):  # noqa: N818
    """fastgen cannot do this exactly as transformers would; the message says what."""


def check_known(arguments: Mapping[str, Any], known: Container[str]) -> None:
    """Raise NotNative for the first argument that is given, and not known."""
    for key, value in arguments.items():
        if key not in known and value is not None and value is not False:
            raise NotNative(f"{key} was given")
