"""Streamers and pipelines of transformers, with a fastgen model."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AsyncTextIteratorStreamer,
    LogitsProcessorList,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

import fastgen
from fastgen.frontends.generator import BUNDLED_MODEL
from hf_models import Recorder, generated, kv_rows_of, pair
from waits import WITHIN

CALL = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED_MODEL, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, fastgen.GPT2LMHeadModel]:
    theirs = transformers.GPT2LMHeadModel.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    return theirs, fastgen.accelerate(theirs)


def _prompts(tokenizer: Any, *texts: str) -> dict[str, torch.Tensor]:
    return dict(tokenizer(list(texts), return_tensors="pt", padding=True))


@pytest.mark.parametrize("texts", [["In the beginning"], ["In the", "The king of the south said"]])
@pytest.mark.parametrize("eos", [None, [269, 14, 268]])
def test_a_streamer_sees_what_transformers_shows(
    tokenizer: Any, bundled: Any, texts: list[str], eos: Any
) -> None:
    seen = []
    for model in bundled:
        recorder = Recorder()
        call = {**_prompts(tokenizer, *texts), **CALL, "eos_token_id": eos, "pad_token_id": 0}
        output = generated(model, **call, streamer=recorder)
        streamed = [v if v.dim() == 2 else v[:, None] for v in recorder.values]
        assert torch.equal(torch.cat(streamed, 1), output) and recorder.ends == 1
        seen.append(recorder.values)
    assert bundled[1].last_path == "native"
    assert len(seen[0]) == len(seen[1])
    for one, other in zip(*seen, strict=True):
        assert one.shape == other.shape and torch.equal(one, other)


def test_text_streamer(tokenizer: Any, bundled: Any, capsys: Any) -> None:
    texts = []
    for model in bundled:
        streamer = TextStreamer(tokenizer, skip_prompt=True)
        generated(model, **_prompts(tokenizer, "In the beginning"), **CALL, streamer=streamer)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0]) > 20


def test_one_streamer_a_row(tokenizer: Any, bundled: Any) -> None:
    """transformers has none for batches; here a list gives each row its own."""
    _, ours = bundled
    batch = _prompts(tokenizer, "In the", "The king of the south said", "It was")
    streamers = [TextIteratorStreamer(tokenizer, skip_prompt=True) for _ in range(3)]
    output = generated(ours, **batch, **CALL, eos_token_id=[269, 14], streamer=streamers)
    length = batch["input_ids"].shape[1]
    for row, streamer in zip(output[:, length:], streamers, strict=True):
        text = "".join(streamer)
        ends = torch.isin(row, torch.tensor([269, 14])).nonzero()
        row = row[: int(ends[0]) + 1] if len(ends) else row
        assert text == tokenizer.decode(row)
    looped = [Recorder() for _ in range(3)]
    ours.generate(**batch, **CALL, streamer=looped, renormalize_logits=True, guidance_scale=1.2)
    assert ours.last_path == "forward"
    assert [len(recorder.values) for recorder in looped] == [13] * 3
    assert all(recorder.ends == 1 and len(recorder.values[0]) == 1 for recorder in looped)
    error = generated(ours, **batch, **CALL, streamer=streamers[:2])
    assert isinstance(error, ValueError) and "2 streamers were given for 3 rows" in str(error)


def test_a_reader_in_another_thread(tokenizer: Any, bundled: Any) -> None:
    _, ours = bundled
    batch = _prompts(tokenizer, "In the beginning")
    expected = tokenizer.decode(generated(ours, **batch, **CALL)[0])
    streamer = TextIteratorStreamer(tokenizer, timeout=WITHIN)
    call = {**batch, **CALL, "streamer": streamer}
    thread = threading.Thread(target=generated, args=(ours,), kwargs=call, daemon=True)
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == expected and len([piece for piece in pieces if piece]) > 3


def _raise(ids: Any, scores: Any) -> Any:
    raise OSError("the processor's own")


FAILURES: dict[str, dict[str, Any]] = {
    "in the loop": {"logits_processor": LogitsProcessorList([_raise])},
    "an unknown option": {"temprature": 2},
    "a bad value": {"do_sample": True, "temperature": -1.0},
    "a prompt too long": {"max_length": 1, "max_new_tokens": None},
    "an id out of range": {"input_ids": torch.tensor([[10**6]]), "attention_mask": None},
}


@pytest.mark.parametrize("failure", FAILURES)
def test_an_error_reaches_the_reader(tokenizer: Any, bundled: Any, failure: str) -> None:
    """And hangs nobody: in transformers the reader would wait for ever."""
    _, ours = bundled
    batch = _prompts(tokenizer, "In the beginning")
    streamer = TextIteratorStreamer(tokenizer, timeout=WITHIN)
    call = {**batch, **CALL, "streamer": streamer, **FAILURES[failure]}
    raised: list[BaseException] = []
    thread = threading.Thread(target=lambda: raised.append(generated(ours, **call)), daemon=True)
    thread.start()
    with pytest.raises(type(error) if (error := _error(ours, call)) else Exception) as caught:
        list(streamer)
    thread.join()
    assert caught.value is raised[0]


def _error(model: Any, call: dict[str, Any]) -> Exception | None:
    error = generated(model, **{**call, "streamer": None})
    return error if isinstance(error, Exception) else None


def test_an_error_reaches_an_asynchronous_reader(tokenizer: Any, bundled: Any) -> None:
    _, ours = bundled
    batch = _prompts(tokenizer, "In the beginning")

    async def read() -> None:
        streamer = AsyncTextIteratorStreamer(tokenizer, timeout=WITHIN)
        call = {**batch, **CALL, "streamer": streamer, **FAILURES["in the loop"]}
        thread = threading.Thread(target=generated, args=(ours,), kwargs=call, daemon=True)
        thread.start()
        with pytest.raises(OSError, match="own"):
            async for _ in streamer:
                pass
        thread.join()

    asyncio.run(read())


def test_a_failing_streamer_ends_the_call_and_frees_its_rows(tokenizer: Any, bundled: Any) -> None:
    _, ours = bundled

    class Failing(Recorder):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.values) == 4:
                raise OSError("the pipe is closed")

    batch = _prompts(tokenizer, "In the", "The king of the south said")
    error = generated(ours, **batch, **CALL, streamer=Failing())
    assert isinstance(error, OSError)
    engine = kv_rows_of(ours).engine
    assert engine.num_unfinished == 0
    assert isinstance(generated(ours, **batch, **CALL), torch.Tensor)


def test_a_streamer_and_beams_are_refused_as_in_transformers() -> None:
    theirs, ours = pair()
    ids = torch.tensor([[20, 30]])
    errors = [generated(m, input_ids=ids, num_beams=2, streamer=Recorder()) for m in (theirs, ours)]
    assert str(errors[0]) == str(errors[1]) and isinstance(errors[1], ValueError)


@pytest.fixture
def pipelines(tokenizer: Any, bundled: Any) -> Iterator[list[Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield [pipeline("text-generation", model=m, tokenizer=tokenizer) for m in bundled]


TEXTS = ["In the beginning", "The king", "It was a dark and", "She", "When the sun had set, they"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_full_text": False},
        {"max_new_tokens": 7},
        {"num_return_sequences": 3, "num_beams": 3},
        {"batch_size": 4},
        {"stop_sequence": "the"},
        {"return_tensors": True},
        {"repetition_penalty": 1.2, "batch_size": 2},
    ],
    ids=str,
)
def test_pipelines(pipelines: list[Any], options: dict[str, Any]) -> None:
    common = {"do_sample": False, "max_new_tokens": 10, **options}
    for prompts in (TEXTS[0], TEXTS, [TEXTS[1]]):
        expected, got = (pipe(prompts, **common) for pipe in pipelines)
        assert got == expected
        assert pipelines[1].model.last_path == "native"


def test_a_pipeline_starts_an_empty_prompt_from_bos(pipelines: list[Any]) -> None:
    expected, got = (pipe("", do_sample=False, max_new_tokens=10) for pipe in pipelines)
    assert got == expected and len(got[0]["generated_text"]) > 5


def test_a_pipeline_that_samples(pipelines: list[Any]) -> None:
    _, pipe = pipelines
    torch.manual_seed(0)
    results = pipe(TEXTS[0], num_return_sequences=4, max_new_tokens=10)
    assert len({result["generated_text"] for result in results}) > 1
    assert all(result["generated_text"].startswith(TEXTS[0]) for result in results)
    torch.manual_seed(0)
    assert pipe(TEXTS[0], num_return_sequences=4, max_new_tokens=10) == results
    assert pipe.model.last_path == "native"
