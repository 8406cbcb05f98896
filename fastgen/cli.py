"""The command line: fastgen generate, score, serve, bench, pack, info."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fastgen import __version__
from fastgen.bench import command as bench_command
from fastgen.cache_info import cache_lines, cache_record, cleared
from fastgen.decoders.installed import backends
from fastgen.decoders.plan import DecoderPlan, LoadOptions
from fastgen.errors import CheckpointError, EngineError
from fastgen.frontends.generator import Generator, load, open_draft, open_model
from fastgen.frontends.pack import pack
from fastgen.results import Generation, Score
from fastgen.sampling.options import OPTIONS, Flag, Option
from fastgen.sampling.params import SamplingParams
from fastgen.server import command as server_command
from fastgen.speculation.choose import Speculation, check_choice

_REPORTED = (CheckpointError, EngineError, ModuleNotFoundError, TypeError, ValueError)
_INTERRUPTED = 130  # the shell's exit code for Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the process's exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (*_REPORTED, OSError) as error:
        print(f"fastgen: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastgen", description="Fast, exact GPT-2 inference.")
    parser.add_argument("--version", action="version", version=f"fastgen {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    model = _model_options()

    generate = commands.add_parser(
        "generate", parents=[model, _sampling_options()], help="continue a prompt"
    )
    generate.add_argument("prompt", help="the prompt, or - to read it from standard input")
    generate.add_argument("--json", action="store_true", help="print the results as JSON")
    generate.set_defaults(run=_generate)

    score = commands.add_parser("score", parents=[model], help="log-probabilities of a text")
    score.add_argument("text", help="the text, or - to read it from standard input")
    score.add_argument("--json", action="store_true", help="print the result as JSON")
    score.set_defaults(run=_score)

    serve = commands.add_parser(
        "serve",
        parents=[_loading_options()],
        help="serve models over HTTP, in OpenAI's completions protocol",
    )
    server_command.add_options(serve)
    serve.set_defaults(run=_serve)

    bench = commands.add_parser("bench", help="speed here, against the machine's limits and peers")
    _add_kind(bench.add_argument)
    bench_command.add_options(bench)
    bench.set_defaults(run=bench_command.run)

    packing = commands.add_parser("pack", help="a folder of packed weights, which loads at once")
    packing.add_argument(
        "--model", metavar="PATH", help="folder or hub id (default: the bundled model)"
    )
    packing.add_argument("--out", required=True, metavar="FOLDER", help="a new folder")
    packing.add_argument("--revision", help="branch, tag or commit of a hub id")
    packing.add_argument(
        "--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)"
    )
    packing.add_argument("--quantize", metavar="KIND", help="int8: weights in 8 bits")
    packing.add_argument(
        "--num-threads", type=int, metavar="N", help="CPU threads (default: all granted)"
    )
    packing.set_defaults(run=_pack)

    info = commands.add_parser(
        "info", parents=[model], help="what would be loaded: shapes, decoder, memory"
    )
    info.add_argument("--json", action="store_true", help="print it as JSON")
    info.add_argument(
        "--clear-cache", action="store_true", help="remove all packed weights from the cache before"
    )
    info.set_defaults(run=_info)
    return parser


def _model_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False, parents=[_loading_options()])
    options.add_argument(
        "--model", metavar="PATH", help="folder or hub id (default: the bundled model)"
    )
    return options


def _add_kind(add: Callable[..., Any]) -> None:
    """Which model it is, and in what it is run."""
    add("--revision", help="branch, tag or commit of a hub id")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)")
    add("--quantize", metavar="KIND", help="int8: weights in 8 bits")
    add("--kv-dtype", default="auto", metavar="KIND", help="int8: keys and values in 8 bits")
    add("--decoder", default="auto", help="auto, cpu, cuda or torch (default: auto)")


def _loading_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    add = options.add_argument_group("model").add_argument
    _add_kind(add)
    add("--max-batch-size", type=int, default=32, metavar="N", help="rows at a time (default: 32)")
    add("--max-seq-len", type=int, metavar="N", help="tokens a row may have (default: the model's)")
    add("--max-memory", type=int, metavar="MB", help="for weights, KV cache and scratch together")
    add("--num-threads", type=int, metavar="N", help="CPU threads (default: all granted)")
    add("--speculate", default="auto", metavar="KIND",
        help="auto, suffix or off: guess tokens and decode several a step; none of them changes "
        "(default: auto)")  # fmt: skip
    add("--draft-model", metavar="PATH", help="a smaller model that guesses, too")
    add("--cache", default=True, metavar="FOLDER",
        help="where packed weights are kept (default: $FASTGEN_CACHE, or fastgen/ in the user's "
        "cache)")  # fmt: skip
    add("--no-cache", dest="cache", action="store_false", help="keep them nowhere")
    add("--share-weights", action="store_true",
        help="one copy of the weights for all processes of this machine")  # fmt: skip
    return options


def _sampling_options() -> argparse.ArgumentParser:
    """Each lands under the name of the SamplingParams field it is."""
    options = argparse.ArgumentParser(add_help=False)
    group = options.add_argument_group("sampling")
    for option in OPTIONS:
        if option.flag is not None:
            group.add_argument(option.flag.name, dest=option.name, **_flag(option, option.flag))
    group.add_argument("--timeout", type=float, metavar="SECONDS", help="end after this time")
    return options


def _flag(option: Option, flag: Flag) -> dict[str, Any]:
    """What argparse is told of an option's flag."""
    if not flag.metavar:
        return {"action": "store_true", "help": flag.help}
    told: dict[str, Any] = {"type": _kind(flag), "metavar": flag.metavar, "help": flag.help}
    if flag.repeats:
        told["help"] += "; may be repeated"
        return told | {"action": "append", "default": []}
    if option.default is not None:
        told["help"] += f" (default: {option.default:g})"
    return told | {"default": option.default}


