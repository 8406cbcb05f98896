"""Many different callers at once, of whom some leave and some are wrong: whoever stays has exactly
what the same request has alone, all of it is counted, and nothing is left behind.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import fastgen
from server_harness import MODEL, serving
from server_load import (
    WRONG,
    Call,
    all_of,
    call_of,
    load,
    metrics,
)


@pytest.fixture(scope="module")
def load_options() -> dict[str, Any]:
    return {"max_batch_size": 8, "max_seq_len": 512}


def test_metrics_count_what_was_asked(model: fastgen.Generator) -> None:
    def call(stream: bool) -> Call:
        return call_of({"prompt": [1, 2, 3], "n": 2, "max_tokens": 6, "stream": stream,
                      "ignore_eos": True})  # fmt: skip

    with serving({MODEL: model}) as server:
        before = metrics(server)
        assert asyncio.run(all_of(server, [call(False), call(True), Call(WRONG[0][1], {}, 400)]))
        after = metrics(server)
        ones = {name: after[name] - before[name] for name in after}
        assert ones["fastgen_tokens_total", "prompt"] == 6
        assert ones["fastgen_tokens_total", "generated"] == 24
        assert ones["fastgen_requests_total", "/v1/completions", "200"] == 2
        assert ones["fastgen_requests_total", "/v1/completions", "400"] == 1
        assert ones["fastgen_request_completions_sum",] == 4
        for name in ("queue_time", "time_to_first_token", "inter_token_latency", "request_time"):
            assert ones[f"fastgen_{name}_seconds_count",] == 2
        assert ones["fastgen_steps_total",] > 0 and ones["fastgen_failed_steps_total",] == 0
        assert after["fastgen_ready",] == 1 and after["fastgen_running_completions",] == 0
        assert after["fastgen_kv_blocks_free",] == after["fastgen_kv_blocks",] > 0


def test_each_of_300_callers_has_what_it_would_have_alone(model: fastgen.Generator) -> None:
    load(model, 300, most_growth=8)


@pytest.mark.slow
def test_each_of_2000_callers_has_what_it_would_have_alone(model: fastgen.Generator) -> None:
    load(model, 2000, most_growth=8)
