"""What a tensor's name says: which part of a model it belongs to, and whether GPT-2 has that part.

A canonical name is GPT-2's own without the `transformer.` prefix, e.g. `h.0.attn.c_attn.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from fastgen.checkpoints.config import GPT2Config
from fastgen.errors import shown_name

HEAD = "lm_head.weight"
EMBEDDING = "wte.weight"
_PREFIX = "transformer."
_FIRST = ("h.0.ln_1.weight", EMBEDDING)  # names that nearly every checkpoint has
_MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # constants of old checkpoints
_LAYER = re.compile(
    r"h\.\d+\.(ln_1|ln_2|attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.(weight|bias)"
)
# Heads on top of GPT-2 that change nothing in what it says next: transformers' own, and the value
# heads of TRL and trlX.
_OTHER_HEADS = re.compile(
    r"(score|classifier|qa_outputs|multiple_choice_head|v_head|ilql_heads)\..+", re.DOTALL
)
_REFUSED = {
    "cross-attention": re.compile(r"\.(crossattention|ln_cross_attn)\."),
    "an unmerged adapter": re.compile(r"\.(lora_\w+|base_layer|adapters?|prompt_encoder)(\.|$)"),
}
# What training puts around a model, and its names with it.
_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "module": "DataParallel or DistributedDataParallel",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}


def expected_shapes(config: GPT2Config, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor of this model; projections are (in, out)."""
    c, i = config.hidden_size, config.inner_size
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, c),
        "wpe.weight": (config.max_positions, c),
    }
    for layer in range(config.num_layers):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h.{layer}.{norm}.weight": (c,), f"h.{layer}.{norm}.bias": (c,)}
        for projection, size_in, size_out in (
            ("attn.c_attn", c, 3 * c),
            ("attn.c_proj", c, c),
            ("mlp.c_fc", c, i),
            ("mlp.c_proj", i, c),
        ):
            shapes[f"h.{layer}.{projection}.weight"] = (size_in, size_out)
            shapes[f"h.{layer}.{projection}.bias"] = (size_out,)
    shapes |= {"ln_f.weight": (c,), "ln_f.bias": (c,)}
    if not tied:
        shapes[HEAD] = (config.vocab_size, c)
    return shapes


def canonical_name(key: str) -> str | None:
    """The canonical name of a stored one; None for the mask buffers of old checkpoints."""
    name = key.removeprefix(_PREFIX)
    return None if _MASK_BUFFER.fullmatch(name) else name


def refused_part(name: str) -> str | None:
    """The part that `name` belongs to, if it changes a model in a way that is known and not run."""
    found = (part for part, pattern in _REFUSED.items() if pattern.search(f".{name}"))
    return next(found, None)


def is_harmless(name: str) -> bool:
    """Whether a GPT-2 runs exactly without the tensor `name`, which it does not use.

    So do those of layers beyond config.json's number, which transformers leaves out as well, and
    of other heads. Whatever else there is may belong to a part that GPT-2 does not have.
    """
    return bool(name == HEAD or _LAYER.fullmatch(name) or _OTHER_HEADS.fullmatch(name))


def find_prefix(names: Collection[str]) -> tuple[str, str] | None:
    """A canonical name that is GPT-2's but for a prefix, and that prefix with its origin, if known;
    None if there is none. A prefix of `_WRAPPERS` may also stand within a name.
    """
    for name in names:
        for word in name.split(".")[:-1]:
            if word in _WRAPPERS:
                return name, f"'{word}.' of {_WRAPPERS[word]}"
    for own in (own for own in _FIRST if own not in names):
        for name in names:
            if name.endswith(f".{own}"):
                before = name.removesuffix(own)
                return name, f"'{shown_name(before.removesuffix(_PREFIX) or before)}'"
    return None
