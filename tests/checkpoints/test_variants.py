"""Every checkpoint variant against transformers: logits by the error rule, greedy tokens.

On both decoders that run on a CPU; decoders/test_cpu_decoder.py has the CPU decoder's other paths.
"""

from __future__ import annotations

import pytest

from reference import ReferenceGPT2
from stepping import all_logits
from variant_cases import (
    DECODERS,
    LENGTHS,
    Folder,
    assert_as_close_as_pytorch,
    assert_same_greedy,
    greedy_tokens_of_transformers,
    load,
    transformers_case,
)
from variants import VARIANTS


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_as_close_to_float64_as_transformers(
    name: str, decoder: str, variant: Folder
) -> None:
    folder = variant(name)
    case = transformers_case(name, folder, LENGTHS)
    with load(folder, name, decoder=decoder) as model:
        whole = [all_logits(model.engine.decoder, [row], [96])[0] for row in case.rows]
        ragged = all_logits(model.engine.decoder, case.rows, [1, 7, 13])
    case.assert_close(whole, "float32")
    case.assert_close(ragged, "float32")


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["plain", "codeparrot", "untied", "bf16_file", "fp16_file"])
def test_16_bit_arithmetic_is_as_close_as_pytorchs(
    name: str, dtype: str, decoder: str, variant: Folder
) -> None:
    assert_as_close_as_pytorch(name, dtype, variant(name), decoder=decoder)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_tokens_equal_transformers(name: str, decoder: str, variant: Folder) -> None:
    """Equal up to where the reference's best two logits are closer than the rule allows to tell."""
    folder = variant(name)
    wanted = greedy_tokens_of_transformers(name, folder)
    reference = ReferenceGPT2(folder)
    with load(folder, name, decoder=decoder) as model:
        prompts = [prompt for prompt, _ in wanted]
        results = model.generate(prompts, temperature=0, max_new_tokens=32)
    for (prompt, theirs), result in zip(wanted, results, strict=True):
        assert_same_greedy(reference, prompt, list(result.completions[0].token_ids), theirs)
