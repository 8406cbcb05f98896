"""transformers' Cache over fastgen's KV blocks.

It remembers the tokens of its rows, and holds keys and values of as many of them as have been
needed so far; the rest is computed by the next forward. Reordering beams moves block tables.
Whoever asks for tensors (`layers`) gets them, made by transformers' own forward of the same tokens;
from then on it is an ordinary DynamicCache.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from fastgen.hf.kv_rows import Ints, KvRow, KvRows, NewTokens
from fastgen.hf.not_native import NotNative

Bools = NDArray[np.bool_]
# (token_ids, mask, positions) -> a DynamicCache that holds them
Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], DynamicCache]


class BlockCache(DynamicCache):  # type: ignore[misc]
    """Shapes: B rows, S tokens each, padding included; masked tokens have no keys and values.

    Attributes:
        token_ids, positions: int64 (B, S).
        mask: bool (B, S), which of them are attended.
        num_constant: of the S, the first that were added without gradients.
    """

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._tensors: list[Any] | None = None  # the layers, once somebody asked for them
        self._kv_ref: weakref.ref[KvRows] | None = None  # weights replaced since take it with them
        self.num_constant = 0
        self._rows: list[KvRow] = []
        self._set(np.zeros((0, 0), np.int64), np.zeros((0, 0), bool), np.zeros((0, 0), np.int64))
        super().__init__()

    @property
    def layers(self) -> list[Any]:
        """transformers' layers, with tensors."""
        if self._tensors is None:
            ids, mask, positions = map(
                torch.from_numpy, (self.token_ids, self.mask, self.positions)
            )
            self._tensors = self._compute(ids, mask, positions).layers
            self._drop_rows()
        return self._tensors

    @layers.setter
    def layers(self, layers: list[Any]) -> None:
        if layers:  # Cache.__init__ sets an empty list
            self._tensors = layers
            self._drop_rows()

    @property
    def has_tensors(self) -> bool:
        """It is an ordinary DynamicCache by now."""
        return self._tensors is not None

    def continues(self, kv: KvRows | None) -> bool:
        """Whether it holds tokens whose keys and values were computed with these weights."""
        return kv is not None and self._kv is kv and any(row.token_ids for row in self._rows)

    def remember(self, token_ids: Ints, mask: Bools, positions: Ints) -> None:
        """Take over tokens (B, S), whose first ones may be those it has; nothing is computed."""
        if len(self._live_rows()) != len(token_ids):
            self._drop_rows()
            self._rows = [KvRow() for _ in token_ids]
        self._set(token_ids, mask, positions)
        self.num_constant = token_ids.shape[1]

    def extend(
        self, kv: KvRows, token_ids: Ints, mask: Bools | None, positions: Ints, num_wanted: int
    ) -> NDArray[np.float32]:
        """Add tokens (B, T) to the rows.

        Args:
            mask: (B, S + T); None attends all.
            num_wanted: of the last T, how many tokens' logits are wanted; those are not masked.

        Returns:
            float32 (B, num_wanted, V).

        Raises:
            NotNative: the rows cannot hold what is asked; nothing has changed then.
        """
        self._attach(kv)
        past = self.get_seq_length()
        if past == 0 and len(self._rows) != len(token_ids):
            self.remember(token_ids[:, :0], np.zeros((len(token_ids), 0), bool), positions[:, :0])
        if mask is None:
            mask = np.ones((len(token_ids), past + token_ids.shape[1]), bool)
        self._check(token_ids, mask)
        before = self.token_ids, self.mask, self.positions
        self._set(
            np.concatenate([self.token_ids, token_ids], axis=1),
            mask,
            np.concatenate([self.positions, positions], axis=1),
        )
        try:
            return self._computed(kv, num_wanted)
        except BaseException:
            self._set(*before)
            self._cut_rows()
            raise

    def get_seq_length(self, layer_idx: int = 0) -> int:
        if self._tensors is not None:
            return int(super().get_seq_length(layer_idx))
        return int(self.token_ids.shape[1])

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        if self._tensors is not None:
            length, offset = super().get_mask_sizes(query_length, layer_idx)
            return length, offset
        return self.get_seq_length() + int(query_length), 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        if self._tensors is not None:
            return int(super().batch_size)
        return len(self._rows) or -1

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_initialized(self) -> bool:
        return self.get_seq_length() > 0

    def activate_past_recording(self) -> None:
        """Nothing to do: what was past is kept."""

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last -n tokens; 0 drops none; n > 0 (until 5.17) keeps the first n."""
        if self._tensors is not None:
            super().crop(tokens_to_remove)
            return
        length = self.get_seq_length()
        if tokens_to_remove > 0 and not _KEEPS_FIRST:
            raise ValueError(
                f"Calling `crop` with a positive value (`{tokens_to_remove}`) is not supported. "
                "Please use a negative integer to remove that number of tokens instead."
            )
        kept = min(length, tokens_to_remove) if tokens_to_remove > 0 else length + tokens_to_remove
        self._map_arrays(lambda array: array[:, : max(0, kept)])
        self.num_constant = min(self.num_constant, self.get_seq_length())
        self._cut_rows()

    def reset(self) -> None:
        if self._tensors is not None:
            super().reset()
            return
        self._drop_rows()
        self.num_constant = 0
        self._map_arrays(lambda array: array[:0, :0])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self._tensors is not None:
            super().reorder_cache(beam_idx)
        elif self.get_seq_length():
            self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self._tensors is not None:
            super().batch_select_indices(indices)
        elif self.get_seq_length():
            self._select(np.arange(len(self._rows))[np.asarray(indices)].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._tensors is not None:
            super().batch_repeat_interleave(repeats)
        elif self.get_seq_length():
            self._select(np.arange(len(self._rows)).repeat(repeats).tolist())

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        batch, length = self.token_ids.shape
        return f"BlockCache({batch} rows of {length} tokens)"

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockCache:
        twin = BlockCache(self._compute)
        if self._tensors is not None:
            twin._tensors = copy.deepcopy(self._tensors, memo)
        twin._set(self.token_ids.copy(), self.mask.copy(), self.positions.copy())
        twin._rows = self._copies(self._live_rows())
        twin._kv_ref, twin.num_constant = self._kv_ref, self.num_constant
        return twin

    def __copy__(self) -> BlockCache:
        return self.__deepcopy__({})

    def __reduce__(self) -> Any:
        """Elsewhere there are no blocks: it is saved as a DynamicCache."""
        return _with_layers, (self.layers,)

    def __del__(self) -> None:
        if "_rows" in self.__dict__:  # it has been made to the end
            self._drop_rows()

    def _map_arrays(self, change: Callable[[Any], Any]) -> None:
        self._set(*map(change, (self.token_ids, self.mask, self.positions)))

    def _set(self, token_ids: Ints, mask: Bools, positions: Ints) -> None:
        self.token_ids, self.mask, self.positions = token_ids, mask, positions

    @property
    def _kv(self) -> KvRows | None:
        return None if self._kv_ref is None else self._kv_ref()

    def _attach(self, kv: KvRows) -> None:
        """Blocks of weights that have been replaced since are worth nothing."""
        if self._kv is not kv:
            self._drop_rows()
            self._kv_ref = weakref.ref(kv)
            self._rows = [KvRow() for _ in self.token_ids]

    def _live_rows(self) -> list[KvRow]:
        """The rows; empty ones if their blocks have gone with the weights."""
        if self._kv is None:
            self._rows = [KvRow() for _ in self.token_ids]
        return self._rows

    def _cut_rows(self) -> None:
        """Let rows have no more than the tokens that are attended."""
        kv = self._kv
        for row, count in zip(self._live_rows(), self.mask.sum(axis=1).tolist(), strict=True):
            if kv is not None:
                kv.cut(row, count)

    def _check(self, token_ids: Ints, mask: Bools) -> None:
        if len(token_ids) != len(self._rows):
            raise NotNative("the cache has another number of rows")
        if mask.shape != (len(token_ids), self.get_seq_length() + token_ids.shape[1]):
            raise NotNative("the attention mask is not as long as cache and input together")
        for row, old, new in zip(self._rows, self.mask, mask, strict=True):
            # what is in the cache already: the first tokens that were attended
            cached = len(row.token_ids)
            seen = int(np.flatnonzero(old)[cached - 1]) + 1 if cached else 0
            if (old[:seen] != new[:seen]).any():
                raise NotNative("the attention mask of cached tokens has changed")

    def _computed(self, kv: KvRows, num_wanted: int) -> NDArray[np.float32]:
        """Compute what is not in the cache yet, equal new rows once."""
        leaders = self._leaders()
        work = [self._new_tokens(kv, at, num_wanted) for at in sorted(set(leaders))]
        vocab_size = kv.vocab_size
        logits = np.empty((len(work), num_wanted, vocab_size), np.float32)
        kv.forward(work, logits.reshape(-1, vocab_size))
        if len(work) == len(self._rows):
            return logits
        order = {leader: at for at, leader in enumerate(sorted(set(leaders)))}
        followers = [at for at, leader in enumerate(leaders) if at != leader]
        copies = self._copies([self._rows[leaders[at]] for at in followers])
        for at, row in zip(followers, copies, strict=True):
            self._rows[at] = row
        return logits[[order[leader] for leader in leaders]]

    def _leaders(self) -> list[int]:
        """For each row the first that is like it, among rows of which nothing is cached."""
        first: dict[Any, int] = {}
        leaders = []
        for at, row in enumerate(self._rows):
            if row.token_ids:
                leaders.append(at)
            else:
                rows = self.token_ids[at], self.mask[at], self.positions[at]
                content = tuple(row.tobytes() for row in rows)
                leaders.append(first.setdefault(content, at))
        return leaders

    def _new_tokens(self, kv: KvRows, at: int, num_wanted: int) -> NewTokens:
        """What row `at` lacks."""
        row, attended = self._rows[at], self.mask[at]
        ids, positions = self.token_ids[at][attended], self.positions[at][attended]
        if not row.token_ids:
            row.plain = bool((positions == np.arange(len(positions))).all())
            if row.plain:
                kv.find(row, ids[: len(ids) - num_wanted])
        elif row.plain:
            cached = len(row.token_ids)
            row.plain = bool((positions[cached:] == np.arange(cached, len(positions))).all())
        cached = len(row.token_ids)
        return NewTokens(row, ids[cached:], positions[cached:], num_wanted)

    def _select(self, indices: Sequence[int]) -> None:
        """Row i becomes what row indices[i] was; the first to take a row over takes its blocks."""
        kv, rows = self._kv, self._live_rows()
        left: dict[int, KvRow] = dict(enumerate(rows))
        again = [at for i, at in enumerate(indices) if at in indices[:i]]
        copies = iter(self._copies([rows[at] for at in again]))
        self._rows = [left.pop(at) if at in left else next(copies) for at in indices]
        if kv is not None:
            kv.release(left.values())
        self._map_arrays(lambda array: array[list(indices)])

    def _copies(self, rows: Sequence[KvRow]) -> list[KvRow]:
        kv = self._kv
        if kv is None or not any(row.token_ids for row in rows):
            return [KvRow(plain=row.plain) for row in rows]
        return kv.copies(rows)

    def _drop_rows(self) -> None:
        kv = self._kv
        if kv is not None:
            kv.release(self._rows)
        self._rows = []


def _with_layers(layers: list[Any]) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = layers
    return cache


def _keeps_first() -> bool:
    """Whether this version of transformers takes crop(n > 0) for the length to keep."""
    probe = DynamicCache()
    probe.update(torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 2, 1), 0)
    try:
        probe.crop(1)
    except ValueError:
        return False
    return True


_KEEPS_FIRST = _keeps_first()
