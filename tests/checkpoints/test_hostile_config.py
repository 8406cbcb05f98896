"""config.json and generation_config.json that lie, or do not fit: each refused by its cause."""

from __future__ import annotations

import bisect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastgen.checkpoints.checkpoint import open_checkpoint
from fastgen.errors import CheckpointError
from tiny_checkpoints import (
    CONFIG,
    assert_loads,
    assert_names,
    assert_refused,
    cases,
    random_array,
    random_tensors,
    write_checkpoint,
    write_json,
)

NOT_JSON = "config.json: is not valid JSON"
GOOD = json.dumps(CONFIG)
DIGITS = "1" + "0" * 5000

# Text of config.json -> what the message says of it.
TEXTS = {
    "empty": ("", NOT_JSON),
    "blank": (" \n", NOT_JSON),
    "prose": ("gpt2", NOT_JSON),
    "YAML": ("model_type: gpt2", NOT_JSON),
    "single quotes": (GOOD.replace('"', "'"), NOT_JSON),
    "comment": (f"// GPT-2\n{GOOD}", NOT_JSON),
    "trailing comma": (f"{GOOD[:-1]},}}", NOT_JSON),
    "cut": (GOOD[:-1], NOT_JSON),
    "text after it": (f"{GOOD}{GOOD}", f"{NOT_JSON}: Extra data"),
    "null": ("null", "config.json: must hold a JSON object, not NoneType"),
    "number": ("5", "config.json: must hold a JSON object, not int"),
    "string": ('"gpt2"', "config.json: must hold a JSON object, not str"),
    "array": (f"[{GOOD}]", "config.json: must hold a JSON object, not list"),
    "deep arrays": ("[" * 10**5, "config.json: is nested too deeply"),
    "deep objects": ('{"a":' * 10**5, "config.json: is nested too deeply"),
    "deep in an unused key": (f'{GOOD[:-1]}, "a": {"[" * 10**5}', "is nested too deeply"),
    "key twice": (f'{GOOD[:-1]}, "n_embd": 8}}', "key 'n_embd' stands twice"),
    "key twice, other value": (f'{{"n_layer": 1, {GOOD[1:]}', "key 'n_layer' stands twice"),
    "unused key twice": (f'{GOOD[:-1]}, "a": 1, "a": 1}}', "key 'a' stands twice"),
    "nested key twice": (f'{GOOD[:-1]}, "a": {{"b": 1, "b": 1}}}}', "key 'b' stands twice"),
    "NaN": (GOOD.replace("16", "NaN"), "NaN is not a JSON number"),
    "Infinity": (GOOD.replace("16", "Infinity"), "Infinity is not a JSON number"),
    "-Infinity": (GOOD.replace("16", "-Infinity"), "-Infinity is not a JSON number"),
    "NaN in an unused key": (f'{GOOD[:-1]}, "attn_pdrop": NaN}}', "NaN is not a JSON number"),
    "5001 digits": (GOOD.replace("16", DIGITS), f"{NOT_JSON}: Exceeds the limit"),
    "5001 digits in an unused key": (f'{GOOD[:-1]}, "a": {DIGITS}}}', f"{NOT_JSON}: Exceeds"),
    "float overflow": (GOOD.replace("16", "1e999"), "n_positions must be an integer, not inf"),
    "byte order mark": ("\xef\xbb\xbf" + GOOD, f"{NOT_JSON}: Unexpected UTF-8 BOM"),
    "not UTF-8": (GOOD.replace("gpt2", "\xff"), f"{NOT_JSON}: 'utf-8' codec can't decode"),
    "NUL bytes": ("\0" * 100, NOT_JSON),
}  # fmt: skip


@pytest.mark.parametrize(("text", "cause"), cases(TEXTS))
def test_malformed_config(tmp_path: Path, text: str, cause: str) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert_refused(tmp_path, cause)


def test_config_missing(tmp_path: Path) -> None:
    (write_checkpoint(tmp_path) / "config.json").unlink()
    assert_refused(tmp_path, "config.json: cannot be opened: No such file")


