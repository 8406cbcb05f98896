"""load() and Generator: text in, text out, around one engine."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastgen.checkpoints.checkpoint import Checkpoint, open_checkpoint
from fastgen.checkpoints.config import GPT2Config
from fastgen.checkpoints.in_memory import checkpoint_of_model
from fastgen.checks import reject_unknown, wrong_type
from fastgen.decoders.plan import DecoderPlan, LoadOptions
from fastgen.decoders.select import build_decoder
from fastgen.engine.engine import Engine
from fastgen.engine.inbox import deadline_in
from fastgen.engine.requests import Request
from fastgen.errors import OptionTypeError, row_failed
from fastgen.frontends.closing import Closing
from fastgen.frontends.jobs import Job, JobMaker
from fastgen.frontends.prompts import Params, Prompt, as_list, is_one
from fastgen.frontends.stream import Stream, raise_error
from fastgen.native import native
from fastgen.results import Generation, Score
from fastgen.sampling.params import SamplingParams
from fastgen.speculation.choose import DraftFunction, Speculation, check_choice, wrong_draft
from fastgen.text.tokenizer import Tokenizer

BUNDLED_MODEL = Path(__file__).parents[1] / "bundled"  # its folder
_ROWS_AHEAD = 2  # rows queued per seat: enough that a freed seat never waits for Python


def load(
    model: Any = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    kv_dtype: str = "auto",
    decoder: str = "auto",
    max_batch_size: int = 32,
    max_seq_len: int | None = None,
    max_memory: int | None = None,
    num_threads: int | None = None,
    batch_invariant: bool | None = None,
    speculate: str | DraftFunction = "auto",
    draft_model: Any = None,
    cache: bool | str | Path = True,
    share_weights: bool = False,
    revision: str | None = None,
    **unknown: Any,
) -> Generator:
    """Load a GPT-2 and everything needed to generate with it.

    Args:
        model: a folder with config.json and safetensors files, one that `pack` has made, a hub id,
            or a transformers GPT2LMHeadModel; None is the small model that ships with fastgen.
        device: "auto" (a GPU if there is one), or any device PyTorch knows.
        dtype: "auto", "float32", "bfloat16" or "float16". On a CPU "auto" keeps 16-bit weights and
            computes in float32, "bfloat16" computes in bfloat16 where the processor can; elsewhere
            "auto" is the checkpoint's.
        quantize: "int8" keeps weights in 8 bits; on a CPU it also multiplies in 8 bits.
        kv_dtype: "int8" keeps keys and values in 8 bits (CPU and CUDA decoders): more rows and
            longer contexts in the same memory, slightly other logits; "auto" keeps them as
            activations are.
        decoder: "auto", "cpu" (C++), "cuda" (Triton, for NVIDIA GPUs) or "torch".
        max_batch_size: rows that run at the same time; more wait in the queue.
        max_seq_len: tokens a row may have, prompt included; None is the model's own context.
        max_memory: MB that weights, KV cache and scratch may take together.
        num_threads: CPU threads of a step; None takes as many as the machine grants.
        batch_invariant: True demands the same bits for a row whatever else is in the batch. The
            CPU decoder always promises that, the CUDA decoder if asked, and is slower then.
        speculate: decode several tokens a step where they can be guessed; see docs/speculation.md.
            "suffix" guesses from what the text and earlier outputs say after the same words, "auto"
            does so where no token can depend on it, "off" never. A function of the ids so far (a
            tuple) and of how many are wanted returns the ids that may follow; it is called where
            that pays for the time that it takes.
        draft_model: a smaller model with the same vocabulary that guesses, too; as `model`.
        cache: where weights that were packed for the CPU decoder are kept for the next process; see
            docs/library.md. True: in $FASTGEN_CACHE, else in fastgen/ in $XDG_CACHE_HOME or
            ~/.cache; False: nowhere; or a folder. No token depends on it.
        share_weights: map that file, so that all processes of the machine share one copy of the
            weights; a decode step may take a little longer (CPU decoder only).
        revision: branch, tag or commit of a hub id.

    Raises:
        CheckpointError: the checkpoint cannot be read, or cannot be run exactly.
        OptionTypeError, OptionError: an option is wrong, or cannot be met; says what can.
    """
    options = LoadOptions(
        device=device,
        dtype=dtype,
        quantize=quantize,
        kv_dtype=kv_dtype,
        decoder=decoder,
        max_batch_size=max_batch_size,
        max_seq_len=max_seq_len,
        max_memory=max_memory,
        num_threads=num_threads,
        batch_invariant=batch_invariant,
        cache=cache,
        share_weights=share_weights,
    )
    others = ("speculate", "draft_model", "revision")
    reject_unknown(unknown, [*(field.name for field in fields(options)), *others])
    check_choice(speculate, has_draft_model=draft_model is not None)
    if native is None:
        warnings.warn(
            "fastgen's C++ extension was not built when fastgen was installed (is there a C++ "
            "compiler?); without it models run on PyTorch, which is slower",
            stacklevel=2,
        )
    checkpoint = open_model(model, revision)
    tokenizer = find_tokenizer(checkpoint, model)
    draft = None if draft_model is None else open_draft(draft_model, checkpoint.config.vocab_size)
    speculation = Speculation(speculate, draft, options)
    return Generator(checkpoint, tokenizer, speculation.plan(checkpoint), speculation)


def open_model(model: Any = None, revision: str | None = None) -> Checkpoint:
    """The checkpoint that `load(model)` would read, opened and checked."""
    if model is None:
        return open_checkpoint(BUNDLED_MODEL)
    if isinstance(model, (str, Path)):
        return open_checkpoint(model, revision)
    return checkpoint_of_model(model)


def open_draft(model: Any, vocab_size: int) -> Checkpoint:
    """The checkpoint of a draft model for a model with so many tokens.

    Raises:
        OptionTypeError, OptionError: it is no model, or its vocabulary is another.
        CheckpointError: it cannot be read, or cannot be run exactly.
    """
    try:
        draft = open_model(model)
    except OptionTypeError as error:
        raise wrong_type("draft_model", error.problem) from None
    if draft.config.vocab_size != vocab_size:
        raise wrong_draft(
            f"{draft.name} has a vocabulary of {draft.config.vocab_size} tokens, the model one of "
            f"{vocab_size}; they must be the same"
        )
    return draft


def find_tokenizer(checkpoint: Checkpoint, model: Any = None) -> Tokenizer | None:
    """From the checkpoint's folder; for a model in memory, from the folder it came from, if any."""
    folder = checkpoint.folder
    if folder is None:
        origin = getattr(model.config, "_name_or_path", "")
        folder = Path(origin) if origin else None
    return Tokenizer.from_folder(folder) if folder is not None and folder.is_dir() else None


