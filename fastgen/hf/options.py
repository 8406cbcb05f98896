"""transformers' resolved processors and stopping criteria, as fastgen's own options.

transformers has made them from its defaults, files and keywords; here they are only read. What has
no exact counterpart raises NotNative, with its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from transformers.generation import logits_process as processors
from transformers.generation import stopping_criteria as criteria

from fastgen.hf.not_native import NotNative
from fastgen.sampling.options import FILTERS, Option
from fastgen.sampling.params import SamplingParams


@dataclass(slots=True)
class Prompts:
    """The prompts of a call: (B, T) ids, of which row r begins at starts[r], after its padding."""

    token_ids: Any  # int64 (B, T)
    starts: Any  # int64 (B,)

    @property
    def length(self) -> int:
        return int(self.token_ids.shape[1])

    @property
    def are_padded(self) -> bool:
        return bool(self.starts.any())

    def paddings(self) -> list[set[int]]:
        """The ids that stand in each row's padding."""
        rows = zip(self.token_ids, self.starts, strict=True)
        return [set(row[:start].tolist()) for row, start in rows]

    def padding(self) -> set[int]:
        """Ids that stand in the padding of some row."""
        return set().union(*self.paddings())

    def seen(self) -> set[int]:
        """Ids that stand after the padding."""
        ids: set[int] = set()
        for row, start in zip(self.token_ids, self.starts, strict=True):
            ids.update(row[start:].tolist())
        return ids


@dataclass(slots=True)
class NativeOptions:
    """What the engine and the loop around it are told.

    Attributes:
        params: SamplingParams' options, without a seed.
        max_length: tokens of a row, padding included.
        eos_ids: they end a row, and the row is padded from there on.
        forced_eos: what the last token is, if the row comes so far.
        stop_strings: the criterion that ends rows by their text.
        deadline: time.time() after which all rows end.
    """

    params: dict[str, Any] = field(default_factory=dict)
    max_length: int = 0
    eos_ids: tuple[int, ...] | None = None
    forced_eos: int | None = None
    stop_strings: criteria.StopStringCriteria | None = None
    deadline: float | None = None
    num_warpers: int = 0  # options that only a sampled call has
    removes_invalid: bool = False
    row_bans: list[tuple[int, ...]] = field(default_factory=list)  # more suppressed ids, row by row

    def bans_of(self, row: int) -> tuple[int, ...]:
        """Ids that this row must not draw, besides what all must not."""
        return self.row_bans[row] if self.row_bans else ()

    def sampling_params(
        self, num_new: int, vocab_size: int, bans: tuple[int, ...]
    ) -> SamplingParams:
        """Of rows with these bans and up to `num_new` new tokens; eos ids outside the vocabulary
        never come."""
        eos_ids = [token_id for token_id in self.eos_ids or () if 0 <= token_id < vocab_size]
        ends = self.forced_eos is not None and self.forced_eos >= vocab_size
        if ends or ("exponential_decay_length_penalty" in self.params and not eos_ids):
            raise NotNative("an eos id that is needed is outside the vocabulary")
        options = {**self.params, "max_new_tokens": num_new}
        options |= {"stop_token_ids": eos_ids, "ignore_eos": True}  # the call's, alone
        options["suppress_tokens"] = (*options.get("suppress_tokens", ()), *bans)
        options["min_new_tokens"] = min(num_new, options.get("min_new_tokens", 0))
        try:
            return SamplingParams(**options)
        except (TypeError, ValueError) as error:
            raise NotNative(str(error)) from error


def native_options(
    prompts: Prompts, processor_list: Iterable[Any], criteria_list: Iterable[Any], *, sampled: bool
) -> NativeOptions:
    """Raises NotNative for a processor or criterion that the engine does not know."""
    if type(processor_list) is not processors.LogitsProcessorList:
        raise NotNative(f"its processors are a {type(processor_list).__name__}")
    if type(criteria_list) is not criteria.StoppingCriteriaList:
        raise NotNative(f"its stopping criteria are a {type(criteria_list).__name__}")
    options = NativeOptions()
    kinds: set[type] = set()
    for criterion in criteria_list:
        _of(_CRITERIA, criterion, "stopping criterion")(options, criterion)
        if type(criterion) in kinds:
            raise NotNative(f"two criteria of the kind {type(criterion).__name__}")
        kinds.add(type(criterion))
    if options.max_length <= prompts.length:
        raise NotNative("there is no bound of the length, or it has been reached")
    order = list(_PROCESSORS)
    last = -1
    for processor in processor_list:
        read = _of(_PROCESSORS, processor, "logits processor")
        rank = order.index(type(processor))
        if rank <= last:
            raise NotNative(f"{type(processor).__name__} stands in an order of its own")
        last = rank
        read(options, processor, prompts)
    if options.removes_invalid and "exponential_decay_length_penalty" in options.params:
        raise NotNative("remove_invalid_values before a penalty that raises eos ids")
    options.params.setdefault("temperature", 1.0)
    if not sampled:
        if options.num_warpers:
            raise NotNative("a filter without sampling")
        options.params["temperature"] = 0.0
    return options