def test_config_of_absurd_size(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    with open(tmp_path / "config.json", "ab") as file:
        file.truncate(10**12)  # a hole: takes no space
    assert_refused(tmp_path, "config.json: larger than 64 MB")


def test_many_keys_one_twice(tmp_path: Path) -> None:
    """Finding which one takes no time that grows with the square of their number."""
    write_checkpoint(tmp_path)
    names = [*map(str, range(20_000)), "twice", "twice"]
    (tmp_path / "config.json").write_text(f"{{{', '.join(f'{json.dumps(n)}: 0' for n in names)}}}")
    assert_refused(tmp_path, "key 'twice' stands twice")


@pytest.mark.parametrize(
    "key", ["n_embd", "hidden_size", "pad_token_id", "model_type", "layer_norm_epsilon"]
)
def test_no_depth_of_nesting_escapes(tmp_path: Path, key: str) -> None:
    """Between what the parser refuses and what a message can show there is no gap."""
    write_checkpoint(tmp_path)
    others = json.dumps({name: value for name, value in CONFIG.items() if name != key})

    def too_deep(depth: int) -> bool:
        nested = f'{"[" * depth}"x"{"]" * depth}'
        (tmp_path / "config.json").write_text(f'{others[:-1]}, "{key}": {nested}}}')
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(tmp_path)
        assert_names(str(caught.value), "config.json: ")
        return "nested too deeply" in str(caught.value)

    limit = bisect.bisect(range(10**5), False, key=too_deep)
    for depth in range(limit - 40, limit + 10):
        too_deep(depth)


SIZES = ["n_embd", "n_head", "n_layer", "n_positions", "vocab_size", "n_inner"]
ALIASES = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
}
BAD_SIZES: dict[str, tuple[Any, str]] = {
    "string": ("8", "must be an integer, not '8'"),
    "true": (True, "must be an integer, not True"),
    "false": (False, "must be an integer, not False"),
    "float": (8.0, "must be an integer, not 8.0"),
    "null": (None, "must be an integer, not None"),
    "list": ([8], "must be an integer, not [8]"),
    "object": ({"a": 8}, "must be an integer, not {'a': 8}"),
    "zero": (0, "must be between 1 and"),
    "negative": (-8, "must be between 1 and"),
    "2^31": (2**31, "must be between 1 and"),
    "2^63": (2**63, "must be between 1 and"),
    "2^64 + 8": (2**64 + 8, "must be between 1 and"),
    "4001 digits": (10**4000, "must be between 1 and"),
    "endless string": ("8" * 10**5, "must be an integer, not '888"),
}


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize(("value", "cause"), cases(BAD_SIZES))
def test_size(tmp_path: Path, key: str, value: Any, cause: str) -> None:
    write_checkpoint(tmp_path, **{key: value})
    if key == "n_inner" and value is None:  # GPT-2's own way to say "4 times n_embd"
        assert_loads(tmp_path)
    else:
        assert_refused(tmp_path, f"config.json: {key} {cause}")


@pytest.mark.parametrize("alias", ALIASES)
@pytest.mark.parametrize("value", ["8", None, 0, 10**4000], ids=["string", "null", "zero", "huge"])
def test_size_by_its_general_name(tmp_path: Path, alias: str, value: Any) -> None:
    """The message names the key that the file holds."""
    config = {key: size for key, size in CONFIG.items() if key != ALIASES[alias]}
    write_checkpoint(tmp_path)
    write_json(tmp_path / "config.json", {**config, alias: value})
    assert_refused(tmp_path, "config.json", f"{alias} must be")


@pytest.mark.parametrize("alias", ALIASES)
@pytest.mark.parametrize(
    "value", [3, None, "8", "x" * 10**5, 10**4000], ids=["3", "null", "string", "endless", "huge"]
)
def test_aliases_that_disagree(tmp_path: Path, alias: str, value: Any) -> None:
    write_checkpoint(tmp_path, **{alias: value})
    key = ALIASES[alias]
    assert_refused(tmp_path, f"config.json: {key} is {CONFIG[key]} but {alias} is ")


def test_aliases_that_agree(tmp_path: Path) -> None:
    assert_loads(
        write_checkpoint(tmp_path, **{alias: CONFIG[key] for alias, key in ALIASES.items()})
    )


MISMATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "n_head does not divide": ({"n_head": 3}, "n_head 3 does not divide n_embd 8"),
    "n_head above n_embd": ({"n_head": 16}, "n_head 16 does not divide n_embd 8"),
    "larger n_embd": ({"n_embd": 16}, "wte.weight has shape (11, 8), config.json implies (11, 16)"),
    "smaller n_embd": ({"n_embd": 4}, "wte.weight has shape (11, 8), config.json implies (11, 4)"),
    "vocab_size 12": ({"vocab_size": 12}, "has shape (11, 8), config.json implies (12, 8)"),
    "vocab_size 10": ({"vocab_size": 10}, "has shape (11, 8), config.json implies (10, 8)"),
    "GPT-2's vocab_size": ({"vocab_size": 50257}, "config.json implies (50257, 8)"),
    "n_positions 17": ({"n_positions": 17}, "has shape (16, 8), config.json implies (17, 8)"),
    "n_positions 8": ({"n_positions": 8}, "has shape (16, 8), config.json implies (8, 8)"),
    "n_inner": ({"n_inner": 31}, "mlp.c_fc.weight has shape (8, 32), config.json implies (8, 31)"),
    "one layer more": ({"n_layer": 3}, "n_layer 3, but the weights hold 2 layers"),
    "GPT-2's n_layer": ({"n_layer": 12}, "n_layer 12, but the weights hold 2 layers"),
    "huge n_layer": ({"n_layer": 2**24}, "n_layer 16777216, but the weights hold 2 layers"),
    "huge n_embd": ({"n_embd": 2**24}, "config.json implies (11, 16777216)"),
    "huge vocab_size": ({"vocab_size": 2**24}, "config.json implies (16777216, 8)"),
    "huge n_positions": ({"n_positions": 2**24}, "config.json implies (16777216, 8)"),
    "all huge": (dict.fromkeys(SIZES, 2**24), "the weights hold 2 layers"),
    "untied without a head": (
        {"tie_word_embeddings": False},
        "tie_word_embeddings is false, but tensor lm_head.weight is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "cause"), cases(MISMATCHES))
def test_config_that_does_not_fit_the_weights(
    tmp_path: Path, changes: dict[str, Any], cause: str
) -> None:
    assert_refused(write_checkpoint(tmp_path, **changes), cause)


def test_layers_with_a_gap(tmp_path: Path) -> None:
    tensors = {name.replace("h.1.", "h.2."): a for name, a in random_tensors().items()}
    assert_refused(write_checkpoint(tmp_path, tensors), "tensor h.1.ln_1.weight is missing")


def test_missing_keys_are_gpt2s_own(tmp_path: Path) -> None:
    """An empty config is GPT-2 small, which these weights are not."""
    write_checkpoint(tmp_path)
    write_json(tmp_path / "config.json", {})
    assert_refused(tmp_path, "n_layer 12, but the weights hold 2 layers")


GELU = "activation_function is"
VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "other model_type": ({"model_type": "llama"}, "model_type is 'llama'; only 'gpt2' runs here"),
    "upper-case model_type": ({"model_type": "GPT2"}, "model_type is 'GPT2'"),
    "null model_type": ({"model_type": None}, "model_type is None"),
    "list model_type": ({"model_type": ["gpt2"]}, "model_type is ['gpt2']"),
    "endless model_type": ({"model_type": "x" * 10**5}, "model_type is 'xxx"),
    "cross-attention": ({"add_cross_attention": True}, "add_cross_attention is set"),
    "pruned heads": ({"pruned_heads": {"0": [1]}}, "pruned_heads is set"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
    "adapters": ({"adapters": {"a": 1}}, "adapters is set"),
    "unknown activation": ({"activation_function": "gelu_old"}, f"{GELU} 'gelu_old'; known are"),
    "activation by path": ({"activation_function": "os.system"}, f"{GELU} 'os.system'"),
    "null activation": ({"activation_function": None}, f"{GELU} None"),
    "number activation": ({"activation_function": 5}, f"{GELU} 5"),
    "list activation": ({"activation_function": ["gelu"]}, f"{GELU} ['gelu']"),
    "object activation": ({"activation_function": {"a": 1}}, f"{GELU} {{'a': 1}}"),
    "string epsilon": ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon must be a number"),
    "null epsilon": ({"layer_norm_epsilon": None}, "layer_norm_epsilon must be a number"),
    "true epsilon": ({"layer_norm_epsilon": True}, "layer_norm_epsilon must be a number"),
    "list epsilon": ({"layer_norm_epsilon": [1]}, "layer_norm_epsilon must be a number"),
    "negative epsilon": ({"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon must be in [0, 1)"),
    "large epsilon": ({"layer_norm_epsilon": 1}, "layer_norm_epsilon must be in [0, 1)"),
    "huge epsilon": ({"layer_norm_epsilon": 10**400}, "layer_norm_epsilon must be in [0, 1)"),
    "4001-digit epsilon": ({"layer_norm_epsilon": 10**4000}, "layer_norm_epsilon must be in"),
    "number dtype": ({"dtype": 32}, "dtype must be a name"),
    "list torch_dtype": ({"torch_dtype": ["float32"]}, "dtype must be a name"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "cause"), cases(VALUES))
def test_value(tmp_path: Path, changes: dict[str, Any], cause: str) -> None:
    assert_refused(write_checkpoint(tmp_path, **changes), f"config.json: {cause}")


@pytest.mark.parametrize("value", ["true", None, 1, [True]])
@pytest.mark.parametrize(
    "key",
    [
        *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"),
        "tie_word_embeddings",
    ],
)
def test_flag(tmp_path: Path, key: str, value: Any) -> None:
    write_checkpoint(tmp_path, **{key: value})
    assert_refused(tmp_path, f"config.json: {key} must be true or false, not {value!r}")


@pytest.mark.parametrize("value", ["1", True, 1.0, {}, [[1]], [None]])
@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_token_id(tmp_path: Path, key: str, value: Any) -> None:
    write_checkpoint(tmp_path, **{key: value})
    cause = f"{key} must be an id or a list of ids, not {value!r}"
    assert_refused(tmp_path, f"config.json: {cause}")


HARMLESS: dict[str, dict[str, Any]] = {
    "empty refused keys": {"add_cross_attention": False, "pruned_heads": {},
                           "quantization_config": None},
    "ids outside the vocabulary": {"eos_token_id": [-1, 11, 10**30], "pad_token_id": 99},
    "no ids": {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None},
    "unused keys": {"attn_pdrop": "x", "n_ctx": [], "task_specific_params": {"a": {"b": 10**400}}},
    "names of other things": {"__class__": "x", "source": "y", "error": 5, "\x00": 1, "": 2},
}  # fmt: skip


@pytest.mark.parametrize("changes", cases(HARMLESS))
def test_odd_but_harmless(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert_loads(write_checkpoint(tmp_path, **changes))


GENERATION = {
    "empty": ("", "generation_config.json: is not valid JSON"),
    "array": ("[]", "generation_config.json: must hold a JSON object"),
    "null": ("null", "generation_config.json: must hold a JSON object"),
    "deep": ("[" * 10**5, "generation_config.json: is nested too deeply"),
    "key twice": ('{"a": 1, "a": 1}', "generation_config.json: is not valid JSON: key 'a' stands"),
    "NaN": ('{"temperature": NaN}', "generation_config.json: is not valid JSON: NaN"),
    "string eos": ('{"eos_token_id": "10"}', "generation_config.json: eos_token_id must be an id"),
    "true eos": ('{"eos_token_id": true}', "generation_config.json: eos_token_id must be an id"),
    "nested eos": ('{"eos_token_id": [[1]]}', "generation_config.json: eos_token_id must be an id"),
    "float pad": ('{"pad_token_id": 1.5}', "generation_config.json: pad_token_id must be an id"),
}


@pytest.mark.parametrize(("text", "cause"), cases(GENERATION))
def test_generation_config(tmp_path: Path, text: str, cause: str) -> None:
    (write_checkpoint(tmp_path) / "generation_config.json").write_text(text)
    assert_refused(tmp_path, cause)


@pytest.mark.parametrize("tied", [True, False])
def test_head_that_differs_from_the_embedding_counts(tmp_path: Path, tied: bool) -> None:
    """Whatever the config says, as in transformers: never the wrong one in silence."""
    head = random_array(11, 8) + np.arange(11, dtype=np.float32)[:, None]
    tensors = {**random_tensors(), "lm_head.weight": head}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors, tie_word_embeddings=tied))
    assert not checkpoint.tied
    np.testing.assert_array_equal(checkpoint.read("lm_head.weight"), head)
