"""The one table of tolerances; loosening one needs its reason beside it."""

from __future__ import annotations

from typing import Any

# How far results may be from the reference. "ratio": times transformers' own error at the same
# dtype; "slack": times the largest |logit|, for where that error happens to be near zero.
TOLERANCES: dict[str, Any] = {
    "float32": {"ratio": 2.0, "slack": 1e-6},
    "bfloat16": {"ratio": 2.0, "slack": 1e-3},
    "float16": {"ratio": 2.0, "slack": 1e-4},
    # where PyTorch's products, which change bits with the batch, may decide differently
    "torch_gap": 1e-3,
    # int8 weights and products against float32: mean KL divergence in nats a token, and change of
    # perplexity as a share
    "int8_kl": 1e-3,
    "int8_perplexity": 0.005,
    # keys and values of 8 bits against those of float32, all else the same (1.5e-5 seen): so little
    # that with int8 weights, too, all stays within their bound
    "kv_int8_kl": 5e-5,
    # one kernel against its twin in float64, as a share of the largest value: what half a dozen
    # roundings of operands and results in that dtype add up to
    "kernels": {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2},
    # the drop-in against transformers in float32: either is off by about 1e-5 of the largest logit
    "drop_in": 3e-5,
    # float64 sums in another order: log-probabilities against transformers' float32
    "logprob": 2e-5,
    # transformers sums a filter's masses in float32: this near to its edge it may decide otherwise
    "filter_edge": 1e-5,
}
