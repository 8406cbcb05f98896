"""GPT2Config: a checkpoint's config.json, read as data and checked.

Only known keys are read, none is ever imported or evaluated. What GPT-2's own implementation would
compute differently is either supported here or refused by name; keys without a bearing on inference
(dropout, initialisation, summary heads, file provenance) are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastgen.errors import CheckpointError, shown, shown_name

ACTIVATIONS = (
    "gelu",
    "gelu_fast",
    "gelu_new",
    "gelu_python",
    "gelu_pytorch_tanh",
    "quick_gelu",
    "relu",
    "sigmoid",
    "silu",
    "swish",
    "tanh",
)
DTYPES = ("float32", "float16", "bfloat16")

# transformers accepts its general names beside GPT-2's own.
_ALIASES = {
    "n_embd": "hidden_size",
    "n_positions": "max_position_embeddings",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
}
# Keys that change what is computed, in ways that are not built here: refused unless empty.
_REFUSED = {
    "add_cross_attention": "cross-attention layers (encoder-decoder models)",
    "pruned_heads": "pruned attention heads",
    "quantization_config": "weights quantized by another tool",
    "adapters": "adapters; merge them into the weights first",
}
# What auto_map may name as the code of a checkpoint: copies of transformers' own.
_GPT2_CLASSES = (
    "GPT2Config",
    "GPT2Model",
    "GPT2LMHeadModel",
    "GPT2DoubleHeadsModel",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2ForQuestionAnswering",
)
_MAX_SIZE = 2**24  # of any one dimension: keeps products far from 64-bit overflow


@dataclass(frozen=True, slots=True)
class GPT2Config:
    """Shape and variant of a GPT-2. Sizes are counts; `bos`, `eos` and `pad` are token ids."""

    vocab_size: int
    max_positions: int
    hidden_size: int
    num_layers: int
    num_heads: int
    inner_size: int
    activation: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    dtype: str | None = None  # as config.json says; the weights' own dtype decides

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def attention_scale(self, layer: int) -> float:
        """The factor on q·k in `layer` (0-based)."""
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    def parameter_count(self, *, tied: bool = True) -> int:
        c, i = self.hidden_size, self.inner_size
        layer = 4 * c * c + 2 * c * i + 9 * c + i  # four projections, their biases, two layer norms
        embeddings = (self.vocab_size * (1 if tied else 2) + self.max_positions) * c
        return embeddings + self.num_layers * layer + 2 * c

    @classmethod
    def from_dict(cls, data: Any, source: str = "config.json") -> GPT2Config:
        """Read config.json's parsed content.

        Raises:
            CheckpointError: names `source` and the key that is wrong or cannot be run exactly.
        """
        return _Reader(data, source).config()


class _Reader:
    """Reads one config's keys, with the source's name in every complaint."""

    def __init__(self, data: Any, source: str) -> None:
        self.source = source
        if not isinstance(data, Mapping):
            raise self.error(f"must hold a JSON object, not {type(data).__name__}")
        self.data = data

    def error(self, cause: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {cause}")

    def config(self) -> GPT2Config:
        self._check_architecture()
        hidden_size, num_heads = self.size("n_embd", 768), self.size("n_head", 12)
        if hidden_size % num_heads:
            raise self.error(f"n_head {num_heads} does not divide n_embd {hidden_size}")
        vocab_size = self.size("vocab_size", 50257)
        inner_size = 4 * hidden_size
        if self.data.get("n_inner") is not None:
            inner_size = self.size("n_inner", inner_size)
        return GPT2Config(
            vocab_size=vocab_size,
            max_positions=self.size("n_positions", 1024),
            hidden_size=hidden_size,
            num_layers=self.size("n_layer", 12),
            num_heads=num_heads,
            inner_size=inner_size,
            activation=self.activation(),
            layer_norm_epsilon=self.epsilon(),
            scale_attn_weights=self.flag("scale_attn_weights", True),
            scale_attn_by_inverse_layer_idx=self.flag("scale_attn_by_inverse_layer_idx", False),
            reorder_and_upcast_attn=self.flag("reorder_and_upcast_attn", False),
            tie_word_embeddings=self.flag("tie_word_embeddings", True),
            bos_token_id=self.special_id("bos_token_id", vocab_size),
            eos_token_ids=self.special_ids("eos_token_id", vocab_size),
            pad_token_id=self.special_id("pad_token_id", vocab_size),
            dtype=self.dtype(),
        )

    def _check_architecture(self) -> None:
        model_type = self.data.get("model_type", "gpt2")
        if model_type != "gpt2":
            raise self.error(f"model_type is {shown(model_type)}; only 'gpt2' runs here")
        for key, meaning in _REFUSED.items():
            if self.data.get(key):
                raise self.error(f"{key} is set: {meaning} cannot be run exactly")
        self._check_auto_map()

    def _check_auto_map(self) -> None:
        """Refuse a model of the checkpoint's own code. AutoTokenizer is left to the tokenizer."""
        auto_map = self.data.get("auto_map") or {}
        if not isinstance(auto_map, Mapping):
            raise self.error(f"auto_map must be an object, not {shown(auto_map)}")
        for key, value in auto_map.items():
            name = value.rpartition(".")[2] if isinstance(value, str) else value
            is_tokenizer = str(key).removeprefix("Auto") == "Tokenizer"
            if not is_tokenizer and name not in _GPT2_CLASSES:
                raise self.error(
                    f"auto_map names {shown(value)} as its {shown_name(str(key))}; "
                    "a checkpoint's own code is never run, and only GPT-2 can be run exactly"
                )

    def size(self, key: str, default: int) -> int:
        """Of `key`, or of its general name in transformers; both are allowed if they agree."""
        alias = _ALIASES.get(key, key)
        own, general = self.data.get(key, default), self.data.get(alias, default)
        if key in self.data and alias in self.data and own != general:
            raise self.error(f"{key} is {shown(own)} but {alias} is {shown(general)}")
        key, value = (alias, general) if alias in self.data else (key, own)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"{key} must be an integer, not {shown(value)}")
        if not 1 <= value <= _MAX_SIZE:
            raise self.error(f"{key} must be between 1 and {_MAX_SIZE}, not {shown(value)}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.data.get(key, default)
        if not isinstance(value, bool):
            raise self.error(f"{key} must be true or false, not {shown(value)}")
        return value

    def epsilon(self) -> float:
        value = self.data.get("layer_norm_epsilon", 1e-5)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(f"layer_norm_epsilon must be a number, not {shown(value)}")
        if not 0 <= value < 1:  # NaN is not either
            raise self.error(f"layer_norm_epsilon must be in [0, 1), not {shown(value)}")
        return float(value)

    def activation(self) -> str:
        value = self.data.get("activation_function", "gelu_new")
        if value not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise self.error(f"activation_function is {shown(value)}; known are: {known}")
        return str(value)

    def special_id(self, key: str, vocab_size: int) -> int | None:
        ids = self.special_ids(key, vocab_size)
        return ids[0] if ids else None

    def special_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """One id, a list of them, or null. Ids outside the vocabulary are never drawn: left out.

        A config without the key means 50256, transformers' default, for bos and eos.
        """
        default = None if key == "pad_token_id" else 50256
        value = self.data.get(key, default)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise self.error(f"{key} must be an id or a list of ids, not {shown(value)}")
        return tuple(token_id for token_id in ids if 0 <= token_id < vocab_size)

    def dtype(self) -> str | None:
        value = self.data.get("dtype", self.data.get("torch_dtype"))
        if value is not None and not isinstance(value, str):
            raise self.error(f"dtype must be a name such as 'float32', not {shown(value)}")
        return value
