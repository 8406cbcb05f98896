"""bench_speculation.py: the texts it asks for, its oracle, and what it makes of turns."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastgen
from fastgen.bench.shapes import SHAPES, save_checkpoint
from scripts import load_script

tasks = load_script("benchmarks/speculation_tasks.py")
runs = load_script("benchmarks/speculation_runs.py")
peers = load_script("benchmarks/speculation_peers.py")
for name in ("models", "harness", "cells"):
    load_script(f"benchmarks/{name}.py")
bench = load_script("benchmarks/bench_speculation.py")
tables = load_script("benchmarks/speculation_tables.py")

COUNT = 4
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": tasks.NEW, "ignore_eos": True}


@pytest.fixture(scope="module")
def bundled() -> Iterator[fastgen.Generator]:
    with fastgen.load(dtype="float32") as model:
        yield model


@pytest.fixture(scope="module")
def texts(bundled: fastgen.Generator) -> Any:
    return tasks.Texts(bundled.tokenizer, tasks.HELD_OUT.read_text())


def written(model: fastgen.Generator, cases: Sequence[Any]) -> list[list[int]]:
    params = [fastgen.SamplingParams(**{**GREEDY, **case.options}) for case in cases]
    made = model.generate([case.prompt for case in cases], params, progress=False)
    return [list(each.completions[0].token_ids) for each in made]


@pytest.mark.parametrize("task", ["quoting", "editing", "lists"])
def test_the_model_writes_the_text_that_is_wanted(
    task: str, texts: Any, bundled: fastgen.Generator
) -> None:
    """And not without being asked to: it copies nothing by itself."""
    cases = getattr(tasks, task)(texts, COUNT)
    wanted = [[ids[-1] for ids in case.options["sequence_bias"]] for case in cases]
    assert {len(text) for text in wanted} == {tasks.NEW}
    assert written(bundled, cases) == wanted
    free = [tasks.Case(case.prompt, {}) for case in cases]
    assert written(bundled, free) != wanted


def test_a_quote_stands_in_its_prompt(texts: Any) -> None:
    for case in tasks.quoting(texts, COUNT):
        text = [ids[-1] for ids in case.options["sequence_bias"]]
        prompt, lead = case.prompt, case.prompt[-tasks.LEAD :]
        assert prompt[1 : 1 + tasks.LEAD + tasks.NEW] == [*lead, *text]
        assert tasks.repeats_prompt(text, prompt) > 0.9
        assert len(prompt) + tasks.NEW <= bench.MOST_TOKENS


def test_an_edit_changes_one_word_throughout(texts: Any, bundled: fastgen.Generator) -> None:
    for case in tasks.editing(texts, COUNT):
        text = [ids[-1] for ids in case.options["sequence_bias"]]
        assert bundled.tokenizer is not None
        passage = bundled.tokenizer.decode(case.prompt[1 : -tasks.LEAD]).split()
        edited = bundled.tokenizer.decode([*case.prompt[-tasks.LEAD :], *text]).split()[:-1]
        changed = {
            (old.strip(",.:;"), new.strip(",.:;"))
            for old, new in zip(passage, edited, strict=False) if old != new
        }  # fmt: skip
        assert len(changed) == 1
        assert 0.3 < tasks.repeats_prompt(text, case.prompt) < 1


def test_lists_have_one_form_and_other_words(texts: Any, bundled: fastgen.Generator) -> None:
    first, second = tasks.lists(texts, 2)
    assert bundled.tokenizer is not None
    for case in (first, second):
        lines = bundled.tokenizer.decode(case.prompt[1:]).splitlines()
        assert len(lines) == tasks.LIST_HEAD == len(set(lines))
        assert all(line.startswith("The children of ") and " hundred " in line for line in lines)
    assert first.prompt != second.prompt


def test_free_text_is_told_apart_by_whether_it_loops(texts: Any) -> None:
    """The model's greedy text decides; here it loops where a prompt begins with an even id."""

    def generate(prompts: Sequence[list[int]]) -> list[list[int]]:
        return [[7, 8] * 20 if prompt[1] % 2 == 0 else list(range(40)) for prompt in prompts]

    found = tasks.free(texts, 8, generate)
    assert all(case.prompt[1] % 2 == 1 for case in found["free"])
    assert all(case.prompt[1] % 2 == 0 for case in found["loops"])
    assert [case.options["seed"] for case in found["sampled"]] == list(range(8))
    for cases in found.values():
        assert len({tuple(case.prompt) for case in cases}) == 8


def test_as_many_prompts_as_there_are(texts: Any) -> None:
    count = len(texts.passages())
    assert len(tasks.quoting(texts, count)) == count
    with pytest.raises(ValueError, match=f"{count + 1} different prompts"):
        tasks.quoting(texts, count + 1)


def test_what_repeats() -> None:
    assert tasks.repeats_itself([1, 2, 3, 4, 5, 6]) == 0
    assert tasks.repeats_itself([1, 2] * 4) == 3 / 5  # of five runs of four there are two kinds
    assert tasks.repeats_prompt([9, 1, 2, 3, 4], [1, 2, 3, 4]) == 1 / 2
    assert tasks.repeats_prompt([1, 2, 3, 4], [1, 2, 3]) == 0