def _kind(flag: Flag) -> Callable[[str], Any]:
    """Reads the flag's value; argparse itself says what is no number."""
    if flag.kind in (int, float, str):
        return flag.kind

    def read(argument: str) -> Any:
        try:
            return flag.kind(argument)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{argument!r} is not {flag.metavar}") from None

    return read


def _load(arguments: argparse.Namespace, model: str | None) -> Generator:
    return load(
        model,
        device=arguments.device,
        dtype=arguments.dtype,
        quantize=arguments.quantize,
        kv_dtype=arguments.kv_dtype,
        decoder=arguments.decoder,
        max_batch_size=arguments.max_batch_size,
        max_seq_len=arguments.max_seq_len,
        max_memory=arguments.max_memory,
        num_threads=arguments.num_threads,
        speculate=arguments.speculate,
        draft_model=arguments.draft_model,
        cache=arguments.cache,
        share_weights=arguments.share_weights,
        revision=arguments.revision,
    )


def _generate(arguments: argparse.Namespace) -> int:
    params = params_of(arguments)
    prompt = _text(arguments.prompt)
    with _load(arguments, arguments.model) as model:
        if params.num_rows == 1 and not arguments.json:
            return _print_stream(model, prompt, params, arguments.timeout)
        [generation] = model.generate(prompt, params, timeout=arguments.timeout)
        if arguments.json:
            print(json.dumps(dataclasses.asdict(generation), ensure_ascii=False))
        else:
            _print_completions(prompt, params, generation)
        return _exit_code(each.error for each in generation.completions)


def params_of(arguments: argparse.Namespace) -> SamplingParams:
    given = vars(arguments)
    names = [option.name for option in OPTIONS if option.flag is not None]
    return SamplingParams(**{name: given[name] for name in names})


def _print_completions(prompt: str, params: SamplingParams, generation: Generation) -> None:
    for completion in generation.completions:
        print(f"--- {completion.index + 1} of {params.num_rows}, seed {completion.seed} ---")
        print(prompt + completion.text)


def _print_stream(
    model: Generator, prompt: str, params: SamplingParams, timeout: float | None
) -> int:
    """Text as it comes; a prompt and what is there of its continuation survive Ctrl-C."""
    error: str | None = None
    with model.stream(prompt, params, timeout=timeout) as stream:
        try:
            print(prompt, end="", flush=True)
            for piece in stream:
                print(piece, end="", flush=True)
                error = piece.error
        finally:
            print(flush=True)
    return _exit_code([error])


def _exit_code(errors: Iterable[str | None]) -> int:
    """1 if there were any, after they have been shown."""
    found = list(dict.fromkeys(error for error in errors if error is not None))
    for error in found:
        print(f"fastgen: {error}", file=sys.stderr)
    return 1 if found else 0


def _score(arguments: argparse.Namespace) -> int:
    text = _text(arguments.text)
    with _load(arguments, arguments.model) as model:
        [score] = model.score([text])
        if arguments.json:
            print(json.dumps(_score_record(model, score), ensure_ascii=False))
            return 0
        for token_id, logprob in zip(score.token_ids, score.logprobs, strict=True):
            shown = "        -" if logprob is None else f"{logprob:9.4f}"
            print(f"{shown}  {token_id:6d}  {_token_text(model, token_id)!r}")
        print(
            f"{len(score.token_ids)} tokens, {score.num_scored} scored in "
            f"{score.windows} window{'s' * (score.windows != 1)}: log-probability "
            f"{score.total_logprob:.4f}, perplexity {score.perplexity:.4f}"
        )
    return 0


