"""Other engines' n-gram speculation, as subjects of speculation_runs.py."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from speculation_runs import Cases, Pair, Turn
from speculation_tasks import NEW, Case

from fastgen.bench.peer_process import PeerError, PeerProcess, start

# Modules of peers/, and how many tokens each drafts: as its documentation has it; llama.cpp's has
# 10, and 2 for CPUs.
PEERS = {"transformers_lookup": (10,), "llama_cpp_lookup": (2, 10)}


@dataclass
class Peer:
    """One that may draft so many tokens; 0: none. Its tokens may change with that: it rounds."""

    name: str
    process: PeerProcess
    num_drafts: int
    exact = False

    def take(self, cases: Cases, plain: Turn | None) -> Turn:
        [case] = cases  # they speculate one row at a time
        biases = list(case.options.get("sequence_bias", {}).items())
        made = self.process.generate([case.prompt], NEW, num_drafts=self.num_drafts, biases=biases)
        return Turn(made.ids, made.seconds)


def peer_pairs(
    peer: str, pythons: Mapping[str, str], stack: ExitStack, trial: Case, **job: Any
) -> list[Pair] | str:
    """The peer, without speculation and with, in a process that ends with `stack`; or why not.

    Each has made `trial` once: a build may hold instructions that the machine does not have.
    """
    fields = {"device": "cpu", "batch": 1, "load": {}, "exact": False, **job}
    process = stack.enter_context(start(peer, pythons, **fields))
    if "version" not in process.ready:
        kind, what = next(iter(process.ready.items()))
        return f"{kind}: {what}"
    baseline = Peer(f"{peer} without", process, 0)
    pairs = [Pair(baseline, Peer(f"{peer} {count}", process, count)) for count in PEERS[peer]]
    try:
        for subject in (baseline, *(pair.subject for pair in pairs)):
            subject.take([trial], None)
    except PeerError as error:
        return f"failed: {error}"
    return pairs