@pytest.mark.parametrize("right", [0.0, 0.5, 1.0])
def test_the_oracle_is_right_as_often_as_it_is_told(right: float) -> None:
    oracle = runs.Oracle(vocab_size=100)
    prompts = [list(range(20)), list(range(1, 21))]
    texts = [np.random.default_rng(row).integers(0, 100, 2000).tolist() for row in range(2)]
    cases = [tasks.Case(prompt, {}) for prompt in prompts]
    oracle.spoiling(right)(cases, texts)
    drafts = [oracle(prompt, 2000) for prompt in prompts]
    hits = np.array(drafts) == np.array(texts)
    assert abs(hits.mean() - right) < 0.04
    assert right in (0, 1) or (hits[0] != hits[1]).any()
    assert oracle([*prompts[1], *texts[1][:5]], 3) == drafts[1][5:8]
    assert oracle([*prompts[1], *texts[1]], 3) == []
    again = runs.Oracle(vocab_size=100)
    again.spoiling(right)(cases, texts)
    assert [again(prompt, 2000) for prompt in prompts] == drafts


class Scripted:
    """A subject that answers each prompt by itself, with its last `wrong` tokens changed."""

    def __init__(self, name: str, log: list[Any], *, wrong: int = 0, exact: bool = True) -> None:
        self.name, self.exact, self._log, self._wrong = name, exact, log, wrong

    def take(self, cases: Sequence[Any], plain: Any) -> Any:
        self._log.append((self.name, [case.prompt[0] for case in cases], plain is None))
        ids = [[*case.prompt, *case.prompt] for case in cases]
        for row in ids[:1]:
            row[len(row) - self._wrong :] = [-1] * self._wrong
        seconds = 1.0 if plain is None else 0.25
        return runs.Turn(ids, seconds, seconds / 2, 4 * len(cases), 2 * len(cases))


CASES = [tasks.Case([number, number + 1], {}) for number in range(0, 12, 2)]


def test_subjects_take_turns_on_other_prompts_in_each_round() -> None:
    log: list[Any] = []
    plain, other = Scripted("plain", log), Scripted("other", log, exact=False)
    pairs = [
        runs.Pair(plain, Scripted("a", log)), runs.Pair(plain, Scripted("b", log)),
        runs.Pair(other, Scripted("c", log, exact=False)),
    ]  # fmt: skip
    turns = runs.interleave(pairs, CASES, batch=2, rounds=3)
    assert {name: len(taken) for name, taken in turns.items()} == dict.fromkeys(
        ("plain", "other", "a", "b", "c"), 3
    )
    assert [name for name, _, _ in log] == ["plain", "a", "b", "other", "c"] * 4
    assert [prompts for _, prompts, _ in log[::5]] == [[0, 2], [4, 6], [8, 10], [0, 2]]
    assert [is_plain for _, _, is_plain in log[:5]] == [True, False, False, True, False]


def test_short_turns_get_more_rounds() -> None:
    log: list[Any] = []
    pair = runs.Pair(Scripted("plain", log), Scripted("own", log))
    turns = runs.interleave([pair], CASES, batch=1, rounds=3, seconds=2.5)
    assert {name: len(taken) for name, taken in turns.items()} == {"plain": 10, "own": 10}


def test_other_tokens_end_the_benchmark() -> None:
    log: list[Any] = []
    plain = Scripted("plain", log)
    wrong = runs.Pair(plain, Scripted("wrong", log, wrong=1))
    with pytest.raises(runs.DifferentTokensError, match="wrong: token 3 of row 0 is -1"):
        runs.interleave([wrong], CASES, batch=2, rounds=1)


def test_a_record() -> None:
    log: list[Any] = []
    pair = runs.Pair(Scripted("plain", log), Scripted("peer", log, wrong=1, exact=False))
    turns = runs.interleave([pair], CASES, batch=2, rounds=2)
    four = {"median": 4.0, "lowest": 4.0, "highest": 4.0}
    assert runs.record_of(pair, turns) == {
        "engine": "peer", "tokens_per_s": 32.0, "without": 8.0, "times_faster": four,
        "decode_times_faster": four, "same_rows": 0.5, "drafted": 16, "accepted": 8,
        "acceptance": 0.5, "tokens_per_step": 2.0, "rounds": 2,
    }  # fmt: skip
    assert runs.repeats(CASES, turns["plain"], 2) == {"repeats_prompt": 0, "repeats_itself": 0}


