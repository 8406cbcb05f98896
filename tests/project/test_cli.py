"""The command line, run as a user runs it: its output, its exit code. What depends on the process
itself (its streams, signals, its imports) has one of its own.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fastgen
import processes
from fastgen.cli import _parser, main, params_of
from fastgen.sampling.options import OPTIONS
from packed_files import checkpoint_of

Done = subprocess.CompletedProcess[str]


def run(*arguments: str, stdin: str = "") -> Done:
    return processes.run(
        [sys.executable, "-m", "fastgen", *arguments], stdin=stdin,
    )  # fmt: skip


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """As `run`, in this process."""

    def run_here(*arguments: str) -> Done:
        capsys.readouterr()
        code = main(arguments)
        return Done(arguments, code, *capsys.readouterr())

    return run_here


def test_generate_streams_the_prompt_and_what_follows(model: fastgen.Generator) -> None:
    done = run("generate", "--temperature", "0", "--max-new-tokens", "12", "In the beginning")
    assert done.returncode == 0, done.stderr
    text = model("In the beginning", temperature=0, max_new_tokens=12)
    assert done.stdout == f"In the beginning{text}\n"
    assert done.stderr == ""


def test_generate_several_as_the_api_does(model: fastgen.Generator) -> None:
    options = ["--seed", "1", "--temperature", "0.8", "--top-p", "0.95", "-n", "3"]
    done = run("generate", *options, "--max-new-tokens", "9", "--json", "-", stdin="Hello\n")
    [wanted] = model.generate("Hello", seed=1, temperature=0.8, top_p=0.95, n=3, max_new_tokens=9)
    found = json.loads(done.stdout)["completions"]
    assert [c["text"] for c in found] == [c.text for c in wanted.completions]
    assert [c["seed"] for c in found] == [c.seed for c in wanted.completions]
    shown = run("generate", *options, "--max-new-tokens", "9", "Hello").stdout
    assert all(f"Hello{completion.text}\n" in shown for completion in wanted.completions)


def test_every_sampling_option_arrives() -> None:
    """Each changes the field it names; what there is no flag for takes a function, or ids only."""
    values = {
        "-n": "2", "--best-of": "3", "--max-new-tokens": "5", "--min-new-tokens": "4",
        "--temperature": "0.5", "--top-n-sigma": "1.5",
        "--top-k": "7", "--top-p": "0.9", "--min-p": "0.1",
        "--typical-p": "0.8", "--top-h": "0.7", "--epsilon-cutoff": "0.01", "--eta-cutoff": "0.02",
        "--repetition-penalty": "1.1", "--presence-penalty": "-0.5", "--frequency-penalty": "0.3",
        "--no-repeat-ngram-size": "3", "--logit-bias": "5=-2.5", "--bad-word": "x", "--stop": "y",
        "--stop-token-id": "9", "--seed": "11", "--logprobs": "2",
    }  # fmt: skip
    words = [word for pair in values.items() for word in pair]
    again = ["--logit-bias", "6=1", "--bad-word", "z", "--stop-token-id", "10"]
    switches = ["--include-stop", "--ignore-eos"]
    assert {*values, *switches} == {option.flag.name for option in OPTIONS if option.flag}
    flags = [*switches, *again]
    found = params_of(_parser().parse_args(["generate", *words, *flags, "prompt"]))
    assert found == fastgen.SamplingParams(
        n=2, best_of=3, max_new_tokens=5, min_new_tokens=4, temperature=0.5, top_n_sigma=1.5,
        top_k=7, top_p=0.9, min_p=0.1, typical_p=0.8, top_h=0.7,
        epsilon_cutoff=0.01, eta_cutoff=0.02,
        repetition_penalty=1.1, presence_penalty=-0.5, frequency_penalty=0.3,
        no_repeat_ngram_size=3, logit_bias={5: -2.5, 6: 1}, bad_words=["x", "z"], stop="y",
        stop_token_ids=[9, 10], seed=11, logprobs=2, include_stop=True, ignore_eos=True,
    )  # fmt: skip
    assert params_of(_parser().parse_args(["generate", "prompt"])) == fastgen.SamplingParams()


def test_generate_shows_the_best(model: fastgen.Generator, here: Callable[..., Done]) -> None:
    options = [
        "--seed",
        "1",
        "--best-of",
        "5",
        "-n",
        "2",
        "--max-new-tokens",
        "6",
        "--min-p",
        "0.1",
    ]
    [wanted] = model.generate("And the", seed=1, best_of=5, n=2, max_new_tokens=6, min_p=0.1)
    shown = here("generate", *options, "And the").stdout
    heads = [line for line in shown.splitlines() if line.startswith("---")]
    assert heads == [f"--- {c.index + 1} of 5, seed {c.seed} ---" for c in wanted.completions]
    record = json.loads(here("generate", *options, "--logprobs", "1", "--json", "And the").stdout)
    assert [c["index"] for c in record["completions"]] == [c.index for c in wanted.completions]
    assert len(record["completions"][0]["logprobs"][0]["top"]) == 1
    assert record["completions"][0]["error"] is None


@pytest.mark.parametrize("options", [[], ["--json"], ["-n", "2"]])
def test_a_completion_that_failed_is_named_and_exits_with_1(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: object) -> None:
        raise OSError("injected")

    monkeypatch.setattr("fastgen.engine.requests.Row.accept", broken)
    assert main(["generate", "--max-new-tokens", "2", *options, "In the"]) == 1
    out, err = capsys.readouterr()
    assert err == "fastgen: OSError: injected\n"
    assert "In the" in out or json.loads(out)["completions"][0]["finish_reason"] == "error"


def test_score_prints_each_token_and_the_perplexity(
    model: fastgen.Generator, here: Callable[..., Done]
) -> None:
    text = "Let there be light: 你好"
    [wanted] = model.score([text])
    record = json.loads(run("score", "-", "--json", stdin=text + "\n").stdout)
    assert record["logprobs"] == pytest.approx(list(wanted.logprobs), abs=1e-5)
    assert record["perplexity"] == pytest.approx(wanted.perplexity, rel=1e-5)
    shown = here("score", text).stdout
    [perplexity] = re.findall(r"perplexity (\S+)", shown)
    assert float(perplexity) == pytest.approx(wanted.perplexity, rel=1e-5, abs=5e-5)  # 4 decimals
    assert len(shown.splitlines()) == len(wanted.token_ids) + 1
    assert json.loads(here("score", "", "--json").stdout)["perplexity"] is None


def test_info_says_what_would_be_loaded(
    variant: Callable[[str], Path], here: Callable[..., Done]
) -> None:
    done = here("info", "--model", str(variant("untied")), "--max-batch-size", "4")
    assert done.returncode == 0, done.stderr
    for part in ("3 layers, 4 heads of 8", "head of its own", "cpu (", "MB = weights", "KV"):
        assert part in done.stdout
    record = json.loads(here("info", "--json").stdout)
    assert record["parameters"] == 6_049_792
    assert record["plan"]["memory"]["num_blocks"] == 1024
    assert record["draft_plan"] is None
    assert ", KV int8," in run("info", "--kv-dtype", "int8").stdout
    assert ", KV " not in done.stdout


def test_info_says_who_guesses(variant: Callable[[str], Path], here: Callable[..., Done]) -> None:
    def line(*options: str) -> str:
        done = here("info", *options)
        assert done.returncode == 0, done.stderr
        [found] = [one for one in done.stdout.splitlines() if one.startswith("speculation")]
        return found

    assert line("--speculate", "off").endswith(" off")
    assert line("--decoder", "torch").endswith(" off")
    assert line().endswith(" tokens are guessed by the text")
    name = str(variant("untied"))
    draft = ("--draft-model", name)
    assert line("--model", name, *draft).endswith(" by the text and a draft model")
    shown = here("info", "--model", name, *draft).stdout
    assert f"draft model {name}: cpu (" in shown and shown.count("MB = weights") == 2
    record = json.loads(here("info", "--model", name, *draft, "--json").stdout)
    assert record["draft_plan"]["memory"]["num_blocks"] > 0


def test_info_shows_the_cache_and_clears_it(tmp_path: Path, here: Callable[..., Done]) -> None:
    folder, cache = checkpoint_of(tmp_path / "model"), tmp_path / "cache"
    options = ["--model", str(folder), "--cache", str(cache), "--quantize", "int8"]
    assert f"{cache}: 0 of 8,192 MB, without this model" in here("info", *options).stdout
    fastgen.load(folder, cache=cache, device="cpu", quantize="int8").close()
    (cache / ("0" * 64 + ".packed")).write_text("broken")
    shown = here("info", *options).stdout
    assert "MB, with this model" in shown
    assert f"{folder}: int8 weights, bfloat16, 0 MB, used 20" in shown
    assert "a file that cannot be read: 0 MB" in shown
    record = json.loads(here("info", *options, "--json").stdout)["cache"]
    assert record["folder"] == str(cache) and record["has_this_model"]
    assert sorted(each["name"] or "" for each in record["models"]) == ["", str(folder)]
    assert (
        "without this model" in here("info", "--model", str(folder), "--cache", str(cache)).stdout
    )
    cleared = here("info", *options, "--clear-cache")
    assert f"{cache}: 0 of 8,192 MB, without this model" in cleared.stdout
    assert f"{cache}: removed 2 files, 0 MB" in cleared.stderr
    assert list(cache.iterdir()) == []
    assert "there is no cache to clear" in here("info", "--clear-cache", "--no-cache").stderr
    assert json.loads(here("info", "--json", "--no-cache").stdout)["cache"] is None
    assert "cache       none" in here("info").stdout  # the tests have turned it off
    cache.chmod(0o777)
    assert "cannot be used: " in here("info", *options).stdout


def test_pack_makes_a_folder_that_generates_the_same(
    model: fastgen.Generator, tmp_path: Path, here: Callable[..., Done]
) -> None:
    out = tmp_path / "packed"
    done = here("pack", "--out", str(out), "--dtype", "bfloat16")
    assert (done.stdout, done.stderr, done.returncode) == (f"{out}\n", "", 0)
    options = ["--temperature", "0", "--max-new-tokens", "12", "In the beginning"]
    wanted = here("generate", "--dtype", "bfloat16", *options).stdout
    assert here("generate", "--model", str(out), *options).stdout == wanted
    again = here("pack", "--out", str(out))
    assert again.returncode == 1 and "a new or an empty folder" in again.stderr


def test_weights_are_shared_if_it_is_asked_for(tmp_path: Path, here: Callable[..., Done]) -> None:
    folder = checkpoint_of(tmp_path / "model")
    options = ["--model", str(folder), "--share-weights", "--json"]
    record = json.loads(here("info", *options, "--cache", str(tmp_path / "cache")).stdout)
    assert record["plan"]["share_weights"]
    done = here("info", *options, "--no-cache")
    assert done.returncode == 1 and "share_weights" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--model", "./nowhere", "x"], "./nowhere: no such folder"),
        (["generate", "--top-p", "7", "x"], "top_p must be"),
        (["generate", "--device", "warp", "x"], "device='warp'"),
        (["generate", "--max-memory", "1", "x"], "max_memory=1 MB"),
        (["generate", "word " * 5000], "tokens"),
        (["generate", "--logit-bias", "5000=1", "x"], "logit_bias holds token id 5000"),
        (["generate", "--best-of", "2", "-n", "3", "x"], "best_of=2 is less than n=3"),
        (["info", "--dtype", "int3"], "dtype must be one of"),
        (["generate", "--speculate", "yes", "x"], "speculate must be one of auto, suffix, off"),
        (["bench", "--speculate", "yes"], "speculate must be one of auto, suffix, off"),
        (["bench", "--speculate", "off", "--draft-model", "x"], "draft_model: speculate='off'"),
        (["generate", "--draft-model", "./nowhere", "x"], "./nowhere: no such folder"),
        (
            ["generate", "--speculate", "off", "--draft-model", "./nowhere", "x"],
            "draft_model: speculate='off' leaves nothing",
        ),
    ],
)
def test_mistakes_give_one_line_and_exit_code_1(
    arguments: list[str], message: str, here: Callable[..., Done]
) -> None:
    done = here(*arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.startswith("fastgen: ")
    assert "Traceback" not in done.stderr


def test_a_process_ends_with_the_commands_exit_code() -> None:
    done = run("generate", "--model", "./nowhere", "x")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("fastgen: ./nowhere: no such folder")
    assert done.stderr.count("\n") == 1


def test_streams_that_are_not_there_are_named() -> None:
    command = f"{sys.executable} -m fastgen"
    for line, message in (
        (f"{command} score - <&-", "standard input"),
        (f"printf '\\377' | {command} score -", "not UTF-8"),
        (f"{command} generate --max-new-tokens 2 hi > /dev/full", "No space left"),
    ):
        done = processes.run(["bash", "-c", line])
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_usage_errors_exit_with_2() -> None:
    assert run().returncode == 2
    assert run("generate").returncode == 2
    assert "'5' is not ID=VALUE" in run("generate", "--logit-bias", "5", "x").stderr
    assert run("--version").stdout == f"fastgen {fastgen.__version__}\n"


def test_ctrl_c_keeps_the_text_and_exits_130() -> None:
    options = ("--ignore-eos", "--max-new-tokens", "1000")
    command = [sys.executable, "-m", "fastgen", "generate", *options, "In the beginning"]
    pipe = subprocess.PIPE
    with processes.started(command, stdout=pipe, stderr=pipe, text=False) as process:
        assert process.stdout is not None
        shown = b""
        while len(shown) <= len("In the beginning"):  # new tokens have come, and more will
            part = os.read(process.stdout.fileno(), 16)
            assert part, process.communicate()
            shown += part
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate()
    assert process.returncode == 130
    assert (shown + rest).startswith(b"In the beginning")
    assert b"Traceback" not in errors


def test_a_reader_that_leaves_is_no_error() -> None:
    line = f"{sys.executable} -m fastgen generate --ignore-eos --max-new-tokens 300 In | head -c 5"
    done = processes.run(["sh", "-c", line])
    assert len(done.stdout) == 5
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