def _of(table: dict[type, Any], item: Any, kind: str) -> Any:
    if type(item) not in table:
        raise NotNative(f"{kind} {type(item).__name__}")
    return table[type(item)]


Reader = Callable[[NativeOptions, Any, Prompts], None]


def _ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, Tensor):
        return tuple(value.flatten().tolist())
    return tuple(value) if isinstance(value, (list, tuple)) else (int(value),)


def _same_eos(options: NativeOptions, processor: Any) -> None:
    if set(_ids(processor.eos_token_id)) != set(options.eos_ids or ()):
        raise NotNative(f"{type(processor).__name__} has eos ids of its own")


def _bias(options: NativeOptions, processor: Any, prompts: Prompts) -> None:
    words = {tuple(word): float(bias) for word, bias in processor.sequence_bias.items()}
    _check_beginnings(words, prompts, "sequence_bias")
    lengths = list(dict.fromkeys(map(len, words)))  # transformers adds length by length
    words = dict(sorted(words.items(), key=lambda item: lengths.index(len(item[0]))))
    options.params["logit_bias"] = {w[0]: bias for w, bias in words.items() if len(w) == 1}
    options.params["sequence_bias"] = {w: bias for w, bias in words.items() if len(w) > 1}


def _check_beginnings(words: Iterable[tuple[int, ...]], prompts: Prompts, name: str) -> None:
    """Where prompts are padded, transformers treats the padding as a part of them."""
    beginnings = {token_id for word in words for token_id in word[:-1]}
    if prompts.are_padded and beginnings & prompts.padding():
        raise NotNative(f"{name} may begin in the padding")


def _repetition(options: NativeOptions, processor: Any, prompts: Prompts) -> None:
    ignored = getattr(processor, "prompt_ignore_length", None)
    if isinstance(ignored, Tensor):
        ignored = ignored.cpu().numpy()
    if ignored is None and prompts.are_padded:
        raise NotNative("repetition_penalty counts padding")
    if ignored is not None and (np.asarray(ignored) != prompts.starts).any():
        raise NotNative("repetition_penalty leaves out a part of the prompt")
    if getattr(processor, "logits_indices", None) is not None:
        raise NotNative("repetition_penalty of packed rows")
    options.params["repetition_penalty"] = float(processor.penalty)


def _ngrams(options: NativeOptions, processor: Any, prompts: Prompts) -> None:
    padding = prompts.padding()
    if processor.ngram_size == 1:  # transformers counts what is in the padding as seen
        options.row_bans = [tuple(ids) for ids in prompts.paddings()]
    elif not padding <= set(options.eos_ids or ()) or padding & prompts.seen():
        raise NotNative("no_repeat_ngram_size with n-grams that begin in the padding")
    options.params["no_repeat_ngram_size"] = processor.ngram_size


def _bad_words(options: NativeOptions, processor: Any, prompts: Prompts) -> None:
    words = [tuple(word) for word in processor.sequence_bias]  # the eos ids are left out of it
    if any(bias != float("-inf") for bias in processor.sequence_bias.values()):
        raise NotNative("bad words with a bias of their own")
    _check_beginnings(words, prompts, "bad_words_ids")
    alone = {word[0] for word in words if len(word) == 1}
    if alone & set(options.eos_ids or ()):
        raise NotNative("bad words hold an eos id")
    options.params["bad_words"] = words


def _min_length(options: NativeOptions, processor: Any, prompts: Prompts) -> None:
    _same_eos(options, processor)
    _at_least(options, processor.min_length - prompts.length)


def _min_new(options: NativeOptions, processor: Any, prompts: Prompts) -> None:
    _same_eos(options, processor)
    beyond = processor.prompt_length_to_skip - prompts.length
    _at_least(options, processor.min_new_tokens + beyond)


def _at_least(options: NativeOptions, num_new: int) -> None:
    options.params["min_new_tokens"] = max(options.params.get("min_new_tokens", 0), num_new, 0)