def test_tables_are_made_of_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []
    run = bench.Run(tmp_path, ["int8"], [1, 2], rounds=1, seconds=0, threads=1, pythons={})
    plain, own = Scripted("off", log), Scripted("fastgen", log)
    peer = Scripted("llama_cpp_lookup 2", log, wrong=1, exact=False)
    rows = [{"part": "peers", "dtype": "int8", "engine": "openvino", "why_not": "absent: x"}]
    for part, task, wanted in (("tasks", "quoting", 2.0), ("peers", "lists", 5.0)):
        for batch in (1, 2) if part == "tasks" else (1,):
            about = {"part": part, "dtype": "int8", "task": task}
            pairs = [runs.Pair(plain, own), *([runs.Pair(plain, peer)] if part == "peers" else [])]
            rows += bench.measured(run, pairs, CASES, batch, about, wanted * batch**2)
    machine = {"cpu": "Some Processor", "cores": 2, "date": "2026-12-01"}
    monkeypatch.setattr(tables, "PATH", tmp_path / "record.json")
    tables.PATH.write_text(json.dumps({"machine": machine, "new_tokens": 4, "rows": rows}))
    assert (
        "| int8 | quoting | 0%, 0% | 50% | 2.00 | 4.00 | 4.00: **missed** |" in tables.speculation()
    )
    assert tables.speculation_peers().splitlines()[2:] == [
        "| int8 | lists | fastgen | 4 | 16 | 4.00 | 100% |",
        "| int8 | lists | llama.cpp, 2 tokens | 4 | 16 | 4.00 | 0% |",
        "",
        "- int8, openvino: absent: x",
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny"), SHAPES["tiny"])


def test_two_models_agree_where_both_are_biased(tiny: Path, tmp_path: Path) -> None:
    """The bias changes nothing in the model whose text it is; the other one writes that text where
    it has a bias throughout."""
    cases = bench.random_cases(2, 50_257, bench.DRAFT_OPTIONS)
    other = save_checkpoint(tmp_path, SHAPES["tiny"], seed=1)
    with fastgen.load(tiny) as target, fastgen.load(other) as draft:
        text = written(target, cases)
        assert written(draft, cases) != text
        some, all_of_it = (bench.agreed(cases, text, right) for right in (0.6, 1.0))
        count = sum(len(case.options["sequence_bias"]) for case in some)
        assert 0.45 < count / (2 * tasks.NEW) < 0.75
        assert written(target, some) == written(target, all_of_it) == text
        assert written(draft, some) != text
        assert written(draft, all_of_it) == text


def test_transformers_lookup(tiny: Path, tmp_path: Path) -> None:
    """Its process drafts or does not, obeys biases, and makes as many tokens as were asked for."""
    [case] = bench.random_cases(1, 50_257, {"temperature": 0})
    with fastgen.load(tiny, dtype="float32") as model:
        [text] = written(model, [case])
    with ExitStack() as stack:
        [pair] = peers.peer_pairs(
            "transformers_lookup", {}, stack, case, folder=str(tiny), scratch=str(tmp_path),
            precision="float32", threads=1, max_len=256,
        )  # fmt: skip
        plain = pair.baseline.take([case], None)
        assert len(plain.ids[0]) == tasks.NEW
        other = [(token_id + 1) % 50_257 for token_id in text]
        biased = tasks.Case(
            case.prompt,
            {"temperature": 0, "sequence_bias": tasks.bias_to(case.prompt, other)},
        )
        for subject in (pair.baseline, pair.subject):
            assert subject.take([biased], None).ids == [other]


def test_a_peer_that_is_absent_says_so(tiny: Path, tmp_path: Path) -> None:
    with ExitStack() as stack:
        found = peers.peer_pairs(
            "no_such", {}, stack, tasks.Case([1], {}), folder=str(tiny), scratch=str(tmp_path),
            precision="float32", threads=1, max_len=256,
        )  # fmt: skip
    assert found == "absent: no_such_peer"


def test_drafts_of_the_engine_are_counted(texts: Any) -> None:
    """A quote is drafted and accepted, and its tokens are those of plain decoding."""
    cases = tasks.quoting(texts, 2)
    with fastgen.load(speculate="off") as off, fastgen.load(speculate="auto") as on:
        pair = runs.Pair(runs.Own("off", off.engine), runs.Own("on", on.engine))
        turns = runs.interleave([pair], cases, batch=2, rounds=1)
        record = runs.record_of(pair, turns)
    assert record["accepted"] > 0 and record["tokens_per_step"] > 1 and record["same_rows"] == 1
    assert [turn.drafted for turn in turns["off"]] == [0]


def test_an_oracles_drafts_are_accepted_as_often_as_they_are_right(tiny: Path) -> None:
    oracle = runs.Oracle(50_257)
    with fastgen.load(tiny, speculate="off") as off, fastgen.load(tiny, speculate=oracle) as on:
        plain = runs.Own("off", off.engine)
        pairs = [
            runs.Pair(plain, runs.Own(f"oracle {right:g}", on.engine, oracle.spoiling(right)))
            for right in (0.0, 1.0)
        ]
        cases = bench.random_cases(2, 50_257, {"temperature": 0})
        turns = runs.interleave(pairs, cases, batch=2, rounds=1)
    never, always = (runs.record_of(pair, turns) for pair in pairs)
    assert never["accepted"] == 0 and always["accepted"] == always["drafted"]
