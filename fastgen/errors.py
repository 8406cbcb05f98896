"""Exceptions: what a caller did wrong, what a file holds, what the engine met."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal


class _WrongOption(Exception):  # noqa: N818
    """What is wrong with an option or argument of a call.

    Attributes:
        option: its name; "prompt" for any prompt, "text" for any other text. None: the fault is in
            no option alone.
        problem: what is wrong, without the option's name where the message begins with it: for
            programs that call the option otherwise. Else the whole message.
    """

    def __init__(self, message: str, option: str | None = None, problem: str | None = None) -> None:
        super().__init__(message)
        self.option = option
        self.problem = message if problem is None else problem


class OptionError(_WrongOption, ValueError):
    """A value that an option or argument cannot have; `option` and `problem` say which and why."""


class OptionTypeError(_WrongOption, TypeError):
    """A value of a type that an option cannot have, or an option that does not exist.

    `option` and `problem` are as in OptionError.
    """


class CheckpointError(Exception):
    """A checkpoint cannot be loaded, or cannot be run exactly; names the file and the cause."""


class EngineError(Exception):
    """What went wrong while a request ran or waited, other than a wrong option.

    `code` names the kind of error. Programs may rely on it; messages may change.
    """

    code: ClassVar[str] = "engine_error"


class QueueFull(EngineError):  # noqa: N818
    """As many rows run and wait as are allowed: try again later."""

    code = "queue_full"


class EngineClosedError(EngineError):
    """The model or the engine has been closed, or is shutting down: it takes no requests."""

    code = "engine_closed"


class EngineDeadError(EngineError):
    """Steps failed one after another, and the engine was given up: only loading again helps."""

    code = "engine_dead"


class StepFailedError(EngineError):
    """A step that the request was in failed; the next ones may work. `__cause__` is the reason."""

    code = "step_failed"


class RequestTimeoutError(EngineError):
    """The timeout passed before something was there that is of no use in part."""

    code = "timeout"


class RequestCancelledError(EngineError):
    """The request was cancelled before something was there that is of no use in part."""

    code = "cancelled"


class SlowReaderError(EngineError):
    """The request was cancelled, since too many of a stream's tokens waited to be read."""

    code = "slow_reader"


class RowFailedError(EngineError):
    """One row could not go on, and no other was hurt: what its own function or text raised."""

    code = "row_failed"


class NothingToDrawError(RowFailedError):
    """A row's logits gave it no next token."""

    code = "nothing_to_draw"

    def __init__(
        self, message: str = "the logits were NaN or infinite, or every token had been ruled out"
    ) -> None:
        super().__init__(message)


class NothingToRunError(EngineError):
    """Somebody waits for the engine, and no row is there that could run."""

    code = "nothing_to_run"


class OutOfBlocksError(EngineError):
    """Fewer KV blocks are free than are wanted; nothing was taken."""

    code = "out_of_blocks"


class ReentrantCallError(EngineError):
    """A function that a step calls has asked for another step of the same engine."""

    code = "reentrant_call"


class ForkedEngineError(EngineError):
    """This is a forked child, and what was asked for works in its parent only."""

    code = "forked"


def code_of(error: BaseException) -> str:
    """The code of what ended a row: an EngineError's own; all else is the row's own failure."""
    return error.code if isinstance(error, EngineError) else RowFailedError.code


def row_failed(message: str, code: str | None) -> RowFailedError:
    """The exception for a row that ended with an error of this code."""
    failed = NothingToDrawError if code == NothingToDrawError.code else RowFailedError
    return failed(message)


def ended_early(message: str, finish_reason: Literal["cancelled", "timeout"]) -> EngineError:
    """The exception for a row that ended before it had all that was asked for."""
    return (RequestTimeoutError if finish_reason == "timeout" else RequestCancelledError)(message)


@contextmanager
def about(option: str | None = None, *, where: str = "") -> Iterator[None]:
    """Errors in options that are raised within are of this option (None: of the one that they
    name), and begin with `where`.
    """
    try:
        yield
    except (OptionError, OptionTypeError) as error:
        raise type(error)(
            f"{where}{error}", option or error.option, f"{where}{error.problem}"
        ) from None


def message_of(error: BaseException) -> str:
    """What a result says of an error; EngineError's messages are whole sentences."""
    try:
        text = str(error)
    except Exception:  # an exception class of the caller's own may raise here, too
        text = ""
    if isinstance(error, EngineError):
        return text
    kind: type[BaseException] = type(error)
    if isinstance(error, (OptionError, OptionTypeError)):  # as the built-in that they are
        kind = ValueError if isinstance(error, ValueError) else TypeError
    return f"{kind.__name__}: {text}"


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
