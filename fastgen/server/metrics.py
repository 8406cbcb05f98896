"""Metrics for Prometheus."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fastgen.engine.engine import Engine
from fastgen.engine.requests import Request

_SECONDS = (.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60)  # fmt: skip
_TIMES = {
    "queue_time": "From a request's arrival to its admission",
    "time_to_first_token": "From a request's arrival to its first token",
    "inter_token_latency": "Between a request's tokens, its mean",
    "request_time": "From a request's arrival to its end",
}
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counts of one server, in a registry of its own.

    Args:
        engines: by the name of their model; their state is read when it is asked for.
        ready: whether the server is.
    """

    def __init__(self, engines: Mapping[str, Engine], ready: Callable[[], bool]) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "fastgen_requests", "Requests that were answered, by status",
            ["path", "status"], registry=registry,
        )  # fmt: skip
        self.refusals = Counter(
            "fastgen_refusals", "Requests that were refused, by reason", ["reason"],
            registry=registry,
        )  # fmt: skip
        self._times = {
            name: Histogram(
                f"fastgen_{name}_seconds", text, ["model"], buckets=_SECONDS, registry=registry
            )
            for name, text in _TIMES.items()
        }
        self._tokens = Counter(
            "fastgen_tokens", "Tokens of prompts, and generated ones", ["model", "kind"],
            registry=registry,
        )  # fmt: skip
        self._completions = Counter(
            "fastgen_completions", "Completions that have ended, by reason",
            ["model", "finish_reason"], registry=registry,
        )  # fmt: skip
        self._rows = Histogram(
            "fastgen_request_completions", "Completions that a request asked for", ["model"],
            buckets=_ROWS, registry=registry,
        )  # fmt: skip
        registry.register(_EngineStates(engines, ready))

    def ended(self, model: str, request: Request) -> None:
        """A prompt's request has ended, for whatever reason."""
        timings, new_tokens = request.timings, [len(row.new_token_ids) for row in request.rows]
        self._tokens.labels(model, "prompt").inc(len(request.prompt_token_ids))
        self._tokens.labels(model, "generated").inc(sum(new_tokens))
        for reason, count in Counts(row.finish_reason or "error" for row in request.rows).items():
            self._completions.labels(model, reason).inc(count)
        self._rows.labels(model).observe(len(new_tokens))
        if timings.admitted is not None:
            self._times["queue_time"].labels(model).observe(timings.admitted)
        self._times["request_time"].labels(model).observe(timings.finished)
        if timings.first_token is not None:
            self._times["time_to_first_token"].labels(model).observe(timings.first_token)
            gaps = max(new_tokens, default=0) - 1
            if gaps > 0:
                mean = (timings.finished - timings.first_token) / gaps
                self._times["inter_token_latency"].labels(model).observe(mean)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineStates:
    """Gauges and counters of the engines, read when they are collected."""

    def __init__(self, engines: Mapping[str, Engine], ready: Callable[[], bool]) -> None:
        self._engines, self._ready = engines, ready

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("fastgen_ready", "Whether requests are taken and steps are made",
                                float(self._ready()))  # fmt: skip
        gauges: dict[str, tuple[str, Callable[[Engine], float]]] = {
            "running_completions": ("Completions in the current batch", _running),
            "waiting_completions": ("Completions that wait for a seat", lambda e: e.num_waiting),
            "kv_blocks": ("Blocks of the KV cache", lambda e: e.decoder.limits.num_blocks),
            "kv_blocks_free": ("Blocks that no completion holds", lambda e: e.num_free_blocks),
        }
        counters: dict[str, tuple[str, Callable[[Engine], float]]] = {
            "steps": ("Steps", lambda e: e.stats.steps),
            "failed_steps": ("Steps that failed", lambda e: e.stats.failed_steps),
            "prefill_tokens": ("Prompt tokens computed", lambda e: e.stats.prefill_tokens),
            "prefix_hit_tokens": ("Prompt tokens found in the cache",
                                  lambda e: e.stats.reused_tokens),
            "decode_tokens": ("Tokens fed back; by steps, the mean batch",
                              lambda e: e.stats.decode_tokens),
            "speculated_steps": ("Steps with guessed tokens",
                                 lambda e: e.stats.speculated_steps),
            "drafted_tokens": ("Guessed tokens", lambda e: e.stats.drafted_tokens),
            "accepted_tokens": ("Guessed tokens that were right",
                                lambda e: e.stats.accepted_tokens),
        }  # fmt: skip
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"fastgen_{name}", text, labels=["model"])
            for model, engine in self._engines.items():
                gauge.add_metric([model], value(engine))
            yield gauge
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(f"fastgen_{name}", text, labels=["model"])
            for model, engine in self._engines.items():
                counter.add_metric([model], value(engine))
            yield counter


def _running(engine: Engine) -> float:
    return engine.num_unfinished - engine.num_waiting
