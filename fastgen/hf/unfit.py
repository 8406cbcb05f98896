"""The exception that sends a call the slower, more general way."""

from __future__ import annotations


class UnfitError(Exception):
    """fastgen cannot do this exactly as transformers would; the message says what."""
