"""The exceptions that are not the caller's: what a file holds, and what the engine met."""

from __future__ import annotations


class CheckpointError(Exception):
    """A checkpoint cannot be loaded, or cannot be run exactly; names the file and the cause."""


class EngineError(Exception):
    """The engine could not do what was asked, through no fault in the request itself."""
