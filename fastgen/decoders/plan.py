"""LoadOptions: what a caller asks for. DecoderPlan: which decoder a model gets, and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgen.checkpoints.config import DTYPES, GPT2Config
from fastgen.checks import boolean, wrong_type, wrong_value
from fastgen.decoders.interface import Capacity
from fastgen.decoders.memory import BLOCK_SIZE, MemoryPlan
from fastgen.errors import OptionError

SAMPLING_BYTES = 72  # of float64 work per vocabulary entry and sampled row
_LOGITS = 128  # rows of logits a step may ask for, when it scores a prompt

DECODERS = ("auto", "cpu", "cuda", "torch")
QUANTIZATIONS = ("int8",)
KV_DTYPES = ("auto", "int8")


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a model is loaded; see fastgen.load. Nothing is cached unless it is said.

    Raises:
        OptionTypeError, OptionError: an option is wrong.
    """

    device: str = "auto"
    dtype: str = "auto"
    quantize: str | None = None
    kv_dtype: str = "auto"
    decoder: str = "auto"
    max_batch_size: int = 32
    max_seq_len: int | None = None
    max_memory: int | None = None
    num_threads: int | None = None
    batch_invariant: bool | None = None
    cache: bool | str | Path = False
    share_weights: bool = False

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_seq_len", "max_memory", "num_threads"):
            value = getattr(self, name)
            if value is None and name != "max_batch_size":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise wrong_type(name, f"must be an integer, not {type(value).__name__}")
            if value < 1:
                raise wrong_value(name, f"must be at least 1, not {value}")
        if not isinstance(self.device, str):
            raise wrong_type("device", f"must be a name, not {type(self.device).__name__}")
        _one_of("dtype", self.dtype_name, ("auto", *DTYPES))
        _one_of("decoder", self.decoder, DECODERS)
        _one_of("kv_dtype", self.kv_dtype, KV_DTYPES)
        if self.quantize is not None:
            _one_of("quantize", self.quantize, QUANTIZATIONS)
        if self.batch_invariant not in (None, False, True):
            raise wrong_type("batch_invariant", "must be True, False or None")
        if not isinstance(self.cache, (bool, str, Path)):
            raise wrong_type(
                "cache", f"must be True, False or a folder, not {type(self.cache).__name__}"
            )
        if self.cache == "":
            raise wrong_value("cache", "must not be empty; False is no cache")
        boolean("share_weights", self.share_weights)

    @property
    def dtype_name(self) -> str:
        """Without PyTorch's prefix, if it is PyTorch's."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def is_cpu(self) -> bool:
        """Whether `device` names the CPU."""
        return self.device.partition(":")[0] == "cpu"

    def limits(self, config: GPT2Config, step_tokens: int, *, batch_invariant: bool) -> Capacity:
        """Of a decoder whose steps take at least `step_tokens`; no blocks are planned yet.

        Raises:
            OptionError: the model has fewer positions than a row is to have.
        """
        max_seq_len = self.max_seq_len or config.max_positions
        if max_seq_len > config.max_positions:
            problem = f"exceeds the model's {config.max_positions} positions"
            raise OptionError(f"max_seq_len={max_seq_len} {problem}", "max_seq_len", problem)
        return Capacity(
            num_blocks=0,
            block_size=BLOCK_SIZE,
            max_seq_len=max_seq_len,
            max_tokens=max(step_tokens, self.max_batch_size + BLOCK_SIZE),
            max_logits=max(self.max_batch_size, min(_LOGITS, max_seq_len)),
            num_seats=self.max_batch_size,
            batch_invariant=batch_invariant,
        )


@dataclass(frozen=True, slots=True)
class DecoderPlan:
    """The decoder a model gets and why, where, in what arithmetic, with how much memory.

    `dtype` is that of activations, `weights` how weights are kept, `kv_dtype` how keys and values
    are; None: as activations. `cache` is the folder of packed weights that is looked into, if any;
    `share_weights`, whether processes share one copy of them.
    """

    decoder: str
    reason: str
    device: str
    dtype: str
    weights: str
    num_threads: int | None
    limits: Capacity
    memory: MemoryPlan
    kv_dtype: str | None = None
    cache: str | None = None
    share_weights: bool = False


def unmet(name: str, value: Any, problem: str) -> OptionError:
    """The error of an option whose value is right, and cannot be met here."""
    return OptionError(f"{name}={value!r}: {problem}", name, problem)


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise wrong_value(name, f"must be one of {', '.join(known)}, not {value!r}")
