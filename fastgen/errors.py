"""The exceptions that are not the caller's: what a file holds, and what the engine met."""

from __future__ import annotations


class CheckpointError(Exception):
    """A checkpoint cannot be loaded, or cannot be run exactly; names the file and the cause."""


class EngineError(Exception):
    """The engine could not do what was asked, through no fault in the request itself."""


def shown(value: object) -> str:
    """`repr` of a value that a file holds, for a message: short, and safe to print."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # too deep, or an integer of too many digits
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def shown_name(name: str) -> str:
    """A name that a file holds, plain if that is short and safe to print."""
    return name if len(name) <= 200 and name.isprintable() else shown(name)
