"""Stop strings that are special tokens, or hold one: the row ends there, and they do not show."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import fastgen
from fastgen.text.tokenizer import Tokenizer
from text_parts import tokenizer_at, tokenizer_of
from tokenizer_folders import EOS, KINDS, write_bert, write_vocab_and_merges

USER, NOTE = "<|user|>", "<note>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """GPT-2's kind, with two special tokens beside the one of its vocabulary."""
    folder = tmp_path_factory.mktemp("chat")
    write_vocab_and_merges(folder, "GPT2Tokenizer", extra_special_tokens=[USER, NOTE])
    return tokenizer_at(folder)


def run(
    tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str], include_stop: bool = False
) -> tuple[str, str | None, int]:
    """What is streamed, the reason, and how many tokens the row has taken."""
    sink = tokenizer.sink(stops, include_stop=include_stop)
    pieces, taken = [], 0
    for token_id in ids:
        ended = sink.push(token_id)
        pieces.append(sink.take())
        taken += 1
        if ended:
            break
    sink.finish()
    pieces.append(sink.take())
    assert "".join(pieces) == sink.text
    return sink.text, sink.stop_reason, taken


@pytest.mark.parametrize(
    ("text", "stops", "before", "reason"),
    [
        (f"hello{USER}you", [USER], "hello", USER),
        (f"{USER}you", [USER], "", USER),
        (f"a {NOTE} b{USER}you", [USER], "a  b", USER),
        (f"a{EOS}b", [EOS], "a", EOS),
        (f"hello\n{USER}you", [f"\n{USER}"], "hello", f"\n{USER}"),
        (f"hello{USER}{NOTE}you", [f"{USER}{NOTE}"], "hello", f"{USER}{NOTE}"),
        (f"he{USER}you", [f"e{USER}yo"], "h", f"e{USER}yo"),
        (f"he{USER}you", ["user"], "he", "user"),
        (f"he{USER}you", ["|>y"], "he", "|>y"),
        (f"a{USER}b{NOTE}c", [NOTE, USER], "a", USER),
        (f"你{USER}好", [f"你{USER}"], "", f"你{USER}"),
        (f"a{USER}b", ["ab"], "ab", None),  # in the text as it stands there is no "ab"
        (f"a{USER}b{USER}", [f"{NOTE}"], "ab", None),
        (f"a{USER}b", [f"{USER}{USER}"], "ab", None),
        (f"a<|us{USER}b", [USER], "a<|us", USER),
    ],
)
def test_special_tokens_end_a_row(
    tokenizer: Tokenizer, text: str, stops: list[str], before: str, reason: str | None
) -> None:
    [ids] = tokenizer.encode([text])
    assert run(tokenizer, ids, stops)[:2] == (before, reason)
    assert run(tokenizer, ids, stops, include_stop=True)[:2] == (before + (reason or ""), reason)


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    return (min(ends)[0], min(ends)[2]) if ends else None


def test_stops_as_the_text_with_special_tokens_has_them(tokenizer: Tokenizer) -> None:
    """The text before a stop string is that of the tokens before it, without the special ones."""
    rng = random.Random(3)
    ended = 0
    for _ in range(400):
        text = "".join(rng.choices([USER, NOTE, EOS, "a", "b", "<|", "user", "|>", "你"], k=10))
        start = rng.randrange(len(text))
        stops = [text[start : start + rng.randrange(1, 14)], NOTE + "a" + USER]
        [ids] = tokenizer.encode([text])
        match = first_stop(text, stops)
        end, reason = (len(text), None) if match is None else match
        before = text[: end - len(reason or "")]
        for special in (USER, NOTE, EOS):
            before = before.replace(special, "")
        # A stop may begin within a special token: the token's first characters do not show.
        cut = [special[:n] for special in (USER, NOTE, EOS) for n in range(1, len(special))]
        shown, found, _ = run(tokenizer, ids, stops)
        assert found == reason
        assert shown == before or any(before == shown + beginning for beginning in cut)
        ended += reason is not None
    assert ended > 300


@pytest.mark.parametrize("kind", ["bert", "bert japanese", "t5", "gpt-sw3", "xlm-r"])
def test_special_tokens_of_other_classes(kind: str, tmp_path: Path) -> None:
    KINDS[kind][0](tmp_path)
    opened = tokenizer_at(tmp_path)
    special = "[SEP]" if kind.startswith("bert") else "</s>" if kind != "gpt-sw3" else "<s>"
    for before, after in (("hello a", "b"), ("a", "hello"), ("", "b")):
        [first], [middle], [last] = (opened.encode([text]) for text in (before, special, after))
        shown, reason, taken = run(opened, [*first, *middle, *last], [special])
        assert (shown, reason) == (opened.decode(first), special)
        assert taken == len([*first, *middle])


def test_a_stop_may_hold_the_space_before_a_special_token(tmp_path: Path) -> None:
    """As the class writes tokens out: BERT's with spaces between them."""
    write_bert(tmp_path)
    opened = tokenizer_at(tmp_path)
    [ids] = opened.encode(["hello a[SEP]b"])
    assert run(opened, ids, ["a [SEP] b"]) == ("hello ", "a [SEP] b", len(ids))


def test_from_end_to_end(idle_model: fastgen.Generator) -> None:
    """Under ignore_eos the end of text is a token like others, and a stop string may be it."""
    bias = {0: 10.0}
    tokenizer = tokenizer_of(idle_model)
    eos = tokenizer.encode([EOS])[0]
    assert eos == [0]
    ended = 0
    for seed in range(6):
        options: dict[str, Any] = {
            "seed": seed,
            "ignore_eos": True,
            "max_new_tokens": 24,
            "logit_bias": bias,
        }
        [whole] = idle_model.generate("In the", **options)[0].completions
        if 0 not in whole.token_ids:
            continue
        before = whole.token_ids[: whole.token_ids.index(0)]
        [row] = idle_model.generate("In the", stop=EOS, **options)[0].completions
        assert row.text == tokenizer.decode(before)
        assert (row.finish_reason, row.stop_reason) == ("stop", EOS)
        assert row.token_ids == (*before, 0)
        [kept] = idle_model.generate("In the", stop=EOS, include_stop=True, **options)
        assert kept.text == row.text + EOS
        pieces = list(idle_model.stream("In the", stop=EOS, **options))
        assert "".join(map(str, pieces)) == row.text
        assert pieces[-1].stop_reason == EOS
        ended += 1
    assert ended
