"""Widen a GPT-2 without changing what it computes: the bundled model in GPT-2 124M's shape.

    python tools/widen_model.py fastgen/bundled OUT --check
    python tools/widen_model.py SOURCE OUT [--times 3] [--layers 12] [--vocab 50257] [--check]

For benchmarks that need text that means something from a model of that size. It is `--times` as
wide, with as many more heads of the same size; each hidden state is the source's, repeated:

- embeddings, norms and biases are tiled. A layer norm sees the same mean and variance;
- a projection's output side is tiled (queries, keys and values each by themselves, so that each
  head is one of the source's), its input side is tiled and divided by `--times`;
- the final norm is divided by `--times`, since the head sums over all copies;
- layers beyond the source's repeat its layers, with output projections of zeros: they add nothing,
  and cost what layers cost.

Ids beyond the source's vocabulary are padding. Their logit is PAD_LOGIT whatever the text: the
final bias is higher in the first copy and as much lower in the second, which the tiled embeddings
do not see, and a padding id's embedding is the difference of the two and nothing else. No padding
id is drawn where the best logit is far above PAD_LOGIT, as the bundled model's is; `--check`
shows it.

Logits are the source's up to rounding: a third of a float16 number is no float16, so float32 is
written. Needs fastgen, nothing else.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

import fastgen
from fastgen.checkpoints.checkpoint import Checkpoint, open_checkpoint

PAD_LOGIT = -80.0
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt"),
)
CHECKED_ROWS, CHECKED_TOKENS = 8, 64
CLOSE = 1e-3  # nats

Tensor = NDArray[np.float32]


def widen(source: Path, target: Path, times: int = 3, layers: int = 12, vocab: int = 0) -> Path:
    """Write the widened checkpoint, in float32, with the source's tokenizer files; the folder.

    Args:
        vocab: its vocabulary; 0 keeps the source's.

    Raises:
        CheckpointError: the source cannot be read.
        ValueError: the shape cannot be made from the source's.
    """
    checkpoint = open_checkpoint(source)
    config = checkpoint.config
    vocab = vocab or config.vocab_size
    if times < 1 or layers < config.num_layers or vocab < config.vocab_size:
        raise ValueError(
            f"the source has {config.num_layers} layers and {config.vocab_size} ids: "
            f"{layers} layers and {vocab} ids, {times} times as wide, cannot be made of it"
        )
    if vocab > config.vocab_size and times < 2:
        raise ValueError("padding ids need a model at least twice as wide")
    target.mkdir(parents=True, exist_ok=True)
    tensors = dict(_tensors(checkpoint, times, layers))
    if vocab > config.vocab_size:
        _add_padding(tensors, config.hidden_size, times, vocab)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(_config(checkpoint, times, layers, vocab), indent=2)
    (target / "config.json").write_text(text + "\n")
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copy(source / name, target)
    return target


def _tensors(checkpoint: Checkpoint, times: int, layers: int) -> Iterator[tuple[str, Tensor]]:
    own = checkpoint.config.num_layers
    for name, _ in checkpoint.tensors():
        yield name, _widened(name, checkpoint.read(name).astype(np.float32), times)
    for layer in range(own, layers):
        like = f"h.{layer % own}."
        for name in (each for each, _ in checkpoint.tensors() if each.startswith(like)):
            wide = _widened(name, checkpoint.read(name).astype(np.float32), times)
            adds_to_residual = ".c_proj." in name
            kept = np.zeros_like(wide) if adds_to_residual else wide
            yield name.replace(like, f"h.{layer}.", 1), kept


def _widened(name: str, tensor: Tensor, times: int) -> Tensor:
    """One tensor; projections are (in, out), embeddings (V, C), all else vectors."""
    parts = np.split(tensor, 3 if ".c_attn." in name else 1, axis=-1)  # queries, keys, values
    wide = np.concatenate([np.tile(part, times) for part in parts], axis=-1)
    if name.startswith("h.") and wide.ndim == 2:
        wide = np.tile(wide, (times, 1)) / np.float32(times)  # (times x in, times x out)
    if name.startswith("ln_f."):
        wide = wide / np.float32(times)
    return np.ascontiguousarray(wide)


def _add_padding(tensors: dict[str, Tensor], width: int, times: int, vocab: int) -> None:
    """`width`: of one copy. A padding id's logit is -2 x width x lift x `size`."""
    first, second = slice(0, width), slice(width, 2 * width)
    lift = np.float32(np.abs(tensors["ln_f.weight"]).mean())  # as large as what stands there
    tensors["ln_f.bias"][first] += lift
    tensors["ln_f.bias"][second] -= lift
    size = -PAD_LOGIT / (2 * width * lift)
    padding = np.zeros(times * width, np.float32)
    padding[first], padding[second] = -size, size
    for name in ("wte.weight", "lm_head.weight"):
        if name in tensors:
            own = tensors[name]
            rows = np.broadcast_to(padding, (vocab - len(own), times * width))
            tensors[name] = np.concatenate([own, rows])


