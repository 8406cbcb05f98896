"""TextSink: the text of one row while its tokens arrive, and its stop strings.

Shown text is final. Bytes of an unfinished character wait for the rest; text that may begin a stop
string waits until that is decided. Stop strings are looked for in the text with special tokens
written out, though these are not shown: a row can end at one, or at a string that holds one.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

_REPLACEMENT = "\ufffd"
_NONE: Mapping[int, str] = MappingProxyType({})
_MAX_HELD_TOKENS = 8  # a UTF-8 character has at most 4 bytes: more held tokens will never decode


class Sink(Protocol):
    """Receives a row's tokens, on the step's thread."""

    @property
    def stop_reason(self) -> str | None:
        """The stop string that has ended the row, if one has."""
        ...

    def push(self, token_id: int) -> bool:
        """Take the row's next token; returns whether the row ends with it."""
        ...

    def finish(self) -> None:
        """The row has ended; called once."""
        ...


class Detokenizer(Protocol):
    """Turns ids into text one by one; text comes as soon as its characters are complete."""

    def special_text(self, token_id: int) -> str:
        """What a special token, which `push` leaves out, would add to the text so far."""
        ...

    def push(self, token_id: int) -> str: ...
    def finish(self) -> str: ...


class Decoding(Protocol):
    def decode(self, token_ids: Sequence[int]) -> str: ...
    def decode_all(self, token_ids: Sequence[int]) -> str:
        """With special tokens written out."""
        ...


class ByteLevelDecoder:
    """For vocabularies whose tokens are byte strings (GPT-2's): an incremental UTF-8 decoder."""

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        special_text: Callable[[int], str] = lambda token_id: "",
    ) -> None:
        self._token_bytes, self._special_text = token_bytes, special_text
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def special_text(self, token_id: int) -> str:
        return self._special_text(token_id)

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._token_bytes(token_id))

    def finish(self) -> str:
        return self._decoder.decode(b"", True)


class WindowDecoder:
    """For every other tokenizer: decodes the last few tokens with and without the new one.

    The window begins at the token before the last text was shown, so that rules between neighbours
    (spaces between words, byte fallback) apply; its length does not grow with the row. Before mere
    spaces the last word is kept, since a text's first spaces may be left out. `special`: texts by
    id.
    """

    def __init__(self, tokenizer: Decoding, special: Mapping[int, str] = _NONE) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._window: list[int] = []
        self._shown = 0  # how many of the window's tokens have been shown
        self._word = 0  # how many of those, from the first on, are the last with more than spaces
        self._unfinished = 0  # how many characters at the end of those were not

    def special_text(self, token_id: int) -> str:
        """With the space that the tokenizer may put before it."""
        text = self._special.get(token_id, "")
        if not text or not self._window:
            return text
        before = self._tokenizer.decode_all(self._window)
        after = self._tokenizer.decode_all([*self._window, token_id])
        return after[len(before) :] if after.startswith(before) else text

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        held = len(self._window) - self._shown
        text = self._new_text()
        if text.endswith(_REPLACEMENT) and held < _MAX_HELD_TOKENS:
            return ""
        if not text and held >= _MAX_HELD_TOKENS:  # special tokens only: the window must not grow
            del self._window[self._shown :]
        ready = text.rstrip(_REPLACEMENT) or text  # tokens may end within characters for ever
        return self._show(ready, len(text) - len(ready))

    def finish(self) -> str:
        return self._show(self._new_text())

    def _new_text(self) -> str:
        decode = self._tokenizer.decode
        before = len(decode(self._window[: self._shown])) if self._shown else 0
        return decode(self._window)[before - self._unfinished :]

    def _show(self, text: str, unfinished: int = 0) -> str:
        if text:  # a token without text (a special one) leaves the window as it is
            word, new = self._window[: self._word], self._window[self._shown :]
            self._window = [*word, *new] if text.isspace() else new
            self._word = len(word) if text.isspace() else len(new)
            self._shown, self._unfinished = len(self._window), unfinished
        return text


