"""What type checkers say of programs with the drop-in: only what transformers causes."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

import processes

ROOT = Path(__file__).parents[2]
IMPORT = "from fastgen import GPT2LMHeadModel"
PROGRAM = f"""
import torch
import transformers
{IMPORT}

model = GPT2LMHeadModel.from_pretrained("gpt2", dtype=torch.float32)
made = GPT2LMHeadModel(transformers.GPT2Config())
ids = torch.tensor([[1, 2]])
mask = torch.ones_like(ids)
print(model.generate(ids, max_length=50, do_sample=True, num_return_sequences=5)[0])
print(model.generate(input_ids=ids, attention_mask=mask)[:, 2:].tolist())
print(model.generate(**{{"input_ids": ids, "attention_mask": mask}}))
print(model(ids, labels=ids).loss.item(), model.forward(ids).logits.shape)
again: GPT2LMHeadModel = GPT2LMHeadModel.from_pretrained("gpt2")
plain: transformers.PreTrainedModel = model
module: torch.nn.Module = made
"""
WRONG = f"""
{IMPORT}

path: int = GPT2LMHeadModel.from_pretrained("gpt2").last_path
"""


def _pages() -> str:
    found = ["import fastgen  # the programs of the pages, one after another"]
    for page in ("README.md", "docs/transformers.md"):
        text = (ROOT / page).read_text()
        found += re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return "\n".join(found)


@pytest.mark.slow
def test_programs_pass_mypy_strict(tmp_path: Path) -> None:
    """As a program's own check reads an installed package: without its errors, but by its types."""
    programs = {"program": PROGRAM, "pages": _pages(), "wrong": WRONG}
    for name, text in programs.items():
        assert IMPORT in text
        (tmp_path / f"{name}.py").write_text(text)
        theirs = text.replace(IMPORT, IMPORT.replace("fastgen", "transformers"))
        (tmp_path / f"{name}_theirs.py").write_text(theirs)
    strict = ("-m", "mypy", "--config-file=", "--strict", "--follow-imports=silent")
    process = processes.run(
        [sys.executable, *strict, f"--cache-dir={tmp_path / 'cache'}", "."],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
    )
    errors: dict[str, set[str]] = {}
    for line in process.stdout.splitlines():
        if match := re.match(r"(\w+)\.py:(\d+: error: .*)", line):
            errors.setdefault(match[1], set()).add(match[2])
    for name in ("program", "pages"):
        assert errors.get(name, set()) <= errors.get(f"{name}_theirs", set()), process.stdout
    assert "[assignment]" in str(errors["wrong"])  # the types are there
