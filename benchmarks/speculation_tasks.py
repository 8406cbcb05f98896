"""What bench_speculation.py asks for: texts that can be guessed, and texts that cannot.

The bundled model knows one book and copies nothing: after a passage and its first words again it
goes on in its own way (of 203 passages none was continued by more than 8 tokens). So where a task
is to write a given text, each request carries a `sequence_bias` of BIAS for each next token of that
text after the CONTEXT tokens before it: an option that every engine here can have, and that leaves
the model's own work as it is. Free text is the model's alone.

Passages are from the chapters that the model was not trained on (King James Bible, public domain).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgen.text.tokenizer import Tokenizer

HELD_OUT = Path(__file__).parents[1] / "tests" / "data" / "held_out.txt"
END, END_ID = "<|endoftext|>", 0
NEW = 96  # tokens that each request generates
LEAD = 8  # tokens of the wanted text that the prompt ends with
FREE_PROMPT, FREE_EVERY = 48, 192  # tokens before free text, and from one such prompt to the next
CONTEXT, BIAS = 16, 50.0  # tokens; nats, more than any two logits of the model are apart
LONGEST = 240  # tokens of a passage
RUN = 4  # tokens that count as repeated where they stand together earlier
SAMPLED = {"temperature": 0.8, "top_p": 0.95}
LIST_HEAD, LIST_LINES = 10, 24  # lines of a list in the prompt, and in all

Ids = list[int]
Generate = Callable[[Sequence[Ids]], Sequence[Sequence[int]]]  # prompts to greedy continuations


@dataclass(frozen=True)
class Case:
    """One request: its prompt, and its options (of SamplingParams), without lengths."""

    prompt: Ids
    options: dict[str, Any]


class Texts:
    """The held-out chapters, and what is made of them; the same in each run."""

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        self._tokenizer = tokenizer
        chapters = [chapter.strip().split("\n") for chapter in text.split(END)]
        self._chapters = [verses for _, *verses in chapters]  # without their headings
        self.words = re.findall(r"[A-Za-z]+", text)

    def encode(self, text: str) -> Ids:
        [ids] = self._tokenizer.encode([text])
        return ids

    def passages(self) -> list[str]:
        """Verses that follow each other, LEAD + NEW tokens or more each."""
        found = []
        for verses in self._chapters:
            passage = ""
            for verse in verses:
                passage += verse + "\n"
                if (length := len(self.encode(passage))) >= LEAD + NEW:
                    found += [passage] if length <= LONGEST else []
                    passage = ""
        return found

    def names(self) -> list[str]:
        """Words that are written with a capital wherever they stand."""
        lower = {word for word in self.words if word.islower()}
        capital = {word for word in self.words if word.istitle() and len(word) > 3}
        return sorted(word for word in capital if word.lower() not in lower)


def quoting(texts: Texts, count: int) -> list[Case]:
    """A passage, and its first words again: go on."""
    cases = []
    for passage in _spread(texts.passages(), count):
        ids = texts.encode(passage)
        cases.append(_written([END_ID, *ids, *ids[:LEAD]], ids[LEAD : LEAD + NEW]))
    return cases


def editing(texts: Texts, count: int) -> list[Case]:
    """A passage, then the same with one word changed wherever it stands."""
    rng = np.random.default_rng(1)
    cases = []
    for passage in _spread(texts.passages(), count):
        edited = _with_a_word_changed(passage, texts.words, rng)
        ids, new = texts.encode(passage), texts.encode(edited)
        cases.append(_written([END_ID, *ids, *new[:LEAD]], new[LEAD : LEAD + NEW]))
    return cases


def lists(texts: Texts, count: int) -> list[Case]:
    """Lines of one form, with other names and numbers in each."""
    rng = np.random.default_rng(2)
    names = texts.names()
    cases = []
    for _ in range(count):
        chosen = rng.choice(names, LIST_LINES, replace=False)
        lines = [_line(str(name), rng) for name in chosen]
        prompt = texts.encode("".join(lines[:LIST_HEAD]))
        rest = texts.encode("".join(lines[LIST_HEAD:]))
        cases.append(_written([END_ID, *prompt], rest[:NEW]))
    return cases


def free(texts: Texts, count: int, generate: Generate) -> dict[str, list[Case]]:
    """What the model writes by itself: greedy where it loops least, and most; and sampled.

    `generate` says what the model's greedy text is, by which prompts are chosen.
    """
    ids = texts.encode("\n".join(texts.passages()))
    starts = range(0, len(ids) - FREE_PROMPT, FREE_EVERY)
    prompts = [[END_ID, *ids[start : start + FREE_PROMPT]] for start in starts]
    looping = [repeats_itself(written) for written in generate(prompts)]
    order = np.argsort(looping, kind="stable").tolist()
    greedy = {"temperature": 0}
    return {
        "free": [Case(prompts[at], greedy) for at in order[:count]],
        "loops": [Case(prompts[at], greedy) for at in order[-count:]],
        "sampled": [
            Case(prompt, {**SAMPLED, "seed": seed})
            for seed, prompt in enumerate(_spread(prompts, count))
        ],
    }


def repeats_itself(written: Sequence[int]) -> float:
    """The share of its runs of RUN tokens that it has written before."""
    runs = _runs(written)
    return 1 - len(set(runs)) / len(runs)


def repeats_prompt(written: Sequence[int], prompt: Sequence[int]) -> float:
    """The share of its runs of RUN tokens that stand in the prompt."""
    known, runs = set(_runs(prompt)), _runs(written)
    return sum(run in known for run in runs) / len(runs)


def _runs(ids: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(ids[end - RUN : end]) for end in range(RUN, len(ids) + 1)]


def _written(prompt: Ids, text: Ids) -> Case:
    """A request that writes the text, greedily."""
    return Case(prompt, {"temperature": 0, "sequence_bias": bias_to(prompt, text)})


def bias_to(
    prompt: Sequence[int], text: Sequence[int], taken: Sequence[bool] | None = None
) -> dict[tuple[int, ...], float]:
    """A sequence_bias for each token of the text, or for those that are `taken`."""
    ids = [*prompt, *text]
    ends = range(len(prompt), len(ids))
    return {
        tuple(ids[max(0, end - CONTEXT) : end + 1]): BIAS
        for at, end in enumerate(ends)
        if taken is None or taken[at]
    }


def _with_a_word_changed(passage: str, words: Sequence[str], rng: np.random.Generator) -> str:
    """The word of four letters or more that stands there most often, by another of the book."""
    own = Counter(re.findall(r"[A-Za-z]{4,}", passage))
    [(word, _)] = own.most_common(1)
    others = sorted({each for each in words if len(each) >= 4 and each not in own})
    other = str(rng.choice(others))
    return re.sub(rf"\b{word}\b", other, passage)


_ONES = ["two", "three", "four", "five", "six", "seven", "eight", "nine"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def _line(name: str, rng: np.random.Generator) -> str:
    hundreds, tens, ones = (str(rng.choice(each)) for each in (_ONES, _TENS, _ONES))
    return f"The children of {name}, {hundreds} hundred {tens} and {ones}.\n"


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """`count` of them, from the whole range.

    Raises:
        ValueError: there are not so many.
    """
    if count > len(items):
        raise ValueError(f"{count} different prompts are wanted, {len(items)} can be made")
    return [items[at * len(items) // count] for at in range(count)]