class StopMatcher:
    """Finds the first of several strings in a text that comes character by character.

    Knuth, Morris and Pratt's automaton, one per string: each character costs amortised O(1) a
    string, whatever the strings' lengths, and where the tokens are cut makes no difference.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(stop, _prefix_function(stop)) for stop in stops]
        self._matched = [0] * len(stops)  # longest prefix of each stop that ends the text so far
        self._first = {stop[0] for stop in stops}

    @property
    def num_held(self) -> int:
        """How many of the last characters may belong to a stop string."""
        return max(self._matched, default=0)

    def feed(self, text: str) -> tuple[int, str] | None:
        """The end, as an index into `text`, of the first stop string completed, and the string.

        Of several that end at the same character, the longest.
        """
        if not any(self._matched) and self._first.isdisjoint(text):
            return None
        for at, character in enumerate(text):
            complete = [stop for i, (stop, _) in enumerate(self._stops) if self._step(i, character)]
            if complete:
                return at + 1, max(complete, key=len)
        return None

    def _step(self, index: int, character: str) -> bool:
        stop, prefix = self._stops[index]
        matched = self._matched[index]
        while matched and stop[matched] != character:
            matched = prefix[matched - 1]
        matched += stop[matched] == character
        self._matched[index] = matched
        return matched == len(stop)


class TextSink:
    """Text of one row. `push` is called on the step thread, `take` by whoever reads the stream.

    Attributes:
        stop_reason: the stop string that was completed, else None.
    """

    def __init__(
        self, detokenizer: Detokenizer, stop: Sequence[str] = (), *, include_stop: bool = False
    ) -> None:
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stop) if stop else None
        self._include_stop = include_stop
        self._held: deque[tuple[str, bool]] = deque()  # may begin a stop string; whether it shows
        self._num_held = 0  # its characters
        self._pieces: list[str] = []  # appended to by the step thread only
        self._ends: list[int] = []  # how many pieces there were after each token
        self._taken = 0
        self.stop_reason: str | None = None

    @property
    def text(self) -> str:
        """All that may be shown so far."""
        return "".join(self._pieces)

    def push(self, token_id: int) -> bool:
        """Add a token; true when that completes a stop string. O(1) amortised."""
        ends = self._push(token_id)
        self._ends.append(len(self._pieces))
        return ends

    def finish(self) -> None:
        """The row has ended: show what was held back."""
        if self.stop_reason is None:
            self._show(self._detokenizer.finish())
            self._release(self._num_held)

    def take(self, num_tokens: int | None = None) -> str:
        """What can be shown and has not been taken yet; of the first `num_tokens` tokens, if given,
        as far as they have been pushed."""
        end = len(self._pieces)
        if num_tokens is not None:
            num_tokens = min(num_tokens, len(self._ends))
            end = self._ends[num_tokens - 1] if num_tokens else 0
        new, self._taken = self._pieces[self._taken : end], end
        return "".join(new)

    def _push(self, token_id: int) -> bool:
        if self._matcher is not None:
            special = self._detokenizer.special_text(token_id)
            if special and self._match(self._matcher, special, shows=False):
                return True
        return self._show(self._detokenizer.push(token_id))

    def _show(self, text: str) -> bool:
        if text and self._matcher is not None:
            return self._match(self._matcher, text, shows=True)
        if text:
            self._pieces.append(text)
        return False

    def _match(self, matcher: StopMatcher, text: str, *, shows: bool) -> bool:
        match = matcher.feed(text)
        self._held.append((text, shows))
        self._num_held += len(text)
        if match is None:
            self._release(self._num_held - matcher.num_held)
            return False
        end, self.stop_reason = match
        self._release(self._num_held - len(text) + end - len(self.stop_reason))
        if self._include_stop:
            self._pieces.append(self.stop_reason)
        self._held.clear()
        self._num_held = 0
        return True

    def _release(self, count: int) -> None:
        """Decide of the first `count` of the characters held that they belong to no stop string."""
        self._num_held -= count
        while count:
            piece, shows = self._held.popleft()
            if len(piece) > count:
                self._held.appendleft((piece[count:], shows))
                piece = piece[:count]
            if shows:
                self._pieces.append(piece)
            count -= len(piece)


def _prefix_function(pattern: str) -> list[int]:
    """For each prefix of `pattern`: the length of its longest proper prefix that is its suffix."""
    lengths = [0] * len(pattern)
    matched = 0
    for at in range(1, len(pattern)):
        while matched and pattern[at] != pattern[matched]:
            matched = lengths[matched - 1]
        matched += pattern[at] == pattern[matched]
        lengths[at] = matched
    return lengths
