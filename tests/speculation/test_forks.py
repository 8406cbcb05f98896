"""Draft models in forked children. frontends/test_fork.py has the model's own part."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import fastgen
from fastgen.native import native
from tiny_checkpoints import run_python

HELPERS = Path(__file__).parents[1] / "helpers"
PROMPT = "And it came to pass"

pytestmark = [
    pytest.mark.skipif(native is None, reason="the torch decoder does not survive a fork"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
]

_BEGIN = """
import os, sys
sys.path.insert(0, sys.argv[1])
from forked import in_child
import fastgen
OPTIONS = {"temperature": 0, "max_new_tokens": 20}

def text(model):
    return model(sys.argv[3], **OPTIONS)
"""
STORIES = {
    "that survives": """
from drafters import drafted_by
model = fastgen.load(decoder="cpu", draft_model=fastgen.BUNDLED_MODEL)
[_, drafter] = model.engine.drafting.drafters

def guesses():
    accepted = model.engine.stats.accepted_tokens
    found = text(model)
    return found if model.engine.stats.accepted_tokens > accepted else None

with drafted_by(model.engine, drafter):
    assert guesses() == sys.argv[2]
    pieces = model.stream(sys.argv[3], **OPTIONS)
    begun = "".join(str(next(pieces)) for _ in range(5))
    in_child(lambda: guesses() and begun + "".join(map(str, pieces)))
    assert begun + "".join(map(str, pieces)) == sys.argv[2] == guesses()
""",
    "that only the parent can run": """
from fastgen.decoders.plan import LoadOptions
from fastgen.decoders.select import build_decoder, plan_decoder
from fastgen.frontends.generator import open_model
from fastgen.speculation.draft_model import DraftModelDrafter
model, checkpoint = fastgen.load(decoder="cpu", speculate="off"), open_model()
options = LoadOptions(decoder="torch", max_batch_size=4)
drafter = DraftModelDrafter(build_decoder(checkpoint, plan_decoder(checkpoint, options)))
model.engine.drafting.use([drafter])
pieces = model.stream(sys.argv[3], **OPTIONS)
begun = "".join(str(next(pieces)) for _ in range(5))
assert model.engine.stats.drafted_tokens > 0

def without():
    asked = []
    drafter.propose = drafter.ended = drafter.close = lambda *given: asked.append(given)
    found, again = begun + "".join(map(str, pieces)), text(model)
    model.close()
    return found if found == again and not asked else None

in_child(without)
assert begun + "".join(map(str, pieces)) == sys.argv[2] == text(model)
""",
}


@pytest.mark.parametrize("story", STORIES)
def test_a_fork_with_a_draft_model(story: str) -> None:
    with fastgen.load(decoder="cpu", speculate="off") as model:
        wanted = model(PROMPT, temperature=0, max_new_tokens=20)
    run_python(_BEGIN + STORIES[story], HELPERS, wanted, PROMPT)
