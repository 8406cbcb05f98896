"""transformers' beam search over rows of fastgen's KV blocks.

Candidates are found beam by beam, and a reordering of beams moves block tables. What is done with
the candidates is transformers' own code, called. Shapes: B prompts, M beams each, R = B * M rows, T
tokens of the prompts, V vocabulary, K candidates of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation import GenerateBeamDecoderOnlyOutput

from fastgen.hf.cache import BlockCache
from fastgen.hf.forward import check_positions, check_tokens
from fastgen.hf.kv_rows import Ints, KvRows
from fastgen.hf.not_native import NotNative
from fastgen.hf.sampling import check_arguments, starts_of

_NOT_CHOSEN = -1e9  # transformers' score of what must not be chosen


@dataclass(slots=True)
class BeamCall:
    """One call with beams. `starts` (R,): where each row begins, after its padding."""

    token_ids: Tensor  # (R, T), each prompt M times
    starts: Ints
    processors: Any
    criteria: Any
    config: Any
    cache: BlockCache

    @property
    def num_kept(self) -> int:
        """K: enough that M beams go on if all others have ended."""
        eos = self.config._eos_token_tensor
        return max(2, 1 + (0 if eos is None else len(eos))) * int(self.config.num_beams)

    def gives(self, what: str) -> bool:
        return bool(self.config.return_dict_in_generate and getattr(self.config, what))


def beam_call(
    token_ids: Tensor, processors: Any, criteria: Any, config: Any, arguments: Mapping[str, Any]
) -> BeamCall:
    """Read a call's arguments.

    Raises:
        NotNative: transformers' loop has to run it.
    """
    check_arguments(config, arguments)
    if getattr(config, "low_memory", None):
        raise NotNative("low_memory was asked for")
    cache = arguments.get("past_key_values")
    if not isinstance(cache, BlockCache) or cache.has_tensors or cache.get_seq_length():
        raise NotNative("there is another kind of cache, none, or one to be continued")
    return BeamCall(token_ids, starts_of(token_ids, arguments), processors, criteria, config, cache)


def search_beams(model: Any, kv: KvRows, call: BeamCall) -> Any:
    """Run the search; returns what transformers' loop returns.

    Raises:
        IndexError: a token, or a row's position, is not in the model's tables.
    """
    check_tokens(call.token_ids.cpu().numpy(), kv.vocab_size)
    search = _Search(model, kv, call)
    while search.step():
        pass
    return search.output()


class _Search:
    """The running beams, the finished ones, and the scores of both (transformers' names)."""

    def __init__(self, model: Any, kv: KvRows, call: BeamCall) -> None:
        self._model, self._kv, self._call = model, kv, call
        config, ids = call.config, call.token_ids
        self._num_beams = int(config.num_beams)
        self._batch_size, self._prompt_len = len(ids) // self._num_beams, ids.shape[1]
        self._length, self._max_length = self._prompt_len, int(config.max_length)
        self._rows = ids  # (R, length)
        shape = (self._batch_size, self._num_beams)
        self._running = torch.full(
            (*shape, self._max_length), self._fill_value(), dtype=torch.int64, device=ids.device
        )
        self._running[:, :, : self._length] = ids.view(*shape, -1)
        self._running_scores = torch.zeros(shape, dtype=torch.float32, device=ids.device)
        self._running_scores[:, 1:] = _NOT_CHOSEN  # at first all beams of a prompt are the same
        num_new = self._max_length - self._length
        self._running_indices = ids.new_full((*shape, num_new), -1, dtype=torch.int32)
        self._finished = self._running.clone()
        self._finished_scores = torch.full_like(self._running_scores, _NOT_CHOSEN)
        self._finished_indices = self._running_indices.clone()
        self._is_finished = torch.zeros(shape, dtype=torch.bool, device=ids.device)
        self._may_improve = torch.ones((shape[0], 1), dtype=torch.bool, device=ids.device)
        self._scores: tuple[Tensor, ...] = ()
        self._logits: tuple[Tensor, ...] = ()
        self._mask = np.arange(self._length) >= call.starts[:, None]  # (R, length)

    def step(self) -> bool:
        """Give each running beam a token; whether the search goes on."""
        model, config = self._model, self._call.config
        log_probs, beams, token_ids = self._candidates()
        sequences, indices = self._extended(beams, token_ids)
        ends = self._ending(sequences)
        self._running, self._running_scores, self._running_indices = (
            model._get_running_beams_for_next_iteration(
                topk_log_probs=log_probs,
                topk_running_sequences=sequences,
                topk_running_beam_indices=indices,
                next_token_hits_stopping_criteria=ends,
                num_beams=self._num_beams,
            )
        )
        self._update_finished(log_probs, sequences, indices, ends)
        origins = self._running_indices[..., self._length - self._prompt_len].flatten()
        self._call.cache.reorder_cache(origins)
        self._mask = self._mask[origins.cpu().numpy()]
        self._length += 1
        self._rows = self._running[:, :, : self._length].flatten(0, 1)
        self._may_improve = model._check_early_stop_heuristic(
            is_early_stop_heuristic_unsatisfied=self._may_improve,
            running_beam_scores=self._running_scores,
            beam_scores=self._finished_scores,
            is_sent_finished=self._is_finished,
            cur_len=self._length,
            max_length=self._max_length,
            decoder_prompt_len=self._prompt_len,
            early_stopping=config.early_stopping,
            length_penalty=config.length_penalty,
        )
        goes_on = model._beam_search_has_unfinished_sequences(
            self._may_improve, self._is_finished, ends, config.early_stopping
        )
        return bool(goes_on)

    def output(self) -> Any:
        """The best finished beams of each prompt, best first."""
        config = self._call.config
        count = int(config.num_return_sequences)
        sequences = self._finished[:, :count].flatten(0, 1)
        indices = self._finished_indices[:, :count].flatten(0, 1)
        num_new = int((indices + 1).bool().sum(dim=1).max())
        sequences = sequences[:, : self._prompt_len + num_new]
        if not config.return_dict_in_generate:
            return sequences
        scores = self._finished_scores[:, :count].flatten(0, 1)
        return GenerateBeamDecoderOnlyOutput(
            sequences=sequences,
            sequences_scores=scores if config.output_scores else None,
            scores=self._scores if config.output_scores else None,
            logits=self._logits if config.output_logits else None,
            beam_indices=indices[:, :num_new],
            past_key_values=self._call.cache,
        )

    def _fill_value(self) -> int:
        """transformers' own: a padding id of 0 counts as none."""
        config = self._call.config
        eos, pad = config._eos_token_tensor, config._pad_token_tensor
        if eos is None:
            return -1
        return int(pad) if pad is not None and int(pad) else int(eos[0])

    def _forward(self) -> Tensor:
        """Logits of the rows' next tokens, float32 (R, V)."""
        past, call = self._call.cache.get_seq_length(), self._call
        ids = self._rows[:, past:].cpu().numpy()
        positions = np.maximum(np.arange(past, self._length) - call.starts[:, None], 0)
        check_positions(positions, self._kv.num_positions)
        if self._mask.shape[1] < self._length:
            self._mask = np.pad(self._mask, ((0, 0), (0, 1)), constant_values=True)
        logits = call.cache.extend(self._kv, ids, self._mask, positions, 1)[:, 0]
        return torch.from_numpy(logits).to(self._rows.device, self._model.dtype).float()

    def _candidates(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the K candidates the summed log-probabilities, the beams they continue, and their ids,
        each (B, K)."""
        call, logits = self._call, self._forward()
        if call.gives("output_logits"):
            self._logits += (logits.clone(),)
        log_probs = call.processors(self._rows, logits.log_softmax(dim=-1))
        if call.gives("output_scores"):
            self._scores += (log_probs.clone(),)
        if call.config.do_sample:
            return self._drawn(log_probs)
        count, vocab_size = call.num_kept, log_probs.shape[1]
        best, ids = log_probs.topk(min(count, vocab_size), dim=-1)  # the best K are among these
        best = best.view(self._batch_size, self._num_beams, -1) + self._running_scores[:, :, None]
        values, places = best.flatten(1).topk(count)
        ids = ids.view(self._batch_size, -1).gather(1, places)
        return values, places // min(count, vocab_size), ids

    def _drawn(self, log_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Drawn from all continuations of a prompt at once, as transformers draws them."""
        vocab_size = log_probs.shape[1]
        summed = log_probs.view(self._batch_size, self._num_beams, -1)
        summed = (summed + self._running_scores[:, :, None]).flatten(1)
        places = torch.multinomial(summed.softmax(dim=-1), num_samples=self._call.num_kept)
        return summed.gather(1, places), places // vocab_size, places % vocab_size

    def _extended(self, beams: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The candidates' sequences (B, K, max_length), and of which row each token came."""
        sequences = self._model._gather_beams(self._running, beams)
        sequences[:, :, self._length] = token_ids
        indices = self._model._gather_beams(self._running_indices, beams)
        first_rows = torch.arange(self._batch_size, device=beams.device)[:, None] * self._num_beams
        indices[:, :, self._length - self._prompt_len] = beams + first_rows
        return sequences, indices

    def _ending(self, sequences: Tensor) -> Tensor:
        """Which candidates (B, K) a criterion ends."""
        rows = sequences[:, :, : self._length + 1].flatten(0, 1)
        scores = self._scores if self._call.gives("output_scores") else None
        ends: Tensor = self._call.criteria(rows, scores).view(self._batch_size, -1)
        return ends

    def _update_finished(
        self, log_probs: Tensor, sequences: Tensor, indices: Tensor, ends: Tensor
    ) -> None:
        """Only the best M candidates of a prompt may finish."""
        config = self._call.config
        may_finish = torch.arange(self._call.num_kept, device=ends.device) < self._num_beams
        (
            self._finished,
            self._finished_scores,
            self._finished_indices,
            self._is_finished,
        ) = self._model._update_finished_beams(
            sequences=self._finished,
            topk_running_sequences=sequences,
            beam_scores=self._finished_scores,
            topk_log_probs=log_probs,
            beam_indices=self._finished_indices,
            topk_running_beam_indices=indices,
            is_early_stop_heuristic_unsatisfied=self._may_improve,
            is_sent_finished=self._is_finished,
            next_token_hits_stopping_criteria=ends,
            top_num_beam_mask=may_finish,
            num_beams=self._num_beams,
            cur_len=self._length,
            decoder_prompt_len=self._prompt_len,
            length_penalty=config.length_penalty,
            early_stopping=config.early_stopping,
        )