def _score_record(model: Generator, score: Score) -> dict[str, Any]:
    return {
        "tokens": [_token_text(model, token_id) for token_id in score.token_ids],
        "token_ids": score.token_ids,
        "logprobs": score.logprobs,
        "total_logprob": score.total_logprob,
        "perplexity": None if math.isnan(score.perplexity) else score.perplexity,
        "windows": score.windows,
    }


def _token_text(model: Generator, token_id: int) -> str:
    return "" if model.tokenizer is None else model.tokenizer.token_text(token_id)


def _pack(arguments: argparse.Namespace) -> int:
    folder = pack(
        arguments.model,
        arguments.out,
        dtype=arguments.dtype,
        quantize=arguments.quantize,
        num_threads=arguments.num_threads,
        revision=arguments.revision,
    )
    print(folder)
    return 0


def _info(arguments: argparse.Namespace) -> int:
    names = [field.name for field in dataclasses.fields(LoadOptions)]
    given = {name: value for name, value in vars(arguments).items() if name in names}
    if arguments.clear_cache:
        print(cleared(arguments.cache), file=sys.stderr)
    checkpoint = open_model(arguments.model, arguments.revision)
    check_choice(arguments.speculate, has_draft_model=arguments.draft_model is not None)
    config, draft = checkpoint.config, arguments.draft_model
    draft = None if draft is None else open_draft(draft, config.vocab_size)
    speculation = Speculation(arguments.speculate, draft, LoadOptions(**given))
    plan = speculation.plan(checkpoint)
    draft_plan = speculation.draft_plan(plan)
    cache = cache_record(checkpoint, plan)
    parameters = config.parameter_count(tied=checkpoint.tied)
    if arguments.json:
        record = {
            "model": checkpoint.name,
            "parameters": parameters,
            "weights_dtype": checkpoint.dtype,
            "tied": checkpoint.tied,
            "config": dataclasses.asdict(config),
            "plan": dataclasses.asdict(plan),
            "draft_plan": None if draft_plan is None else dataclasses.asdict(draft_plan),
            "cache": cache,
            "backends": [dataclasses.asdict(backend) for backend in backends()],
        }
        print(json.dumps(record))
        return 0
    limits = plan.limits
    guessing = ["the text"] * speculation.has_suffix(plan) + ["a draft model"] * bool(draft)
    lines = {
        "model": checkpoint.name,
        "parameters": f"{parameters:,} in {checkpoint.dtype}, "
        f"head {'tied to the embedding' if checkpoint.tied else 'of its own'}",
        "shape": f"{config.num_layers} layers, {config.num_heads} heads of {config.head_dim}, "
        f"hidden {config.hidden_size}, inner {config.inner_size}, {config.activation}",
        "vocabulary": f"{config.vocab_size:,}, eos {list(config.eos_token_ids)}",
        "context": f"{limits.max_seq_len} of {config.max_positions} tokens",
        "decoder": _described(plan),
        "memory": str(plan.memory),
        "a step": f"at most {limits.num_seats} rows, {limits.max_tokens} tokens",
        "speculation": f"tokens are guessed by {' and '.join(guessing)}" if guessing else "off",
        "cache": f"\n{'':<11} ".join(cache_lines(cache)),
    }
    if draft is not None and draft_plan is not None:
        lines["draft model"] = f"{draft.name}: {_described(draft_plan)}; {draft_plan.memory}"
    for name, value in lines.items():
        print(f"{name:<11} {value}")
    for backend in backends():
        print(f"{'':<11} {backend}")
    return 0


def _described(plan: DecoderPlan) -> str:
    threads = f", {plan.num_threads} threads" if plan.num_threads else ""
    weights = f", weights {plan.weights}" if plan.weights != plan.dtype else ""
    if plan.kv_dtype not in (None, plan.dtype):
        weights += f", KV {plan.kv_dtype}"
    return f"{plan.decoder} ({plan.reason}): {plan.device}, {plan.dtype}{weights}{threads}"


def _serve(arguments: argparse.Namespace) -> int:
    return server_command.run(arguments, lambda model: _load(arguments, model))


def _text(argument: str) -> str:
    """The argument itself; for "-" standard input, without the newline that ends its last line."""
    if argument != "-":
        return argument
    if sys.stdin is None:
        raise ValueError("standard input is closed")
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8: {error}") from None
