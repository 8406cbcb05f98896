"""generate, stream, score and load, as their users call them, on the bundled model."""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch

import fastgen
from data_files import GREEDY_100, HELD_OUT
from engine_harness import assert_linear
from fastgen.frontends.generator import BUNDLED_MODEL
from held_steps import stepping
from variant_cases import load_transformers
from waits import WITHIN, wait_until


@pytest.fixture(scope="module")
def model() -> Iterator[fastgen.Generator]:
    """As load makes it, in place of this folder's."""
    with fastgen.load() as loaded:
        yield loaded


@pytest.mark.parametrize("decoder", ["cpu", "torch"])
def test_the_bundled_models_100_greedy_tokens(decoder: str) -> None:
    with fastgen.load(decoder=decoder, max_batch_size=1) as model:
        text = model("And it came to pass", temperature=0, max_new_tokens=100)
    assert text == GREEDY_100.read_text()


def test_streamed_is_whole(idle_model: fastgen.Generator) -> None:
    for seed in range(5):
        options: dict[str, Any] = {
            "seed": seed,
            "max_new_tokens": 60,
            "temperature": 1.2,
            "n": 3,
            "logprobs": 1,
        }
        [whole] = idle_model.generate("And the king said", **options)
        pieces = list(idle_model.stream("And the king said", **options))
        for completion in whole.completions:
            mine = [piece for piece in pieces if piece.index == completion.index]
            assert "".join(map(str, mine)) == completion.text
            assert sum((piece.token_ids for piece in mine), ()) == completion.token_ids
            scored = [entry.logprob for piece in mine for entry in piece.logprobs or ()]
            wanted = [entry.logprob for entry in completion.logprobs or ()]
            assert len(scored) == len(completion.token_ids)
            assert scored == pytest.approx(wanted, abs=1e-4)
            assert [piece.finish_reason for piece in mine[:-1]] == [None] * (len(mine) - 1)
            assert mine[-1].finish_reason == completion.finish_reason


def test_same_seed_same_tokens_alone_or_among_others(idle_model: fastgen.Generator) -> None:
    prompts = [f"{word} of the" for word in ["day", "king", "house", "land", "God", "people"]]
    params = [fastgen.SamplingParams(seed=i, max_new_tokens=20, top_p=0.9) for i in range(6)]
    together = idle_model.generate(prompts, params)
    for prompt, options, wanted in zip(prompts, params, together, strict=True):
        [alone] = idle_model.generate(prompt, options)
        assert alone.completions == wanted.completions


def test_a_completions_own_seed_repeats_it(idle_model: fastgen.Generator) -> None:
    [generation] = idle_model.generate("In the beginning", n=3, max_new_tokens=12)
    for completion in generation.completions:
        [again] = idle_model.generate("In the beginning", seed=completion.seed, max_new_tokens=12)
        assert again.completions[0].token_ids == completion.token_ids
    assert len({completion.seed for completion in generation.completions}) == 3


def test_prompts_in_every_form(idle_model: fastgen.Generator) -> None:
    tokenizer = idle_model.tokenizer
    assert tokenizer is not None
    [ids] = tokenizer.encode(["In the beginning"])
    options: dict[str, Any] = {"temperature": 0, "max_new_tokens": 5}
    text = idle_model("In the beginning", **options)
    assert isinstance(text, str)
    assert idle_model(ids, **options) == text
    assert idle_model(tuple(ids), **options) == text
    assert idle_model(np.array(ids), **options) == text
    assert idle_model(torch.tensor(ids), **options) == text
    assert idle_model(["In the beginning", ids], **options) == [text, text]
    assert idle_model(torch.tensor([ids, ids]), **options) == [text, text]
    assert idle_model.generate([], **options) == []
    from_bos = idle_model([0], **options)
    assert idle_model("", **options) == from_bos
    assert idle_model([[]], **options) == [from_bos]


