"""What every variant of every Triton kernel takes of a GPU, without one: registers, spills, shared
memory and the width of its loads.

    python benchmarks/kernel_resources.py [--architectures 80 90 100] [--save]

Decoders of GPT-2's shapes, in every dtype and kind of weights and cache, are driven on tensors that
have no memory; whatever they would start is compiled ahead instead. Fails where something spills on
compute capability 9.0, needs more shared memory than the smallest device of 8.x gives, or reads
weights in pieces of less than 16 bytes. The table is written to results/kernel_resources.txt.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from fastgen.kernels import launch
from fastgen.kernels.processing import process, weigh
from fastgen.kernels.sampling import Feedback, sample
from harness import RESULTS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastgen.checkpoints.config import GPT2Config
from fastgen.decoders.cuda.decoder import large_tile
from fastgen.decoders.cuda.inputs import decode_parts, step_inputs
from fastgen.decoders.cuda.model import CudaModel
from fastgen.decoders.cuda.sampler import RING, new_scores, new_table
from fastgen.decoders.interface import Capacity

META = torch.device("meta")
BATCHES, PREFILL, ROWS = (1, 8, 32, 256), 2048, 256
FEW_SPILLED = 32  # bytes: a scalar or two around the loop, as ptxas has it at some sizes
SHARED_LIMITS = {80: 101_376, 90: 232_448, 100: 232_448}  # bytes; 8.6 and 8.9 give less than 8.0
LARGE = 200_704  # bytes for tiles, as decoders have them from 9.0 on
SHAPES = {  # hidden size, heads, vocabulary
    "gpt2": (768, 12, 50257),
    "gpt2-xl": (1600, 25, 50257),
    "odd": (240, 3, 1000),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
SHOWN = ("N", "K", "H", "D", "V", "BM", "BN", "BK", "SPANS", "NORMS", "QUANTIZED", "BY_HEAD")


@dataclass(frozen=True, slots=True)
class Call:
    """A kernel as a decoder would start it; `signature` and `constants` as Triton wants them."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]  # parameters that are multiples of 16
    options: tuple[tuple[str, Any], ...]
    room: int  # bytes for tiles

    @property
    def title(self) -> str:
        constants = dict(self.constants)
        shown = [f"{name}={constants[name]}" for name in SHOWN if name in constants]
        dtype = constants.get("DTYPE")
        return f"{self.kernel[1:]} {dtype or ''} {' '.join(shown)}"


class Recorder:
    """Stands where kernels are started, and writes down what would have been."""

    def __init__(self) -> None:
        self.calls: dict[Call, None] = {}

    def __call__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        settings: launch.Settings,
        arguments: dict[str, Any],
        *,
        num_warps: int = 4,
        num_stages: int = 1,
        fuse: bool = True,
    ) -> None:
        signature, constants, aligned = [], [], []
        values = {**arguments, "PDL": settings.pdl}
        for index, name in enumerate(kernel.arg_names):
            value = values[name]
            if isinstance(value, torch.Tensor):
                signature.append((name, POINTERS[value.dtype]))
                aligned.append(index)
            elif name.isupper() or value is None:
                signature.append((name, "constexpr"))
                constants.append((name, value))
            else:
                signature.append((name, "fp32" if isinstance(value, float) else "i32"))
        options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fuse}
        call = Call(
            kernel.fn.__module__,
            kernel.fn.__name__,
            tuple(signature),
            tuple(constants),
            tuple(aligned),
            tuple(options.items()),
            settings.shared_memory,
        )
        self.calls[call] = None


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def one_layer(config: GPT2Config, dtype: torch.dtype, *, quantized: bool) -> Any:
    """What CudaWeights has, without numbers."""

    def matrix(outputs: int, inputs: int) -> tuple[Any, ...]:
        kept = empty(outputs, inputs, dtype=torch.int8 if quantized else dtype)
        return kept, empty(outputs) if quantized else None

    width, inner = config.hidden_size, config.inner_size
    norm = (empty(width), empty(width), config.layer_norm_epsilon)
    layer = SimpleNamespace(
        ln_1=norm,
        c_attn=(*matrix(3 * width, width), empty(3 * width)),
        c_proj=(*matrix(width, width), empty(width)),
        ln_2=norm,
        c_fc=(*matrix(inner, width), empty(inner)),
        mlp_proj=(*matrix(width, inner), empty(width)),
    )
    head = matrix(config.vocab_size, width)
    return SimpleNamespace(
        layers=[layer],
        ln_f=norm,
        head=head,
        embedding=(*head, empty(width) if quantized else None),
        wpe=empty(config.max_positions, width, dtype=dtype),
    )