def _config(checkpoint: Checkpoint, times: int, layers: int, vocab: int) -> dict[str, Any]:
    config = checkpoint.config
    ends = config.eos_token_ids
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": vocab,
        "n_positions": config.max_positions,
        "n_embd": times * config.hidden_size,
        "n_layer": layers,
        "n_head": times * config.num_heads,
        "n_inner": times * config.inner_size,
        "activation_function": config.activation,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "scale_attn_weights": config.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        "reorder_and_upcast_attn": config.reorder_and_upcast_attn,
        "tie_word_embeddings": checkpoint.tied,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends) or None,
        "pad_token_id": config.pad_token_id,
        "dtype": "float32",
    }


def check(source: Path, target: Path) -> str:
    """What was compared, in a line: scores of random ids, and ids that are drawn after them.

    Raises:
        ValueError: the two differ by more than rounding, or a padding id was drawn.
    """
    rng = np.random.default_rng(0)
    config = open_checkpoint(source).config
    vocab, count = config.vocab_size, min(CHECKED_TOKENS, config.max_positions // 2)
    prompts: list[list[int]] = rng.integers(0, vocab, (CHECKED_ROWS, count)).tolist()
    (old_scores, old_ids), (new_scores, new_ids) = (
        _outputs(folder, prompts) for folder in (source, target)
    )
    farthest = float(np.abs(old_scores - new_scores).max())
    same = float((old_ids == new_ids).mean())
    if farthest > CLOSE or new_ids.max() >= vocab:
        raise ValueError(
            f"{target} is not {source}: log-probabilities differ by {farthest:.2g} nats, and the "
            f"highest id drawn is {new_ids.max()} of {vocab}"
        )
    return (
        f"{old_scores.size} log-probabilities differ by at most {farthest:.2g} nats; "
        f"{same:.1%} of {old_ids.size} drawn ids are the same, and none is padding"
    )


def _outputs(folder: Path, prompts: list[list[int]]) -> tuple[Tensor, NDArray[np.int64]]:
    """Log-probabilities of each prompt's ids (rows, ids), and ids sampled after it (rows, ids)."""
    with fastgen.load(folder, dtype="float32") as model:
        scores = [score.logprobs[1:] for score in model.score(prompts)]
        length = len(prompts[0])
        options: dict[str, Any] = {"max_new_tokens": length, "ignore_eos": True, "seed": 0}
        drawn = [row.completions[0].token_ids for row in model.generate(prompts, **options)]
    return np.array(scores, np.float32), np.array(drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path, help="a folder with a GPT-2, such as fastgen/bundled")
    parser.add_argument("target", type=Path, help="the folder to write")
    parser.add_argument("--times", type=int, default=3, help="as wide (default: 3)")
    parser.add_argument("--layers", type=int, default=12, help="of the result (default: 12)")
    parser.add_argument("--vocab", type=int, default=50_257,
        help="ids of the result; 0: the source's (default: 50257)")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="compare the result with the source")
    options = parser.parse_args()
    widen(options.source, options.target, options.times, options.layers, options.vocab)
    if options.check:
        print(check(options.source, options.target))


if __name__ == "__main__":
    main()
