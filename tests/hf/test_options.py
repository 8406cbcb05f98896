"""Options that are easily misread: each call against transformers, and which way it went."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process as processors
from transformers.generation import stopping_criteria as criteria

import fastgen
from fastgen.hf.options import _PROCESSORS
from fastgen.sampling.options import FILTERS, OPTIONS
from hf_models import Recorder, fresh_pair, generated, left_padded, pair, random_ids

IDS = torch.tensor([[20, 30, 40, 50], [60, 35, 70, 80]])
PADDED = left_padded(IDS, [0, 2], 35)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "two criteria of a kind": (
        "forward",
        {
            "stopping_criteria": StoppingCriteriaList(
                [criteria.MaxLengthCriteria(9), criteria.MaxLengthCriteria(20)]
            )
        },
    ),
    "a criterion in place of transformers'": (
        "native",
        {"stopping_criteria": StoppingCriteriaList([criteria.MaxLengthCriteria(9)])},
    ),
    "a length that has been reached": (
        "forward",
        {"stopping_criteria": StoppingCriteriaList([criteria.MaxLengthCriteria(3)])},
    ),
    "an eos and nothing to pad with": (
        "forward",
        {
            "eos_token_id": None,
            "pad_token_id": None,
            "stopping_criteria": StoppingCriteriaList([criteria.EosTokenCriteria(9)]),
        },
    ),
    "one-grams, and padding in one row": ("native", {**PADDED, "no_repeat_ngram_size": 1}),
    "two-grams, and padding that may be drawn": (
        "forward",
        {**PADDED, "no_repeat_ngram_size": 2, "pad_token_id": 35},
    ),
    "two-grams, and padding that ends rows": (
        "native",
        {**left_padded(IDS, [0, 2], 7), "no_repeat_ngram_size": 2},
    ),
    "bans made finite, then raised": (
        "forward",
        {
            "remove_invalid_values": True,
            "min_new_tokens": 8,
            "exponential_decay_length_penalty": (1, 3.0),
        },
    ),
    "a forced eos that is suppressed first": (
        "forward",
        {"max_new_tokens": 1, "forced_eos_token_id": 9, "begin_suppress_tokens": [9]},
    ),
    "a length that is not whole": ("native", {"max_new_tokens": 5.5}),
    "ids of a dtype that no embedding takes": ("error", {"input_ids": IDS.short()}),
    "ids that are booleans": ("error", {"input_ids": IDS.bool()}),
    "no rows": ("error", {"input_ids": IDS[:0]}),
    "a forced eos, and nothing else": (
        "native",
        {"max_new_tokens": 1, "forced_eos_token_id": 9},
    ),
    "a forced eos outside the vocabulary": ("error", {"forced_eos_token_id": 300}),
    "a decay penalty for an eos outside": (
        "error",
        {"eos_token_id": 300, "exponential_decay_length_penalty": (1, 1.2)},
    ),
    "processors in an order of their own": (
        "forward",
        {
            "logits_processor": LogitsProcessorList(
                [processors.RepetitionPenaltyLogitsProcessor(1.5)]
            ),
            "suppress_tokens": [101],
        },
    ),
    "everything ruled out": ("forward", {"suppress_tokens": list(range(211))}),
    "everything but the eos": (
        "native",
        {"suppress_tokens": [i for i in range(211) if i != 7]},
    ),
    "a bias of minus infinity": ("forward", {"sequence_bias": {(101,): float("-inf")}}),
    "biases of one token in several ways": (
        "native",
        {"sequence_bias": {(101,): -3.0, (101, 101): 9.0, (40, 101): 2.5, (50, 101, 101): -1.0}},
    ),
    "a bias that begins in the padding": (
        "forward",
        {**PADDED, "sequence_bias": {(35, 101): 5.0, (101,): 1.0}},
    ),
    "a filter without sampling": (
        "forward",
        {"logits_processor": LogitsProcessorList([processors.TopKLogitsWarper(5)])},
    ),
    "int32 ids": ("native", {"input_ids": IDS.int()}),
    "int32 ids, with beams": ("native", {"input_ids": IDS.int(), "num_beams": 2}),
    "no prompt": ("native", {"input_ids": None}),
    "guidance": ("forward", {"guidance_scale": 1.4}),
    "guidance, with beams": ("native", {"guidance_scale": 1.4, "num_beams": 2}),
    "prompt lookup": ("native", {"input_ids": IDS[:1], "prompt_lookup_num_tokens": 3}),
    "a static cache": ("transformers", {"cache_implementation": "static"}),
    "attentions": ("transformers", {"output_attentions": True, "return_dict_in_generate": True}),
    "an unknown option": ("error", {"temprature": 0.5}),
    "a temperature that is an integer": ("error", {"do_sample": True, "temperature": 2}),
    "no samples": ("error", {"num_return_sequences": 2}),
    "too few new tokens": ("error", {"max_new_tokens": 0}),
    "a prompt longer than the length": ("error", {"max_new_tokens": None, "max_length": 3}),
    "a mask of another size": ("error", {"attention_mask": torch.ones(3, 4)}),
    "an id out of range": ("error", {"input_ids": torch.tensor([[3, 211]])}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_as_transformers_understands_it(case: str) -> None:
    way, options = CASES[case]
    theirs, ours = pair()
    call = {"input_ids": IDS, "do_sample": False, "max_new_tokens": 16, "pad_token_id": 3}
    call |= options
    expected, got = generated(theirs, **call), generated(ours, **call)
    if way == "error":
        assert isinstance(expected, Exception) and type(got) is type(expected)
        if not isinstance(expected, IndexError):
            assert str(got) == str(expected)
        return
    if isinstance(expected, Exception):
        assert type(got) is type(expected), got
    else:
        assert not isinstance(got, Exception), got
        one, other = (getattr(out, "sequences", out) for out in (expected, got))
        assert torch.equal(one, other) and one.dtype == other.dtype
    assert ours.last_path == way, ours.last_reason


def test_methods_that_somebody_has_changed_are_called() -> None:
    theirs, ours = fresh_pair()

    class Negated(fastgen.GPT2LMHeadModel):
        @functools.wraps(fastgen.GPT2LMHeadModel.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = -output.logits
            return output

    call = {"input_ids": IDS, "do_sample": False, "max_new_tokens": 6, "pad_token_id": 7}
    before = generated(ours, **call)
    negated = fastgen.accelerate(theirs)
    negated.__class__ = Negated
    assert not torch.equal(generated(negated, **call), before)
    assert negated.last_path == "forward" and "outside" in negated.last_reason
    calls = []
    prepare = ours.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return prepare(*args, **kwargs)

    ours.prepare_inputs_for_generation = counted
    assert torch.equal(generated(ours, **call), before) and len(calls) == 6
    del ours.prepare_inputs_for_generation
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *a: calls.append(1))
    try:
        generated(ours, **call)
        assert ours.last_path != "native" and len(calls) > 6
    finally:
        handle.remove()
    generated(ours, **call)
    assert ours.last_path == "native"


def test_a_streamer_that_is_used_again() -> None:
    """What nobody has read of an earlier error does not meet the next reader."""
    from transformers import AutoTokenizer, TextIteratorStreamer

    from fastgen.frontends.generator import BUNDLED_MODEL

    _, ours = pair()
    streamer = TextIteratorStreamer(AutoTokenizer.from_pretrained(BUNDLED_MODEL))
    call = {"input_ids": IDS[:1], "do_sample": False, "max_new_tokens": 6, "streamer": streamer}
    assert isinstance(generated(ours, **call, num_beams=2), ValueError)
    assert isinstance(generated(ours, **call), torch.Tensor)
    assert "".join(streamer)


def test_assistants_of_both_kinds() -> None:
    theirs, ours = fresh_pair()
    helper_theirs, helper_ours = fresh_pair("plain")
    ids = random_ids(theirs, np.random.default_rng(0), 1, 9)
    call = {"input_ids": ids, "do_sample": False, "max_new_tokens": 25, "pad_token_id": 7}
    expected = generated(theirs, **call)
    for target in (theirs, ours):
        for helper in (helper_theirs, helper_ours):
            assert torch.equal(generated(target, **call, assistant_model=helper), expected)


def test_streams_end_where_everything_is_ruled_out_at_once() -> None:
    _, ours = pair()
    recorder = Recorder()
    call = {"input_ids": IDS[:1], "suppress_tokens": list(range(211)), "max_new_tokens": 3}
    output = generated(ours, **call, do_sample=False, streamer=recorder)
    assert ours.last_path == "forward" and recorder.ends == 1
    assert output[0, 4:].tolist() == [int(value) for value in recorder.values[1:]]


def test_processors_are_those_of_the_table_in_its_order() -> None:
    """transformers runs its processors in the order of the table of options; what is read here and
    stands for no option changes the logits of no draw by itself."""
    named = {kind: None for option in OPTIONS for kind in option.transformers}
    read = [kind.__name__ for kind in _PROCESSORS]
    assert [kind for kind in read if kind in named] == list(named)
    assert set(read) - set(named) == {
        *("ForcedBOSTokenLogitsProcessor", "ForcedEOSTokenLogitsProcessor"),
        *("InfNanRemoveLogitsProcessor", "LogitNormalization"),
    }
    attributes = [option.name for option in OPTIONS if option.attribute]
    assert attributes == [option.name for option in FILTERS if option.transformers]