class Generator(Closing):
    """A loaded model. Thread-safe; close it, or use it in a `with` block, to free its memory."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer | None,
        plan: DecoderPlan,
        speculation: Speculation | None = None,
    ) -> None:
        self.config: GPT2Config = checkpoint.config
        self.tokenizer = tokenizer
        self.plan = plan
        self.engine = Engine(
            build_decoder(checkpoint, plan), self.config.vocab_size, self.config.eos_token_ids
        )
        try:  # the model itself takes its memory first
            self.engine.drafting.use(() if speculation is None else speculation.drafters(plan))
        except BaseException:
            self.engine.close()
            raise
        longest = plan.limits.max_seq_len
        self.job_maker = JobMaker(self.config, tokenizer, self.engine, longest)

    def __call__(self, prompts: Any, params: Params = None, **options: Any) -> Any:
        """The text that follows: a str for one prompt, a list of str for several.

        Raises:
            RowFailedError: besides what `generate` raises, where a completion is an error.
        """
        generations = self.generate(prompts, params, **options)
        for first in (generation.completions[0] for generation in generations):
            if first.error is not None:
                raise row_failed(f"generation failed: {first.error}", first.error_code)
        texts = [generation.text for generation in generations]
        return texts[0] if is_one(prompts) else texts

    def generate(
        self,
        prompts: Any,
        params: Params = None,
        *,
        timeout: float | None = None,
        priority: int = 0,
        progress: bool | None = None,
        **options: Any,
    ) -> list[Generation]:
        """Continue one prompt or many; results come in the prompts' order.

        Args:
            prompts: a string, a list of token ids, or a list of either.
            params: one SamplingParams for all, or one per prompt; or give its options directly:
                `generate(prompts, temperature=0.8, n=4)`.
            timeout: seconds after which rows still running end with "timeout".
            priority: of these prompts among all that wait, -1000 to 1000; lower is sooner.
            progress: show a progress bar; None does so on a terminal, for several prompts.

        What fails for one completion alone, such as its logits_processor, makes that an "error".

        Raises:
            TypeError, ValueError: a prompt or option is wrong; nothing has been generated then.
            StepFailedError: a step failed.
            EngineClosedError: the model was closed before all prompts had begun.
        """
        count = len(as_list(prompts))
        jobs = self.job_maker.jobs(prompts, params, options)
        requests = self._run(jobs, count, timeout, priority, progress)
        return [self.job_maker.generation(request) for request in requests]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        timeout: float | None = None,
        priority: int = 0,
        **options: Any,
    ) -> Stream:
        """Continue one prompt, piece by piece. Closing the stream ends the generation.

        Pieces of several completions (n > 1) come mixed; `piece.index` says whose each is.
        """
        job = self.job_maker.streamed(prompt, params, options)
        request = self._add(job, deadline_in(timeout), priority)
        return Stream(self.engine, request)

    def score(self, texts: Any, *, progress: bool | None = None) -> list[Score]:
        """Log-probability of each token of each text given those before it.

        A text longer than the context is scored in windows that overlap by half a context, so every
        token but the first window's has at least half a context before it.

        Raises:
            TypeError, ValueError: a text is wrong; nothing has been scored then.
            EngineError: a text could not be scored to its end; the subclass says why.
        """
        scoring = self.job_maker.scoring(texts)
        jobs = scoring.jobs
        return scoring.scores(self._run(jobs, len(jobs), None, 0, progress))

    def warmup(self) -> None:
        """Do now what the first requests would have to: on a GPU, compile kernels and make graphs;
        of a draft model, too; with speculation, measure what steps of several tokens cost.

        Raises:
            EngineClosedError: the model is closed.
        """
        with self.engine.between_steps() as pause:
            self.engine.decoder.warmup()
            self.engine.drafting.warmup()
            if self.engine.drafting.is_on:
                pause.measure_steps(self.engine.drafting.costs)

    def close(self) -> None:
        """End all generations and free memory. Safe to call twice."""
        self.engine.close()

    def _run(
        self,
        jobs: Iterable[Job],
        count: int,
        timeout: float | None,
        priority: int,
        progress: bool | None,
    ) -> list[Request]:
        """Feed the jobs in order, some rows ahead of the seats, until all are done."""
        deadline = deadline_in(timeout)
        remaining = iter(jobs)
        requests: list[Request] = []
        running: list[Request] = []
        with _progress_bar(count, progress) as move_on:
            try:
                while True:
                    for request in self._feed(remaining, running, deadline, priority):
                        running.append(request)
                        requests.append(request)
                    if not running:
                        return requests
                    self._run_any(running)
                    move_on(sum(request.done for request in running))
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
        jobs: Iterator[Job],
        running: Sequence[Request],
        deadline: float | None,
        priority: int,
    ) -> Iterator[Request]:
        """Add jobs to the engine while few of our rows are left to run."""
        room = _ROWS_AHEAD * self.plan.limits.num_seats - sum(r.params.num_rows for r in running)
        while room > 0 and (job := next(jobs, None)) is not None:
            room -= job.params.num_rows
            yield self._add(job, deadline, priority)

    def _add(self, job: Job, deadline: float | None, priority: int) -> Request:
        return self.engine.add_request(
            job.token_ids, job.params, sinks=job.sinks, deadline=deadline, priority=priority
        )


@contextmanager
def _progress_bar(count: int, progress: bool | None) -> Iterator[Callable[[int], Any]]:
    """Shown on a terminal, for more than one prompt, if it takes over a second; moved on by what is
    called with the number of prompts that are done.

    Where nothing is shown there is no bar: tqdm takes a lock of its class even then, and a child
    that is forked while another thread holds it waits for it forever.
    """
    show = progress if progress is not None else count > 1 and sys.stderr.isatty()
    if not show:
        yield lambda done: None
        return
    from tqdm import tqdm

    delay = 0 if progress else 1
    with tqdm(total=count, unit="prompt", delay=delay, leave=bool(progress)) as bar:
        yield bar.update