def test_eos_stop_ids_and_stop_strings_end_a_row(idle_model: fastgen.Generator) -> None:
    prompt = "And God said"
    options: dict[str, Any] = {"temperature": 0, "max_new_tokens": 40}
    [free] = idle_model.generate(prompt, **options)
    tokens, text = free.completions[0].token_ids, free.completions[0].text
    stop_id = tokens[6]
    [by_id] = idle_model.generate(prompt, stop_token_ids=[stop_id], **options)
    end = tokens.index(stop_id) + 1
    assert by_id.completions[0].token_ids == tokens[:end]
    assert (by_id.completions[0].finish_reason, by_id.completions[0].stop_reason) == (
        "stop",
        stop_id,
    )
    assert idle_model.tokenizer is not None
    assert by_id.completions[0].text == idle_model.tokenizer.decode(tokens[: end - 1])
    [kept] = idle_model.generate(prompt, stop_token_ids=[stop_id], include_stop=True, **options)
    assert kept.completions[0].text == idle_model.tokenizer.decode(tokens[:end])
    stop = text[20:24]
    [by_text] = idle_model.generate(prompt, stop=stop, **options)
    assert by_text.completions[0].text == text[: text.index(stop)]
    assert by_text.completions[0].stop_reason == stop
    [with_stop] = idle_model.generate(prompt, stop=[stop], include_stop=True, **options)
    assert with_stop.completions[0].text == text[: text.index(stop)] + stop


