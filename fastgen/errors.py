"""Exceptions: what a caller did wrong, what a file holds, what the engine met."""

from __future__ import annotations


class OptionError(ValueError):
    """A value that `option` cannot have; None: of no option alone."""

    def __init__(self, message: str, option: str | None = None) -> None:
        super().__init__(message)
        self.option = option


class OptionTypeError(TypeError):
    """A value of a type that `option` cannot have, or an option that does not exist."""

    def __init__(self, message: str, option: str | None = None) -> None:
        super().__init__(message)
        self.option = option


class CheckpointError(Exception):
    """A checkpoint cannot be loaded, or cannot be run exactly; names the file and the cause."""


class EngineError(Exception):
    """The engine could not do what was asked, through no fault in the request itself."""


class QueueFull(EngineError):  # noqa: N818
    """As many rows run and wait as are allowed: try again later."""


class NothingToDrawError(EngineError):
    """A row's logits gave it no next token."""

    def __init__(self) -> None:
        super().__init__("the logits were NaN or infinite, or every token had been ruled out")


def message_of(error: BaseException) -> str:
    """What a result says of an error; EngineError's messages are whole sentences."""
    try:
        text = str(error)
    except Exception:  # an exception class of the caller's own may raise here, too
        text = ""
    return text if isinstance(error, EngineError) else f"{type(error).__name__}: {text}"


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
