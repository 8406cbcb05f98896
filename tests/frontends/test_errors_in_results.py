"""What goes wrong for one completion stands in its result, and in its last piece."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastgen
from engine_harness import (
    greedy,
)


def raises(token_ids: np.ndarray, logits: np.ndarray) -> None:
    raise KeyError("mine")


def test_results_say_what_went_wrong(idle_model: fastgen.Generator) -> None:
    """generate does not raise for it, and the other prompts have their text."""
    params = [greedy(max_new_tokens=5), greedy(max_new_tokens=5, logits_processor=raises)]
    fine, bad = idle_model.generate(["In the beginning"] * 2, params)
    assert fine.completions[0].error is None and len(fine.text) > 5
    assert (bad.completions[0].finish_reason, bad.completions[0].stop_reason) == ("error", None)
    assert bad.completions[0].error == "KeyError: 'mine'"
    [piece] = idle_model.stream("In", params[1])
    assert (piece.finish_reason, piece.error) == ("error", "KeyError: 'mine'")
    *_, last = idle_model.stream("In", params[0])
    assert (last.finish_reason, last.error) == ("length", None)
    with pytest.raises(fastgen.EngineError, match="generation failed: KeyError: 'mine'"):
        idle_model("In", params[1])


def test_text_that_cannot_be_decoded_is_its_completions_error(
    idle_model: fastgen.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert idle_model.tokenizer is not None
    make, calls = idle_model.tokenizer.sink, iter(range(10))

    def failing(*args: Any, **options: Any) -> Any:
        if next(calls) == 1:
            raise UnicodeError("no text")
        return make(*args, **options)

    monkeypatch.setattr(idle_model.tokenizer, "sink", failing)
    [generation] = idle_model.generate("In the beginning", n=3, max_new_tokens=4, ignore_eos=True)
    first, second, third = generation.completions
    assert (second.finish_reason, second.error) == ("error", "UnicodeError: no text")
    assert len(second.token_ids) == 4, "its tokens are there"
    assert first.error is third.error is None and first.text and third.text
