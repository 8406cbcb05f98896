"""The rooms of fastgen/: which may import which, and the order of the modules within each.

CONTRIBUTING.md shows this table; test_imports.py holds the code and that page to it.
"""

from __future__ import annotations

from typing import NamedTuple


class Room(NamedTuple):
    """`imports`: the rooms it may import. `order`: its modules from low to high, a word each;
    a module imports modules of its room from lower lines only."""

    name: str
    imports: str
    order: tuple[str, ...]


ROOMS = (
    Room("words", "", ("__init__ errors native results", "checks")),
    Room(
        "sampling",
        "words",
        (
            "draw option_checks philox",
            "options",
            "params",
            "filters native_sampler processors",
            "definition history torch_filters",
            "torch_processors",
            "torch_sampler",
        ),
    ),
    Room(
        "checkpoints",
        "words",
        ("config identity", "files", "packed tensor_names", "checkpoint", "in_memory"),
    ),
    Room(
        "text",
        "words checkpoints",
        (
            "detokenizer tokenizer_files",
            "backends special_tokens",
            "tokenizer_classes",
            "tokenizer",
        ),
    ),
    Room(
        "decoders",
        "words sampling checkpoints kernels",
        (
            "machine memory pack_cache quantization cpu cuda torch",
            "cpu.packing interface torch.weights",
            "plan torch.attention cuda.sampler cuda.weights",
            "cpu.decoder cpu.weights torch.decoder cuda.model",
            "cuda.inputs",
            "cuda.graphs",
            "cuda.decoder",
            "cpu.plan torch.plan",
            "cuda.plan",
            "select",
            "installed",
        ),
    ),
    Room(
        "speculation",
        "words sampling checkpoints decoders",
        (
            "costs drafter suffix_automaton",
            "acceptance draft_model lengths suffix",
            "choose",
        ),
    ),
    Room(
        "engine",
        "words sampling text decoders speculation",
        (
            "blocks interrupts request_limits step_lock",
            "leases",
            "schedule_state",
            "request_checks requests",
            "forks inbox queue",
            "scheduler",
            "drafting outputs pause stats",
            "hand_out",
            "engine",
        ),
    ),
    Room(
        "frontends",
        "words sampling checkpoints text decoders speculation engine",
        (
            "closing fair_lock prompts ranking scoring",
            "codec stream",
            "jobs",
            "generator",
            "engine_thread pack",
            "facade",
            "async_engine threaded_engine",
        ),
    ),
    Room(
        "hf",
        "words sampling checkpoints decoders speculation engine",
        (
            "checksums functions gradients kv_rows not_native stop_strings streamers tracing",
            "cache modules options",
            "packing",
            "assistants forward",
            "sampling",
            "beams",
            "model",
        ),
    ),
    Room(
        "server",
        "words sampling text engine frontends",
        (
            "limits",
            "errors logprobs metrics openai_values",
            "cors",
            "bodies protocol service streaming",
            "completions",
            "calls schema",
            "endpoints scoring tokens",
            "app",
            "run",
            "command",
        ),
    ),
    Room(
        "bench",
        "words sampling checkpoints decoders speculation engine frontends",
        (
            "fallbacks interleave machine peer_process plain_checkpoint plot recording shapes"
            " table",
            "compare peaks roofline",
            "cuda_peaks",
            "hardware_peaks",
            "measure",
            "run",
            "command",
        ),
    ),
    Room(
        "front door",
        "words sampling checkpoints text decoders speculation engine frontends hf server bench",
        ("cache_info", "cli", "__main__"),
    ),
)
BY_NAME = {room.name: room for room in ROOMS}


def room_of(module: str) -> Room | None:
    """The room of a module (its name within fastgen), if it has one."""
    first = module.partition(".")[0]
    if first in BY_NAME:
        return BY_NAME[first]
    rooms = (BY_NAME["words"], BY_NAME["front door"])  # their modules stand in fastgen/ itself
    return next((room for room in rooms if _rank(room, module)), None)


def floor_of(module: str) -> int:
    """Its place in the order of its room, from 1; 0 for the room itself, and where it has none."""
    room = room_of(module)
    return 0 if room is None else _rank(room, module.removeprefix(f"{room.name}."))


def may_import(module: str, other: str) -> bool:
    """Whether one module of fastgen may import another."""
    room, others = room_of(module), room_of(other)
    if room is None or others is None:
        return False
    if room is others:
        return floor_of(other) < floor_of(module)
    return others.name in room.imports.split()


def as_text() -> str:
    """The rules between rooms as CONTRIBUTING.md shows them."""
    width = max(len(room.name) for room in ROOMS)
    return "\n".join(
        f"    {room.name:{width}} -> {room.imports.replace(' ', ', ') or 'nothing of fastgen'}"
        for room in reversed(ROOMS)
    )


def _rank(room: Room, name: str) -> int:
    found = [number for number, line in enumerate(room.order, 1) if name in line.split()]
    return found[0] if found else 0
