"""Text in, text out: the border between text and token ids, around one engine."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from tqdm import tqdm

from fastgen.checkpoint import Checkpoint, open_checkpoint
from fastgen.checks import reject_unknown
from fastgen.config import GPT2Config
from fastgen.decoders.choice import build_decoder, plan_decoder
from fastgen.decoders.plan import DecoderPlan, LoadOptions
from fastgen.engine import Engine, deadline_in
from fastgen.model_tensors import checkpoint_of_model
from fastgen.native import native
from fastgen.prompts import Params, Prompt, as_list, is_one, listed, params_for
from fastgen.request import Request, Row
from fastgen.results import Completion, Generation, Score
from fastgen.sampling_params import SamplingParams
from fastgen.scoring import joined_score, windows_of
from fastgen.stream import Stream, raise_error
from fastgen.text_sink import TextSink
from fastgen.tokenizer import Tokenizer

BUNDLED_MODEL = Path(__file__).parent / "bundled"
_ROWS_AHEAD = 2  # rows queued per seat: enough that a freed seat never waits for Python


def load(
    model: Any = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    decoder: str = "auto",
    max_batch_size: int = 32,
    max_seq_len: int | None = None,
    max_memory: int | None = None,
    num_threads: int | None = None,
    batch_invariant: bool | None = None,
    revision: str | None = None,
    **unknown: Any,
) -> Generator:
    """Load a GPT-2 and everything needed to generate with it.

    Args:
        model: a folder with config.json and safetensors files, a hub id, or a transformers
            GPT2LMHeadModel; None is the small model that ships with fastgen.
        device: "auto" (a GPU if there is one), or any device PyTorch knows.
        dtype: "auto", "float32", "bfloat16" or "float16". On a CPU "auto" computes in float32,
            whatever the weights are stored in; elsewhere it keeps the checkpoint's.
        quantize: None.
        decoder: "auto" or "torch".
        max_batch_size: rows that run at the same time; more wait their turn.
        max_seq_len: tokens a row may have, prompt included; None is the model's own context.
        max_memory: MB that weights, KV cache and scratch may take together.
        num_threads: CPU threads of a step; None takes as many as the machine grants.
        batch_invariant: True demands the same bits for a row whatever else is in the batch.
        revision: branch, tag or commit of a hub id.

    Raises:
        CheckpointError: the checkpoint cannot be read, or cannot be run exactly.
        TypeError, ValueError: an option is wrong, or cannot be met; says what can.
    """
    options = LoadOptions(
        device=device,
        dtype=dtype,
        quantize=quantize,
        decoder=decoder,
        max_batch_size=max_batch_size,
        max_seq_len=max_seq_len,
        max_memory=max_memory,
        num_threads=num_threads,
        batch_invariant=batch_invariant,
    )
    reject_unknown(unknown, [*(field.name for field in fields(options)), "revision"])
    if native is None:
        warnings.warn(
            "fastgen's C++ extension was not built when fastgen was installed (is there a C++ "
            "compiler?); everything works without it, sampling is slower",
            stacklevel=2,
        )
    checkpoint = open_model(model, revision)
    tokenizer = find_tokenizer(checkpoint, model)
    plan = plan_decoder(checkpoint, options)
    return Generator(checkpoint, tokenizer, plan)


def open_model(model: Any = None, revision: str | None = None) -> Checkpoint:
    """The checkpoint that `load(model)` would read, opened and checked."""
    if model is None:
        return open_checkpoint(BUNDLED_MODEL)
    if isinstance(model, (str, Path)):
        return open_checkpoint(model, revision)
    return checkpoint_of_model(model)


def find_tokenizer(checkpoint: Checkpoint, model: Any = None) -> Tokenizer | None:
    """From the checkpoint's folder; for a model in memory, from the folder it came from, if any."""
    folder = checkpoint.folder
    if folder is None:
        origin = getattr(model.config, "_name_or_path", "")
        folder = Path(origin) if origin else None
    return Tokenizer.from_folder(folder) if folder is not None and folder.is_dir() else None