def drive(shape: str, settings: launch.Settings, *, quantized: bool, int8_kv: bool) -> None:
    """Steps of several sizes, with every kind of draws."""
    width, heads, vocab_size = SHAPES[shape]
    config = GPT2Config(vocab_size, 1024, width, 1, heads, 4 * width)
    limits = Capacity(64, 32, 1024, 8192, ROWS, ROWS, settings.batch_invariant)
    weights = one_layer(config, settings.dtype, quantized=quantized)
    model = CudaModel(config, weights, settings, limits, META, int8_kv=int8_kv)
    scores, table = new_scores(ROWS, vocab_size, META), new_table(ROWS, vocab_size, META)
    integers = [empty(ROWS, dtype=torch.int32) for _ in range(3)]
    drawn, num_steps = empty(RING, ROWS, dtype=torch.int32), empty(1, dtype=torch.int32)
    for count in BATCHES:
        parts = on_meta(decode_parts(count, 32, 0))
        model.forward(step_inputs(parts, 0, 1), scores, table.last_drawn, num_steps)
        process(settings, scores, parts["seats"], table, count)
        weigh(settings, scores, parts["seats"], table, count)
        for samples, processes in product((False, True), repeat=2):
            feedback = Feedback(drawn, num_steps, *integers)
            kind = {"samples": samples, "processes": processes}
            sample(settings, feedback, parts["seats"], table, scores, count, **kind)
    parts = on_meta(decode_parts(PREFILL, 32, 0))
    parts["logits_at"] = parts["logits_at"][:8]
    for name in ("rows", "starts"):
        parts[f"large_{name}"] = parts[f"small_{name}"]
    inputs = step_inputs(parts, large_tile(config, settings), 1)
    model.forward(inputs, scores, table.last_drawn, num_steps)


def on_meta(parts: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(part).to(META) for name, part in parts.items()}


def variants() -> Iterator[tuple[str, launch.Settings, dict[str, bool]]]:
    """(shape, settings, kinds); odd sizes without what only changes the speed."""
    kinds = [(False, False), (True, False), (False, True), (True, True)]  # weights, cache
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for quantized, int8_kv in kinds if dtype == torch.bfloat16 else kinds[::3]:
            own = {"quantized": quantized, "int8_kv": int8_kv}
            yield "gpt2", launch.Settings(dtype), own
            yield "odd", launch.Settings(dtype), own
    plain = {"quantized": False, "int8_kv": False}
    yield "gpt2", launch.Settings(torch.bfloat16, batch_invariant=True), plain
    yield "gpt2", launch.Settings(torch.float32, batch_invariant=True), plain
    yield "gpt2", launch.Settings(torch.float32, tf32=True), plain
    yield "gpt2-xl", launch.Settings(torch.bfloat16), plain
    for quantized, int8_kv in kinds:
        own = {"quantized": quantized, "int8_kv": int8_kv}
        yield "gpt2", launch.Settings(torch.bfloat16, shared_memory=LARGE), own


def recorded() -> list[Call]:
    recorder, modules = Recorder(), set()
    for name, module in sys.modules.items():
        if name.startswith("fastgen.kernels.") and getattr(module, "run", None) is launch.run:
            modules.add(module)
    for module in modules:
        module.run = recorder
    for shape, settings, kinds in variants():
        drive(shape, settings, **kinds)
    for module in modules:
        module.run = launch.run
    return list(recorder.calls)


