"""`fastgen bench` as its user runs it, and how it treats peers that are absent, wrong or dead."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import fastgen
from cpu_decoders import INSTRUCTION_SETS, instruction_set
from fastgen.bench import command, compare, fallbacks, peer_process
from fastgen.bench.compare import Comparison, agreement, records, verdict
from fastgen.bench.peer_process import Generated, PeerError
from fastgen.bench.plain_checkpoint import write_plain
from fastgen.bench.shapes import SHAPES, random_prompts, save_checkpoint
from fastgen.checkpoints.checkpoint import open_checkpoint
from fastgen.decoders.plan import LoadOptions
from fastgen.decoders.select import plan_decoder
from fastgen.frontends.generator import BUNDLED_MODEL
from processes import command_of, run, started
from waits import wait_until

SCHEMA = json.loads((Path(fastgen.__file__).parent / "bench" / "schema.json").read_text())
SMALL = ("--shape=tiny", "--rounds=1", "--batch-sizes=2,1", "--prompt-len=8", "--output-len=6")


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastgen", "bench", *arguments]
    return run(command, env={**os.environ, **environment})


def record_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    jsonschema.validate(record, SCHEMA)
    return record


@pytest.fixture(autouse=True)
def at_its_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another path than the best is refused, whichever the other tests take."""
    monkeypatch.delenv("FASTGEN_ISA", raising=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny"), SHAPES["tiny"])


@pytest.fixture
def job(tiny: Path, tmp_path: Path) -> Comparison:
    return Comparison(
        folder=tiny, scratch=tmp_path, peers=("transformers",), pythons={},
        precision="float32", device="cpu", load={"dtype": "float32"}, threads=1, batches=(1, 3),
        prompt_len=8, output_len=6, rounds=1, vocab=50_257,
    )  # fmt: skip


def told(text: str) -> None:
    assert text


def test_a_run(tmp_path: Path) -> None:
    """A table, a picture, and a last line of JSON that says what ran."""
    picture = tmp_path / "run.png"
    done = bench(*SMALL, f"--plot={picture}", "--sampling=temperature=0.8,top_p=0.95,top_k=50")
    record = record_of(done)
    assert [row["batch_size"] for row in record["results"]] == [1, 2]
    assert record["work"] == {
        "prompt_len": 8, "output_len": 6, "rounds": 1,
        "sampling": "temperature=0.8, top_p=0.95, top_k=50",
    }  # fmt: skip
    assert record["decoder"]["decoder"] == "cpu" and record["comparison"] is None
    assert set(record["limits"]) == {"read", "float32"}
    assert "TTFT" in done.stdout and "tiny (random weights)" in done.stdout
    assert "round 1 of 1, batch 2" in done.stderr
    with Image.open(picture) as image:
        assert image.width > 800 and len(np.unique(np.asarray(image))) > 20


def test_a_model_of_ones_own(tiny: Path) -> None:
    record = record_of(bench(*SMALL[1:], f"--model={tiny}", "--quantize=int8", "--threads=1"))
    assert record["model"]["name"] == str(tiny)
    assert (record["decoder"]["weights"], record["decoder"]["num_threads"]) == ("int8", 1)
    assert set(record["limits"]) == {"read", "int8", "bfloat16"}


@pytest.mark.parametrize(
    ("arguments", "environment", "told"),
    [
        (["--dtype=float8"], {}, "dtype must be one of"),
        (["--batch-sizes=0"], {}, "'0' is not a number above 0"),
        (["--prompt-len=1000", "--output-len=100"], {}, "1024 positions"),
        (["--sampling=best_of=3"], {}, "'best_of' is none of"),
        (["--sampling=temperature=warm"], {}, "is not NAME=NUMBER"),
        (["--sampling=temperature=-1"], {}, "temperature"),
        (["--compare=vllm"], {}, "'vllm' is none of transformers"),
        (["--compare", "--sampling=temperature=1"], {}, "--compare is greedy"),
        (["--compare", "--sampling=temperature=0,top_k=5"], {}, "--compare is greedy"),
        (["--compare", "--decoder=torch", "--dtype=float16"], {}, "not float16"),
        (["--compare="], {}, "name some of transformers"),
        (["--python=llama_cpp"], {}, "is not PEER=PATH"),
        (["--python=llama_cpp=python3"], {}, "where peers of --compare are"),
        (["--plot=run.xyz"], {}, "must end in one of"),
        (["--plot=/nonexistent/run.png"], {}, "no folder /nonexistent"),
        (["--model=/nonexistent"], {}, "no such folder"),
        (["--shape=gpt3"], {}, "invalid choice"),
        (["--threads=512"], {}, "512 threads were asked for"),
        ([], {"FASTGEN_ISA": "portable"}, "FASTGEN_ISA=portable keeps the decoder from"),
        (["--max-memory=40"], {}, "MB of KV"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused(
    arguments: list[str], environment: dict[str, str], told: str, capfd: Any, monkeypatch: Any
) -> None:
    """In this process; before anything long, in one line that says what can be done."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    small = SMALL[1:] if any(each.startswith("--model") for each in arguments) else SMALL
    try:
        from fastgen.cli import main

        code: Any = main(["bench", *small, *arguments])
    except SystemExit as ended:
        code = ended.code
    out, err = capfd.readouterr()
    assert code in (1, 2) and out == ""
    assert told in err.splitlines()[-1]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_run_leaves_nothing_behind(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "fastgen", "bench", *SMALL, "--rounds=1000"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with started(command, env=environment, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "round 2 of 1000" in line:
                break
        assert list(tmp_path.glob("fastgen-bench-*"))
        process.send_signal(number)
        process.stderr.read()
        assert process.wait() == status
    assert list(tmp_path.glob("fastgen-bench-*")) == []


def test_a_fallback_may_be_allowed() -> None:
    record = record_of(bench(*SMALL, "--allow-fallback", FASTGEN_ISA="portable"))
    [why] = record["fallbacks"]
    assert why.startswith("FASTGEN_ISA=portable")


def test_fallbacks(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(tiny)
    asked, chosen = LoadOptions(decoder="torch"), LoadOptions(device="cpu")
    torch_plan = plan_decoder(checkpoint, asked)
    assert fallbacks.fallbacks(torch_plan, asked) == []
    [why] = fallbacks.fallbacks(torch_plan, chosen)
    assert why.startswith("the torch decoder was chosen")
    assert fallbacks.fallbacks(plan_decoder(checkpoint, chosen), chosen) == []
    with monkeypatch.context() as patch:
        patch.setattr(fallbacks, "may_have_gpu", lambda: True)
        [why] = fallbacks.fallbacks(plan_decoder(checkpoint, chosen), LoadOptions())
        assert why.startswith("a GPU seems to be there")
        assert fallbacks.fallbacks(plan_decoder(checkpoint, chosen), chosen) == []
    monkeypatch.setattr(fallbacks, "native", None)
    [why] = fallbacks.fallbacks(torch_plan, asked)
    assert "C++ extension was not built" in why


@pytest.mark.parametrize("path", INSTRUCTION_SETS)
def test_notes_on_int8(path: str, tiny: Path) -> None:
    """They say so where a path needs several instructions for a product."""
    plan = plan_decoder(open_checkpoint(tiny), LoadOptions(decoder="cpu", quantize="int8"))
    with instruction_set(path):
        found = fallbacks.notes(plan)
    has_vnni = path in ("avx512_bf16", "avx512_vnni", "avx_vnni")
    assert any("products of 8 bits" in note for note in found) == (not has_vnni)


def test_a_peer_may_part_only_where_two_tokens_are_all_but_equal() -> None:
    own = [[{5: -0.1, 7: -2.5}, {3: -1.0, 4: -1.01}, {8: -0.5, 9: -1.0}]] * 2
    same = verdict(own, [[5, 3, 8], [5, 3, 8]])
    assert same == {"tokens_agree": 1.0, "parted_within_nats": 0.0}
    near = verdict(own, [[5, 4, 1], [5, 3, 8]])  # what follows is another text
    assert near == {"tokens_agree": 0.667, "parted_within_nats": 0.01}
    far = verdict(own, [[7, 3, 8], [5, 3, 8]])
    assert far["parted_within_nats"] == 2.4 and "another model" in far["why_not"]
    never = verdict(own, [[5, 3, 8], [5, 3, 0]])
    assert never["parted_within_nats"] is None and "another model" in never["why_not"]


def test_peers_are_compared_round_by_round() -> None:
    own = [Generated(1.0, [[1, 2]], 3 << 20), Generated(4.0, [[1, 2]], None)]
    other = [Generated(3.0, [[1, 9]], None), Generated(8.0, [[9, 2]], None)]
    first, second = records({"fastgen": own, "peer": other}, 1, 2)
    assert first == {
        "batch_size": 1, "peer": "fastgen", "tokens_per_s": 0.8, "peak_mb": 3,
        "fastgen_is_faster": {"median": 1.0, "lowest": 1.0, "highest": 1.0}, "tokens_agree": 1.0,
    }  # fmt: skip
    assert second["fastgen_is_faster"] == {"median": 2.5, "lowest": 2.0, "highest": 3.0}
    assert second["peak_mb"] is None and second["tokens_agree"] == 0.25
    assert agreement(other, own, 2) == 0.25


def test_prompts_are_new_in_each_round_and_peers_take_turns(
    job: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "SETTLE", 0.0)
    seen: list[tuple[str, Any]] = []

    class Process:
        def __init__(self, peer: str) -> None:
            self.peer = peer

        def generate(self, prompts: Any, new_tokens: int) -> Generated:
            seen.append((self.peer, prompts))
            if self.peer == "dying" and len(seen) > 5:
                raise PeerError("dying ended with status 9")
            return Generated(1.0, [[0] * new_tokens] * len(prompts), None)

    running: Any = {peer: Process(peer) for peer in ("fastgen", "dying", "other")}
    found = compare.take_rounds(job, running, 2, told)
    assert [peer for peer, _ in seen] == ["fastgen", "dying", "other", "fastgen", "dying", "other"]
    assert seen[0][1] == seen[1][1] == seen[2][1] != seen[3][1]
    assert found.failed == {} and {len(made) for made in found.rounds.values()} == {1}
    found = compare.take_rounds(job, running, 2, told)
    assert found.failed == {"dying": "dying ended with status 9"}
    assert set(found.rounds) == set(running) == {"fastgen", "other"}


@pytest.fixture
def own(job: Comparison) -> Iterator[peer_process.PeerProcess]:
    with job.start("fastgen", "float32", 3) as process:
        yield process


def test_a_process_generates_what_fastgen_does(
    own: peer_process.PeerProcess, job: Comparison
) -> None:
    prompts = random_prompts(3, 8, np.random.default_rng(5))
    assert own.ready["version"] == fastgen.__version__ and own.ready["load_seconds"] > 0
    made = own.generate(prompts, 6)
    with fastgen.load(job.folder, max_seq_len=14) as model:
        expected = model.generate(prompts, max_new_tokens=6, ignore_eos=True, temperature=0)
    assert made.ids == [list(each.completions[0].token_ids) for each in expected]
    assert made.seconds > 0 and (made.peak_bytes is None or made.peak_bytes > 1 << 20)
    candidates = compare.own_candidates(job, prompts, 6)
    assert verdict(candidates, made.ids) == {"tokens_agree": 1.0, "parted_within_nats": 0.0}


def test_a_process_that_dies_says_so(own: peer_process.PeerProcess) -> None:
    os.killpg(own._process.pid, signal.SIGKILL)
    with pytest.raises(PeerError, match=r"fastgen ended with status -9"):
        own.generate([[1, 2]], 3)


def test_peers_that_cannot_run(job: Comparison, tmp_path: Path) -> None:
    for peer in ("ctranslate2", "onnxruntime"):
        if importlib.util.find_spec(peer) is None:
            with job.start(peer, "float32", 1) as absent:
                assert absent.why_not is not None
                assert absent.why_not.endswith(peer_process.INSTALL[peer])
    with job.start("transformers", "int8", 1) as without:
        assert without.why_not == "has no int8 on cpu"
    with pytest.raises(PeerError, match=r"answered 'peers/worker\.py"):
        peer_process.start("transformers", {"transformers": str(echo(tmp_path))}, **fields(job))
    with pytest.raises(PeerError, match="cannot be started"):
        peer_process.start("transformers", {"transformers": "/nonexistent/python"}, **fields(job))
    broken = tmp_path / "broken"
    save_checkpoint(broken, SHAPES["tiny"])
    (broken / "model.safetensors").write_bytes(b"0")
    with peer_process.start("transformers", {}, **fields(job, folder=str(broken))) as failed:
        assert failed.why_not is not None and failed.why_not.startswith("failed: ")


def echo(folder: Path) -> Path:
    """No Python, which answers something else."""
    path = folder / "python"
    path.write_text("#!/bin/sh\necho peers/worker.py\n")
    path.chmod(0o700)
    return path


def fields(job: Comparison, **other: Any) -> dict[str, Any]:
    return {
        "folder": str(job.folder), "scratch": str(job.scratch), "precision": "float32",
        "device": "cpu", "threads": 1, "batch": 1, "max_len": 14, "load": {},
        "exact": False, **other,
    }  # fmt: skip


def test_what_a_peer_has_started_ends_with_it(
    job: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when Ctrl-C comes while it is being waited for."""
    told = tmp_path / "pid"
    path = tmp_path / "python"
    path.write_text(
        f'#!/bin/sh\nsleep 600 &\necho $! > {told}\necho \'{{"version": "1"}}\'\nwait\n'
    )
    path.chmod(0o700)
    process = peer_process.start("transformers", {"transformers": str(path)}, **fields(job))

    def interrupted(timeout: float | None = None) -> int:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(process._process, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        process.close()
    wait_until(lambda: command_of(int(told.read_text())) == "")


@pytest.mark.parametrize("name", ["bundled", "untied", "bfloat16"])
def test_every_engine_is_given_the_same_plain_checkpoint(name: str, tmp_path: Path) -> None:
    """As transformers saves it: prefixes, its own dtype, heads of their own."""
    source = tmp_path / "source"
    if name == "bundled":
        shutil.copytree(BUNDLED_MODEL, source)
    else:
        options = {"n_embd": 24, "n_layer": 2, "n_head": 3, "vocab_size": 61, "n_positions": 32}
        config = transformers.GPT2Config(
            **options, n_inner=40, tie_word_embeddings=name != "untied"
        )
        model = transformers.GPT2LMHeadModel(config)
        model.to(torch.bfloat16 if name == "bfloat16" else torch.float32).save_pretrained(source)
    checkpoint = open_checkpoint(source)
    plain = open_checkpoint(write_plain(checkpoint, tmp_path / "plain"))
    assert plain.config == checkpoint.config and plain.tied == checkpoint.tied
    for tensor, _ in checkpoint.tensors():
        written = plain.read(tensor)
        assert written.dtype == np.float32
        assert np.array_equal(written, checkpoint.read(tensor).astype(np.float32))
    mine, theirs = (
        transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (tmp_path / "plain", source)
    )
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_every_peer_has_a_file_and_an_installation() -> None:
    folder = peer_process.worker_path().parent
    files = {path.stem.removesuffix("_peer") for path in folder.glob("*_peer.py")}
    files -= {name for name in files if name.endswith("_lookup")}  # bench_speculation.py's alone
    assert files == set(peer_process.INSTALL) == {"fastgen", *command.PEERS}
    page = (Path(__file__).parents[2] / "benchmarks" / "README.md").read_text()
    for peer in command.PEERS:
        assert f"| `{peer}` | {peer_process.INSTALL[peer]} |" in page


@pytest.mark.slow
def test_a_comparison() -> None:
    """With transformers, and peers that are not there."""
    done = bench(*SMALL, "--compare=transformers,ctranslate2", "--python=ctranslate2=/nowhere")
    record = record_of(done)
    peers = record["comparison"]["peers"]
    assert peers["transformers"]["tokens_agree"] > 0.5 and "why_not" not in peers["transformers"]
    assert "cannot be started" in peers["ctranslate2"]["why_not"]
    rows = {(row["batch_size"], row["peer"]) for row in record["comparison"]["results"]}
    assert rows == {(batch, peer) for batch in (1, 2) for peer in ("fastgen", "transformers")}
    assert "in turns with other engines, float32" in done.stdout