class Generator:
    """A loaded model. Thread-safe; close it, or use it in a `with` block, to free its memory."""

    def __init__(
        self, checkpoint: Checkpoint, tokenizer: Tokenizer | None, plan: DecoderPlan
    ) -> None:
        self.config: GPT2Config = checkpoint.config
        self.tokenizer = tokenizer
        self.plan = plan
        self.engine = Engine(
            build_decoder(checkpoint, plan), self.config.vocab_size, self.config.eos_token_ids
        )

    def __call__(self, prompts: Any, params: Params = None, **options: Any) -> Any:
        """The text that follows: a str for one prompt, a list of str for several."""
        texts = [generation.text for generation in self.generate(prompts, params, **options)]
        return texts[0] if is_one(prompts) else texts

    def generate(
        self,
        prompts: Any,
        params: Params = None,
        *,
        timeout: float | None = None,
        progress: bool | None = None,
        **options: Any,
    ) -> list[Generation]:
        """Continue one prompt or many; results come in the prompts' order.

        Args:
            prompts: a string, a list of token ids, or a list of either.
            params: one SamplingParams for all, or one per prompt; or give its options directly:
                `generate(prompts, temperature=0.8, n=4)`.
            timeout: seconds after which rows still running end with "timeout".
            progress: show a progress bar; None does so on a terminal, for several prompts.

        Raises:
            TypeError, ValueError: a prompt or option is wrong; nothing has been generated then.
            EngineError: a step failed.
        """
        many = as_list(prompts)
        each = params_for(len(many), params, options)
        encoded = self._encode(many, each)
        jobs = (
            _Job(ids, chosen, self._sinks(chosen, streams=False))
            for ids, chosen in zip(encoded, each, strict=True)
        )
        requests = self._run(jobs, len(many), timeout, progress)
        return [self._generation(request) for request in requests]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        timeout: float | None = None,
        **options: Any,
    ) -> Stream:
        """Continue one prompt, piece by piece. Closing the stream ends the generation.

        Pieces of several completions (n > 1) come mixed; `piece.index` says whose each is.
        """
        if not is_one(prompt) and listed(prompt):
            raise TypeError("stream takes one prompt; use generate for several")
        [chosen] = params_for(1, params, options)
        [token_ids] = self._encode([prompt], [chosen])
        sinks = self._sinks(chosen, streams=True)
        deadline = deadline_in(timeout)
        request = self.engine.add_request(token_ids, chosen, sinks=sinks, deadline=deadline)
        return Stream(self.engine, request)

    def score(self, texts: Any, *, progress: bool | None = None) -> list[Score]:
        """Log-probability of each token of each text given those before it.

        A text longer than the context is scored in windows that overlap by half a context, so every
        token but the first window's has at least half a context before it.
        """
        many = as_list(texts)
        from_text = iter(self._encode_texts([t for t in many if isinstance(t, str)], bounded=False))
        ids = [next(from_text) if isinstance(text, str) else listed(text) for text in many]
        for index, token_ids in enumerate(ids):
            with _naming_prompt("text", index, len(ids)):
                self.engine.check_ids("text", token_ids)
        params = SamplingParams(max_new_tokens=0, prompt_logprobs=0)
        windows = [windows_of(token_ids, self.plan.limits.max_seq_len) for token_ids in ids]
        jobs = (_Job(tokens, params, None) for each in windows for _, tokens in each)
        requests = iter(self._run(jobs, sum(map(len, windows)), None, progress))
        return [
            joined_score(token_ids, [(start, next(requests)) for start, _ in each])
            for token_ids, each in zip(ids, windows, strict=True)
        ]

    def close(self) -> None:
        """End all generations and free memory. Safe to call twice."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _run(
        self,
        jobs: Iterable[_Job],
        count: int,
        timeout: float | None,
        progress: bool | None,
    ) -> list[Request]:
        """Feed the jobs in order, some rows ahead of the seats, until all are done."""
        deadline = deadline_in(timeout)
        remaining = iter(jobs)
        requests: list[Request] = []
        running: list[Request] = []
        with _progress_bar(count, progress) as bar:
            try:
                while True:
                    self._feed(remaining, requests, running, deadline)
                    if not running:
                        return requests
                    self._run_any(running)
                    bar.update(sum(request.done for request in running))
                    running = [request for request in running if not request.done]
            except BaseException:
                for request in running:
                    self.engine.cancel(request)
                raise

    def _run_any(self, requests: Sequence[Request]) -> None:
        """Run until one of the requests is done."""
        self.engine.run(lambda: any(request.done for request in requests))
        for request in requests:
            raise_error(request)

    def _feed(
        self,
        jobs: Iterator[_Job],
        requests: list[Request],
        running: list[Request],
        deadline: float | None,
    ) -> None:
        """Add jobs to the engine, and to both lists, while few of our rows are left to run."""
        room = _ROWS_AHEAD * self.plan.limits.num_seats - sum(r.params.n for r in running)
        while room > 0 and (job := next(jobs, None)) is not None:
            running.append(
                self.engine.add_request(
                    job.token_ids, job.params, sinks=job.sinks, deadline=deadline
                )
            )
            requests.append(running[-1])
            room -= job.params.n

    def _encode(self, prompts: Sequence[Any], params: Sequence[SamplingParams]) -> list[list[int]]:
        """Token ids of prompts, checked, so that a wrong one is found before any is run."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        from_text = iter(self._encode_texts(texts))
        encoded: list[list[int]] = []
        for index, (prompt, options) in enumerate(zip(prompts, params, strict=True)):
            ids = next(from_text) if isinstance(prompt, str) else listed(prompt)
            with _naming_prompt("prompt", index, len(prompts)):
                encoded.append(list(self.engine.check_request(ids or self._start(), options)))
        return encoded

    def _encode_texts(self, texts: list[str], *, bounded: bool = True) -> list[list[int]]:
        if not texts:
            return []
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer; give token ids instead of text")
        longest = self.plan.limits.max_seq_len if bounded else None
        return self.tokenizer.encode(texts, longest)

    def _start(self) -> list[int]:
        """What an empty prompt starts from: bos, else eos."""
        candidates = (self.config.bos_token_id, *self.config.eos_token_ids)
        for token_id in candidates:
            if token_id is not None:
                return [token_id]
        raise ValueError("the prompt is empty, and the model has no bos or eos token to start from")

    def _sinks(self, params: SamplingParams, *, streams: bool) -> list[TextSink] | None:
        """One a completion, if text is needed while it is generated."""
        if self.tokenizer is None:
            if params.stop:
                raise ValueError("stop strings need text, but this model has no tokenizer")
            return None
        if not (streams or params.stop):
            return None
        return [
            self.tokenizer.sink(params.stop, include_stop=params.include_stop)
            for _ in range(params.n)
        ]

    def _generation(self, request: Request) -> Generation:
        completions = tuple(self._completion(row) for row in request.rows)
        prompt_logprobs = request.prompt_logprobs
        return Generation(
            prompt_token_ids=request.prompt_token_ids,
            completions=completions,
            prompt_logprobs=None if prompt_logprobs is None else tuple(prompt_logprobs),
            timings=request.timings,
        )

    def _completion(self, row: Row) -> Completion:
        assert row.finish_reason is not None and row.params.seed is not None
        return Completion(
            index=row.index,
            text=self._text(row),
            token_ids=tuple(row.new_token_ids),
            finish_reason=row.finish_reason,
            stop_reason=row.stop_reason,
            seed=row.params.seed,
            logprobs=None if row.logprobs is None else tuple(row.logprobs),
        )

    def _text(self, row: Row) -> str:
        """As a stream would have shown it."""
        if row.sink is not None:
            return row.sink.text
        if self.tokenizer is None:
            return ""
        sink = self.tokenizer.sink()
        token_ids = row.new_token_ids
        if row.ended_by_id and not row.params.include_stop:
            token_ids = token_ids[:-1]
        for token_id in token_ids:
            sink.push(token_id)
        sink.finish()
        return sink.text


class _Job(NamedTuple):
    token_ids: Sequence[int]
    params: SamplingParams
    sinks: list[TextSink] | None


@contextmanager
def _naming_prompt(what: str, index: int, count: int) -> Iterator[None]:
    """Say in a mistake's message which of several it is in."""
    try:
        yield
    except (TypeError, ValueError) as error:
        where = f"{what} {index}: " if count > 1 else ""
        raise type(error)(f"{where}{error}") from None


def _progress_bar(count: int, progress: bool | None) -> tqdm[Any]:
    """On a terminal, for more than one prompt, if it takes over a second."""
    show = progress if progress is not None else count > 1 and sys.stderr.isatty()
    delay = 0 if progress else 1
    return tqdm(total=count, disable=not show, unit="prompt", delay=delay, leave=bool(progress))
