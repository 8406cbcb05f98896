"""Train the model in fastgen/bundled/: a small GPT-2, from the King James Bible (public domain).

    apt-get install bible-kjv
    python tools/train_bundled_model.py OUT [--minutes 75] [--threads 2]

Needs PyTorch, transformers and tokenizers, and the `bible` command of Debian's package bible-kjv
for the text. Writes a checkpoint folder (float16) to OUT, and the held-out chapters, every 20th
one, beside it as OUT/held_out.txt. Windows have 256 tokens but start at a random position, so that
all 1024 positions are trained.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

VOCAB_SIZE, MAX_POSITIONS, WINDOW, BATCH = 4096, 1024, 256, 16
HELD_OUT_EVERY = 20  # chapters
EVALUATE_EVERY = 250  # steps
END = "<|endoftext|>"

# The abbreviations that `bible` prints, in the order of the books.
BOOKS = {
    "Ge": "Genesis", "Exo": "Exodus", "Lev": "Leviticus", "Num": "Numbers", "Deu": "Deuteronomy",
    "Josh": "Joshua", "Jdgs": "Judges", "Ruth": "Ruth", "1Sm": "1 Samuel", "2Sm": "2 Samuel",
    "1Ki": "1 Kings", "2Ki": "2 Kings", "1Chr": "1 Chronicles", "2Chr": "2 Chronicles",
    "Ezra": "Ezra", "Neh": "Nehemiah", "Est": "Esther", "Job": "Job", "Psa": "Psalm",
    "Prv": "Proverbs", "Eccl": "Ecclesiastes", "SSol": "Song of Solomon", "Isa": "Isaiah",
    "Jer": "Jeremiah", "Lam": "Lamentations", "Eze": "Ezekiel", "Dan": "Daniel", "Hos": "Hosea",
    "Joel": "Joel", "Amos": "Amos", "Obad": "Obadiah", "Jonah": "Jonah", "Mic": "Micah",
    "Nahum": "Nahum", "Hab": "Habakkuk", "Zep": "Zephaniah", "Hag": "Haggai", "Zec": "Zechariah",
    "Mal": "Malachi", "Mat": "Matthew", "Mark": "Mark", "Luke": "Luke", "John": "John",
    "Acts": "Acts", "Rom": "Romans", "1Cor": "1 Corinthians", "2Cor": "2 Corinthians",
    "Gal": "Galatians", "Eph": "Ephesians", "Phi": "Philippians", "Col": "Colossians",
    "1Th": "1 Thessalonians", "2Th": "2 Thessalonians", "1Tim": "1 Timothy", "2Tim": "2 Timothy",
    "Titus": "Titus", "Phmn": "Philemon", "Heb": "Hebrews", "Jas": "James", "1Pet": "1 Peter",
    "2Pet": "2 Peter", "1Jn": "1 John", "2Jn": "2 John", "3Jn": "3 John", "Jude": "Jude",
    "Rev": "Revelation",
}  # fmt: skip


def read_chapters() -> list[str]:
    """One string a chapter: a heading, then a verse a line."""
    command = ["bible", "-f", "Gen1:1-Rev22:21"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    chapters: dict[str, list[str]] = {}
    for line in printed.splitlines():
        match = re.match(r"(\d?[A-Za-z]+)(\d+):\d+ (.*)", line)
        if match is None:
            raise ValueError(f"not a verse: {line!r}")
        book, chapter, verse = match.groups()
        chapters.setdefault(f"{BOOKS[book]} {chapter}", []).append(verse.strip())
    return ["\n".join([heading, *verses]) + "\n" for heading, verses in chapters.items()]


def train_tokenizer(chapters: list[str]) -> Tokenizer:
    """GPT-2's own kind, byte-level BPE, with a small vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chapters, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, chapters: list[str]) -> torch.Tensor:
    """All chapters in one row of ids, END before each."""
    end = tokenizer.token_to_id(END)
    encoded = tokenizer.encode_batch(chapters)
    return torch.tensor([token_id for item in encoded for token_id in (end, *item.ids)])


def new_model(end_id: int) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=MAX_POSITIONS,
        n_embd=256,
        n_layer=6,
        n_head=4,
        bos_token_id=end_id,
        eos_token_id=end_id,
    )
    return GPT2LMHeadModel(config)


def new_optimizer(model: GPT2LMHeadModel) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))


@torch.inference_mode()
def mean_loss(model: GPT2LMHeadModel, ids: torch.Tensor) -> float:
    """Nats a token, over windows that do not overlap."""
    model.eval()
    windows = ids[: len(ids) // (WINDOW + 1) * (WINDOW + 1)].view(-1, WINDOW + 1)
    losses = [F.cross_entropy(model(w[None, :-1]).logits[0], w[1:]).item() for w in windows]
    model.train()
    return sum(losses) / len(losses)


def learning_rate(step: int, done: float) -> float:
    """Warm-up over 100 steps, then a cosine down to a twentieth; `done` is a share of the time."""
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return 1.5e-3 * min(1.0, (step + 1) / 100) * (0.05 + 0.95 * cosine)


def train_step(
    model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer, ids: torch.Tensor
) -> float:
    starts = torch.randint(len(ids) - WINDOW - 1, (BATCH,))
    windows = torch.stack([ids[start : start + WINDOW + 1] for start in starts])
    positions = torch.randint(MAX_POSITIONS - WINDOW + 1, (BATCH, 1)) + torch.arange(WINDOW)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(windows[:, :-1], position_ids=positions).logits
    loss = F.cross_entropy(logits.float().reshape(-1, VOCAB_SIZE), windows[:, 1:].reshape(-1))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def train(
    model: GPT2LMHeadModel, train_ids: torch.Tensor, held_ids: torch.Tensor, minutes: float
) -> int:
    """Train for so long, and leave the model at its best held-out loss; the number of steps."""
    optimizer = new_optimizer(model)
    start, step = time.monotonic(), 0
    best, best_state = math.inf, model.state_dict()
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, done)
        loss = train_step(model, optimizer, train_ids)
        step += 1
        if step % EVALUATE_EVERY == 0:
            held = mean_loss(model, held_ids)
            print(f"step {step}, {done:.0%}: loss {loss:.3f}, held out {held:.3f}", flush=True)
            if held < best:
                best = held
                best_state = {name: t.clone() for name, t in model.state_dict().items()}
    model.load_state_dict(best_state)
    return step


def save(model: GPT2LMHeadModel, tokenizer: Tokenizer, held_out: list[str], folder: Path) -> None:
    model.half().save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=MAX_POSITIONS
    ).save_pretrained(folder)
    (folder / "held_out.txt").write_text(END.join(held_out))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled model.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=75)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)

    chapters = read_chapters()
    held_out = chapters[::HELD_OUT_EVERY]
    kept = [chapter for index, chapter in enumerate(chapters) if index % HELD_OUT_EVERY]
    tokenizer = train_tokenizer(kept)
    train_ids, held_ids = encode(tokenizer, kept), encode(tokenizer, held_out)
    model = new_model(tokenizer.token_to_id(END))
    print(f"{len(train_ids)} training tokens, {len(held_ids)} held out", flush=True)
    steps = train(model, train_ids, held_ids, arguments.minutes)
    loss = mean_loss(model, held_ids)
    save(model, tokenizer, held_out, arguments.out)
    print(json.dumps({"steps": steps, "held_out_loss": loss, "minutes": arguments.minutes}))


if __name__ == "__main__":
    main()