def test_eos_ends_a_row_unless_ignored(idle_model: fastgen.Generator) -> None:
    prompt = HELD_OUT.read_text()[-120:]  # the very end of a chapter
    seeds = range(40)
    rows = [c for g in idle_model.generate([prompt] * 40, [
        fastgen.SamplingParams(seed=seed, max_new_tokens=80) for seed in seeds
    ]) for c in g.completions]  # fmt: skip
    ended = [row for row in rows if row.finish_reason == "stop"]
    assert ended, "with 40 seeds some must end"
    assert all(row.token_ids[-1] == 0 and row.stop_reason is None for row in ended)
    assert all("<|endoftext|>" not in row.text for row in ended)
    seed, length = ended[0].seed, len(ended[0].token_ids)
    [on] = idle_model.generate(prompt, seed=seed, max_new_tokens=80, ignore_eos=True)
    assert on.completions[0].token_ids[:length] == ended[0].token_ids
    assert on.completions[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.generate("x", temprature=1), TypeError, "did you mean 'temperature'"),
        (lambda m: m.generate("x", fastgen.SamplingParams(), n=2), TypeError, "not both"),
        (lambda m: m.generate(["x", "y"], [fastgen.SamplingParams()]), ValueError, "2 prompts"),
        (lambda m: m.generate("x", {"n": 2}), TypeError, "SamplingParams"),
        (lambda m: m.generate(7), TypeError, "strings or token ids"),
        (lambda m: m.generate(b"x"), TypeError, "bytes"),
        (lambda m: m.generate(p for p in ["a", "b"]), TypeError, "generator"),
        (lambda m: m(map(str, [1])), TypeError, "map"),
        (lambda m: m.score(iter(["a b"])), TypeError, "iterator"),
        (lambda m: m.score(["fine", [99_999]]), ValueError, "text 1: .*99999"),
        (lambda m: m.score([[object()]]), TypeError, "object"),
        (lambda m: m.generate(["fine", [1, 2, 9999]]), ValueError, "prompt 1: .*9999"),
        (lambda m: m.generate("word " * 3000), ValueError, "tokens"),
        (lambda m: m.generate("x" * 10**7), ValueError, "even at"),
        (lambda m: m.generate("x", stop_token_ids=[5000]), ValueError, "5000"),
        (lambda m: m.stream(["a", "b"]), TypeError, "one prompt"),
        (lambda m: m.generate("x", timeout=-1), ValueError, "timeout"),
        (lambda m: fastgen.load(max_seq_len=2000), ValueError, "1024 positions"),
        (lambda m: fastgen.load(dtype="float8"), ValueError, "dtype"),
        (lambda m: fastgen.load(decoder="gpu"), ValueError, "decoder"),
        (lambda m: fastgen.load(device="warp"), ValueError, "device='warp'"),
        (lambda m: fastgen.load(device="meta"), ValueError, "device='meta'"),
        (lambda m: fastgen.load(device=cast(str, None)), TypeError, "device"),
        (lambda m: fastgen.load(max_batch_size=10**6), ValueError, "max_batch_size"),
        (lambda m: fastgen.load(""), fastgen.CheckpointError, "empty"),
        (lambda m: fastgen.load(quantise="int8"), TypeError, "did you mean 'quantize'"),
        (lambda m: fastgen.load(quantize="int4"), ValueError, "int8"),
        (lambda m: fastgen.load(quantize="int8", decoder="torch"), ValueError, "torch deco"),
        (lambda m: fastgen.load(quantize="int8", dtype="float16"), ValueError, "float32"),
        (
            lambda m: fastgen.load(batch_invariant=True, decoder="torch"),
            ValueError,
            "batch_invariant",
        ),
        (lambda m: fastgen.load(decoder="cpu", device="cuda"), ValueError, "CPU only"),
        (lambda m: fastgen.load(max_batch_size=0), ValueError, "max_batch_size"),
        (lambda m: fastgen.load(max_memory=10), ValueError, "MB of KV"),
        (lambda m: fastgen.load(3), TypeError, "int"),
        (lambda m: fastgen.load("./nowhere"), fastgen.CheckpointError, "no such folder"),
        (lambda m: fastgen.load("no/such-model"), fastgen.CheckpointError, "no/such-model"),
    ],
)
def test_mistakes_are_named(
    idle_model: fastgen.Generator, call: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(idle_model)


def test_a_wrong_prompt_among_many_costs_nothing(idle_model: fastgen.Generator) -> None:
    before = idle_model.engine.stats.steps
    with pytest.raises(ValueError, match="prompt 50"):
        idle_model.generate([*["fine"] * 50, [70_000]], max_new_tokens=3)
    assert idle_model.engine.stats.steps == before


def test_max_memory_caps_the_kv_cache() -> None:
    with fastgen.load(max_memory=150) as model:
        assert model.plan.memory.total <= 150 * 2**20
        assert model.plan.memory.num_blocks >= 32
        texts = model(["one", "two", "three"], temperature=0, max_new_tokens=300, ignore_eos=True)
        assert len(texts) == 3
    with fastgen.load(max_seq_len=64, max_batch_size=2) as small:
        assert small.plan.memory.kv_tokens == 128
        [generation] = small.generate("In the beginning", max_new_tokens=500, ignore_eos=True)
        assert len(generation.prompt_token_ids) + len(generation.completions[0].token_ids) == 64


def test_a_transformers_model_in_memory(idle_model: fastgen.Generator) -> None:
    peer = load_transformers(BUNDLED_MODEL, torch.bfloat16)
    with fastgen.load(peer) as model:
        assert model.config == idle_model.config or model.config.dtype != idle_model.config.dtype
        text = model("In the beginning", temperature=0, max_new_tokens=8)
        assert text == idle_model("In the beginning", temperature=0, max_new_tokens=8)


def test_closing_a_stream_frees_its_row(idle_model: fastgen.Generator) -> None:
    stream = idle_model.stream("In the beginning", max_new_tokens=200, ignore_eos=True)
    next(stream)
    assert idle_model.engine.num_unfinished == 1
    stream.close()
    assert idle_model.engine.num_unfinished == 0
    assert list(stream) == []
    dropped = idle_model.stream("In the beginning", max_new_tokens=200)
    del dropped
    assert idle_model.engine.num_unfinished == 0


def test_timeout_ends_generate_and_stream(idle_model: fastgen.Generator) -> None:
    rows = idle_model.generate(["a"] * 64, timeout=0.3, max_new_tokens=900, ignore_eos=True)
    assert {row.completions[0].finish_reason for row in rows} == {"timeout"}
    assert all(len(row.completions[0].token_ids) < 900 for row in rows)
    own: dict[str, Any] = {
        "max_new_tokens": 900,
        "ignore_eos": True,
        "speculate": False,
    }  # a token a step
    *_, last = idle_model.stream("a", timeout=0.05, **own)
    assert last.finish_reason == "timeout"


def test_ctrl_c_ends_a_generation_between_steps(idle_model: fastgen.Generator) -> None:
    [before] = idle_model.generate("And it came", temperature=0, max_new_tokens=10)
    main = threading.main_thread().ident
    assert main is not None
    steps = itertools.count()

    def interrupt() -> None:
        if next(steps) == 5:  # in the middle of it
            signal.pthread_kill(main, signal.SIGINT)

    with stepping(idle_model, interrupt), pytest.raises(KeyboardInterrupt):
        idle_model.generate(["x"] * 200, max_new_tokens=900, ignore_eos=True)
    assert idle_model.engine.num_unfinished == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    [after] = idle_model.generate("And it came", temperature=0, max_new_tokens=10)
    assert after.completions[0].token_ids == before.completions[0].token_ids


def test_progress_is_shown_when_asked(
    idle_model: fastgen.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    idle_model.generate(["a", "b", "c"], max_new_tokens=2, progress=True)
    assert "3/3" in capsys.readouterr().err
    idle_model.generate(["a", "b", "c"], max_new_tokens=2)
    assert capsys.readouterr().err == "", "no terminal, no bar"


def test_10_000_prompts_come_back_in_order(idle_model: fastgen.Generator) -> None:
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, 4096, (10_000, 3)).tolist()
    most = 0
    add = idle_model.engine.add_request

    def watch(*args: Any, **options: Any) -> Any:
        nonlocal most
        most = max(most, idle_model.engine.num_unfinished)
        return add(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(idle_model.engine, "add_request", watch)
        results = idle_model.generate(prompts, temperature=0, max_new_tokens=2)
    assert [list(result.prompt_token_ids) for result in results] == prompts
    assert most <= 2 * idle_model.plan.limits.num_seats, "fed as they can be run, not all at once"


def in_thread(work: Any) -> tuple[threading.Thread, list[Any]]:
    """Run `work` on another thread; its result, or the exception, comes into the list."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, found


def test_closing_ends_what_another_thread_generates() -> None:
    model = fastgen.load(max_batch_size=4)
    prompts = ["x"] * 4
    thread, found = in_thread(lambda: model.generate(prompts, max_new_tokens=1000, ignore_eos=True))
    wait_until(lambda: model.engine.stats.decode_tokens)
    model.close()
    thread.join(WITHIN)
    rows = [completion for generation in found[0] for completion in generation.completions]
    assert {row.finish_reason for row in rows} == {"cancelled"}
    assert all(len(row.token_ids) < 1000 for row in rows)


def test_closing_a_stream_from_another_thread_ends_its_reader(
    idle_model: fastgen.Generator,
) -> None:
    stream = idle_model.stream("x", max_new_tokens=1000, ignore_eos=True)
    next(stream)
    stats = idle_model.engine.stats
    before = stats.decode_tokens
    thread, found = in_thread(lambda: sum(1 for _ in stream))
    wait_until(lambda: stats.decode_tokens > before + 2)  # nobody else asks for any
    stream.close()
    thread.join(WITHIN)
    assert isinstance(found[0], int)


def test_an_interrupt_while_feeding_leaves_nothing_behind(
    idle_model: fastgen.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, calls = idle_model.engine.add_request, iter(range(4))

    def interrupted(*args: Any, **options: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return add(*args, **options)

    monkeypatch.setattr(idle_model.engine, "add_request", interrupted)
    with pytest.raises(KeyboardInterrupt):
        idle_model.generate(["a"] * 8, max_new_tokens=50)


def test_priority_and_deadline_go_with_every_prompt(
    idle_model: fastgen.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, requests = idle_model.engine.add_request, []

    def remember(*args: Any, **options: Any) -> Any:
        requests.append(add(*args, **options))
        return requests[-1]

    monkeypatch.setattr(idle_model.engine, "add_request", remember)
    idle_model.generate(["a", "b"], max_new_tokens=1, priority=-7, timeout=60)
    list(idle_model.stream("c", max_new_tokens=1, priority=5, timeout=60))
    assert [request.priority for request in requests] == [-7, -7, 5]
    assert all(request.deadline is not None for request in requests)
    for call in (idle_model.generate, idle_model.stream):
        with pytest.raises(ValueError, match="priority"):
            call("x", priority=1001)


def test_many_samples_cost_little_until_they_run(idle_model: fastgen.Generator) -> None:
    def sample(n: int, timeout: float) -> None:
        [generation] = idle_model.generate([7] * 900, n=n, max_new_tokens=3, timeout=timeout)
        assert len(generation.completions) == n
        assert generation.completions[-1].finish_reason == "timeout"

    assert_linear(lambda n: sample(n, 0), 5000)
    sample(5000, 0.2)  # some of them run


def test_a_closed_model_says_so() -> None:
    model = fastgen.load(max_batch_size=1)
    model.close()
    with pytest.raises(fastgen.EngineError, match="closed"):
        model("x")