def _forced_bos(options: NativeOptions, processor: Any, prompts: Prompts) -> None:
    if prompts.length == 1:
        raise NotNative("forced_bos_token_id after a prompt of one token")


def _forced_eos(options: NativeOptions, processor: Any, prompts: Prompts) -> None:
    ids = _ids(processor.eos_token_id)
    if len(ids) != 1 or processor.max_length != options.max_length:
        raise NotNative("several forced eos ids, or at another length")
    [options.forced_eos] = ids


def _length_penalty(options: NativeOptions, processor: Any, prompts: Prompts) -> None:
    _same_eos(options, processor)
    start = processor.regulation_start - prompts.length
    factor = float(processor.regulation_factor)
    options.params["exponential_decay_length_penalty"] = (start, factor)


def _suppress(options: NativeOptions, processor: Any, prompts: Prompts) -> None:
    options.params["suppress_tokens"] = _ids(processor.suppress_tokens)
    if options.forced_eos in options.params["suppress_tokens"]:
        raise NotNative("a suppressed token is forced")


def _begin_suppress(options: NativeOptions, processor: Any, prompts: Prompts) -> None:
    if processor.begin_index != prompts.length:
        raise NotNative("begin_suppress_tokens at another place than the beginning")
    options.params["begin_suppress_tokens"] = _ids(processor.begin_suppress_tokens)
    if options.forced_eos in options.params["begin_suppress_tokens"]:
        raise NotNative("a suppressed token is forced")


def _warper(option: Option) -> Reader:
    name, attribute = option.name, option.attribute

    def read(options: NativeOptions, processor: Any, prompts: Prompts) -> None:
        if getattr(processor, "min_tokens_to_keep", 1) != 1:
            raise NotNative(f"{name} that keeps at least several tokens")
        if getattr(processor, "filter_value", -np.inf) != -np.inf:
            raise NotNative(f"{name} with a filter value of its own")
        value = getattr(processor, attribute)
        options.params[name] = value.item() if isinstance(value, Tensor) else value
        options.num_warpers += 1

    return read


def _invalid(options: NativeOptions, processor: Any, prompts: Prompts) -> None:
    """Bans become the lowest finite score: the same is drawn; where nothing can be, transformers'
    loop is run."""
    options.removes_invalid = True


def _no_change(options: NativeOptions, processor: Any, prompts: Prompts) -> None:
    """It changes scores, but not what is drawn."""


# In transformers' order, which is that of the table of options; a list in another order means
# something else.
_PROCESSORS: dict[type, Reader] = {
    processors.SequenceBiasLogitsProcessor: _bias,
    processors.RepetitionPenaltyLogitsProcessor: _repetition,
    processors.NoRepeatNGramLogitsProcessor: _ngrams,
    processors.NoBadWordsLogitsProcessor: _bad_words,
    processors.MinLengthLogitsProcessor: _min_length,
    processors.MinNewTokensLengthLogitsProcessor: _min_new,
    processors.ForcedBOSTokenLogitsProcessor: _forced_bos,
    processors.ForcedEOSTokenLogitsProcessor: _forced_eos,
    processors.InfNanRemoveLogitsProcessor: _invalid,
    processors.ExponentialDecayLengthPenalty: _length_penalty,
    processors.SuppressTokensLogitsProcessor: _suppress,
    processors.SuppressTokensAtBeginLogitsProcessor: _begin_suppress,
    **{
        getattr(processors, kind): _warper(option)
        for option in FILTERS
        for kind in option.transformers
    },
    processors.LogitNormalization: _no_change,
}


def _max_length(options: NativeOptions, criterion: Any) -> None:
    options.max_length = math.ceil(criterion.max_length)


def _max_time(options: NativeOptions, criterion: Any) -> None:
    options.deadline = criterion.initial_timestamp + criterion.max_time


def _stop_strings(options: NativeOptions, criterion: Any) -> None:
    if not all(criterion.stop_strings):
        raise NotNative("an empty stop string")
    options.stop_strings = criterion


def _eos(options: NativeOptions, criterion: Any) -> None:
    options.eos_ids = _ids(criterion.eos_token_id)


_CRITERIA: dict[type, Callable[[NativeOptions, Any], None]] = {
    criteria.MaxLengthCriteria: _max_length,
    criteria.MaxTimeCriteria: _max_time,
    criteria.StopStringCriteria: _stop_strings,
    criteria.EosTokenCriteria: _eos,
}