def compiled(call: Call, architecture: int) -> dict[str, Any]:
    """A line of the table. From 9.0 on with programmatic dependent launch, as decoders have it."""
    constants, options = dict(call.constants), dict(call.options)
    if architecture >= 90:
        constants["PDL"] = options["launch_pdl"] = True
    kernel = getattr(sys.modules[call.module], call.kernel)
    source = ASTSource(
        kernel,
        dict(call.signature),
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {(index,): [["tt.divisibility", 16]] for index in call.aligned},
    )
    target = GPUTarget("cuda", architecture, 32)
    binary = triton.compile(source, target=target, options=options)
    registers, stack = resource_usage(binary.asm["cubin"])
    return {
        "architecture": architecture,
        "kernel": call.title,
        "registers": registers,
        "stack": stack,
        "shared": binary.metadata.shared,
        "narrow": narrow_copies(binary.asm["ptx"], constants.get("NORMS", False)),
        "instructions": instructions(binary.asm["ptx"]),
    }


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack (spills) of a thread, as NVIDIA's own tool reads them."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tools / "cuobjdump", "--dump-resource-usage", file.name]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", shown)
    assert found, shown
    return int(found[1]), int(found[2])


def narrow_copies(ptx: str, norms: bool) -> int:
    """Copies into shared memory, which is where panels of products go, below 16 bytes; not those
    of a norm's gain and bias, of which each thread has one or two numbers."""
    sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?\], (0x[0-9a-f]+|\d+)", ptx)
    return sum(int(size, 0) < 16 and not (norms and int(size, 0) <= 8) for size in sizes)


def instructions(ptx: str) -> str:
    names = {
        "wgmma": "wgmma.mma_async",
        "mma": "mma.sync",
        "cp.async": "cp.async.c",
        "v4": "v4.b32",
    }
    counts = {name: ptx.count(text) for name, text in names.items()}
    return " ".join(f"{name}:{count}" for name, count in counts.items() if count)


def faults(line: dict[str, Any]) -> list[str]:
    found = []
    if line["architecture"] == 90 and line["stack"] > FEW_SPILLED:
        found.append(f"spills {line['stack']} bytes")
    if line["shared"] > SHARED_LIMITS[line["architecture"]]:
        found.append(f"needs {line['shared']} bytes of shared memory")
    wants_wide = " K=768 " in line["kernel"] or " K=3072 " in line["kernel"]
    if wants_wide and line["narrow"]:
        found.append(f"{line['narrow']} copies below 16 bytes")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = list(SHARED_LIMITS)
    parser.add_argument("--architectures", type=int, nargs="+", default=known, choices=known)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    if launch.INTERPRETED:
        parser.error("nothing is compiled with TRITON_INTERPRET=1: unset it")
    calls = recorded()
    tasks = [
        (call, architecture)
        for architecture in options.architectures
        for call in calls
        if architecture >= 90 or call.room <= launch.SHARED_MEMORY
    ]
    with ProcessPoolExecutor() as pool:
        lines = list(pool.map(compiled, *zip(*tasks, strict=True), chunksize=4))
    table = [f"triton {triton.__version__}; shared memory in bytes, stack is what spills"]
    table.append(f"{'sm':>3} {'regs':>4} {'stack':>5} {'shared':>6}  kernel  [instructions]")
    wrong = []
    for line in lines:
        shown = (
            "{architecture:>3} {registers:>4} {stack:>5} {shared:>6}  {kernel}  [{instructions}]"
        )
        table.append(shown.format(**line))
        wrong += [f"sm_{line['architecture']} {line['kernel']}: {f}" for f in faults(line)]
    text = "\n".join(table) + "\n"
    print(text)
    if options.save:
        (RESULTS / "kernel_resources.txt").write_text(text)
    print("\n".join(wrong), file=sys.stderr)
    print(f"{len(lines)} compiled, {len(wrong)} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
