"""Every field of SamplingParams and every sampler: the option decides the draw, or its row is drawn
by a sampler that knows it. tests/kernels/test_sampling.py does the same with the Triton sampler.
"""

from __future__ import annotations

from typing import Any

import pytest

from fastgen import SamplingParams
from fastgen.errors import OptionError
from fastgen.sampling import definition
from fastgen.sampling.options import BY_NAME, DRAWN, OPTIONS, require_known, unknown_to
from option_cases import CASES, LOGITS, check_option, deciding_params, params_of, row_of
from sampling_harness import SAMPLERS


def test_every_option_has_a_case_in_which_it_is_set() -> None:
    assert list(CASES) == [option.name for option in OPTIONS]
    for name in CASES:
        params, without = params_of(name)
        assert BY_NAME[name].is_set(params) and not BY_NAME[name].is_set(without)


@pytest.mark.parametrize("name", CASES)
def test_the_definition_acts_on_it(name: str) -> None:
    """Where the table says that draws depend on it; where it does not, none does."""
    if BY_NAME[name].is_drawn and name != "logprobs":
        params, without = deciding_params(name)
        assert row_of(name, params).draw(LOGITS) != row_of(name, without).draw(LOGITS)
        assert name in definition.KNOWN_OPTIONS
    else:
        for seed in range(20):
            drawn = {row_of(name, params).draw(LOGITS) for params in params_of(name, seed)}
            assert len(drawn) == 1


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_acts_on_it_or_refuses_it_by_name(sampler: str, name: str) -> None:
    check_option(SAMPLERS[sampler], name)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_know_options_of_the_table_only(sampler: str) -> None:
    made: Any = SAMPLERS[sampler](1, 8, frozenset())
    drawn = {option.name for option in DRAWN}
    assert made.known_options <= drawn
    assert drawn - made.known_options == {"logits_processor"}


def test_an_option_that_is_not_known_is_named() -> None:
    params = SamplingParams(temperature=0.5, top_k=3, min_p=0.1, stop=("a",), n=2, seed=1)
    known = frozenset({"temperature", "seed"})
    assert unknown_to(known, params) == ["top_k", "min_p"]
    assert unknown_to(known, SamplingParams(temperature=0, seed=2, max_new_tokens=4)) == []
    with pytest.raises(OptionError, match="top_k: this sampler cannot") as caught:
        require_known(known, params)
    assert caught.value.option == "top_k"
    require_known(known | {"top_k", "min_p"}, params)
