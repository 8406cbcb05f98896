"""Every example runs as its first lines say, on the bundled model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import processes

EXAMPLES = Path(__file__).parents[2] / "examples"
ARTICLE = "And Moses went up into the mount, and a cloud covered the mount. " * 8


def run(name: str, *arguments: str, stdin: str = "") -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = processes.run(command, stdin=stdin)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_described_and_tested() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    described = (EXAMPLES / "README.md").read_text()
    tested = Path(__file__).read_text()
    assert names
    for name in names:
        assert f"`{name}`" in described
        assert f'"{name}"' in tested or f'"{name.removesuffix(".py")}:app"' in tested


def test_threads() -> None:
    stories = run("threads.py").splitlines()
    assert len(stories) == 12
    assert stories[0].startswith("In the beginning") and len(stories[0]) > 30


def test_batch_job(tmp_path: Path) -> None:
    prompts = ["In the beginning", "And God said", "Behold"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    results = tmp_path / "results.jsonl"
    told = run("batch_job.py", str(tmp_path / "prompts.txt"), str(results))
    assert told.startswith("3 prompts")
    records = [json.loads(line) for line in results.read_text().splitlines()]
    assert [record["prompt"] for record in records] == prompts
    assert all(record["text"] for record in records)


def test_dialogue() -> None:
    said = run("dialogue.py", stdin="Who art thou?\nWhence comest thou?\n").splitlines()
    assert len(said) == 2 and all(line.startswith("> ") for line in said)


def test_summarize(tmp_path: Path) -> None:
    article = tmp_path / "article.txt"
    article.write_text(ARTICLE * 40)  # longer than the context
    assert run("summarize.py", str(article)).strip()


def test_question_answering() -> None:
    told = run("question_answering.py", "Who went up?", "What covered it?").splitlines()
    assert len(told) == 2 and all(line.endswith("nats a token)") for line in told)


def test_rerank() -> None:
    told = run("rerank.py", "In the beginning", "--candidates", "6").splitlines()
    assert told[0] == "--- likeliest ---" and told[4] == "--- most varied ---"
    assert len(told) == 8


@pytest.fixture
def app_url() -> Iterator[str]:
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(EXAMPLES), "fastapi_app:app"]
    with processes.started([*command, "--port", "0"], stderr=subprocess.PIPE) as server:
        assert server.stderr is not None
        for line in server.stderr:
            if found := re.search(r"running on (http://[\d.:]+)", line):
                yield found[1]
                break
        server.terminate()
        said = server.stderr.read()
    assert "Traceback" not in said, said


def test_fastapi_app(app_url: str) -> None:
    with urllib.request.urlopen(f"{app_url}/complete?prompt=In+the&max_new_tokens=8") as answer:
        told = json.load(answer)
    assert told["finish_reason"] == "length" and told["text"]
    with urllib.request.urlopen(f"{app_url}/stream?prompt=In+the&max_new_tokens=8") as answer:
        assert answer.read()
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{app_url}/stream?prompt=In&max_new_tokens=-1")
    with caught.value as error:
        assert error.code == 422 and "max_new_tokens" in error.read().decode()
