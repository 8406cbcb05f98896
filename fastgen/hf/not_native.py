"""NotNative: a call takes a slower, more general path."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any


class NotNative(Exception):  # noqa: N818
    """fastgen cannot do this exactly as transformers would; the message says what."""


def check_known(
    arguments: Mapping[str, Any], known: Container[str], unset: Mapping[str, tuple[Any, ...]]
) -> None:
    """Raise NotNative for the first argument that is not known, nor unset by its value."""
    for key, value in arguments.items():
        if key not in known and not any(value is each for each in unset.get(key, ())):
            raise NotNative(f"{key} was given")
