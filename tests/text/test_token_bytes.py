"""Single tokens as bytes, and ids as text with special tokens written out, as in transformers."""

from __future__ import annotations

import random
from pathlib import Path

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers

import fastgen
from text_parts import tokenizer_at
from tokenizer_folders import BUNDLED_JSON, EOS, write_bert, write_json, write_sentencepiece


def test_the_bytes_of_a_texts_tokens_are_the_texts() -> None:
    ours = tokenizer_at(fastgen.BUNDLED_MODEL)
    for text in ("don't", "é😀 \n", "你好", f"a{EOS}é", "\0\x7f\u2028\ufffd"):
        [ids] = ours.encode([text])
        assert b"".join(map(ours.token_bytes, ids)) == text.encode()
    assert ours.token_bytes(len(BUNDLED_JSON["model"]["vocab"]) + 7) == b""


def test_single_bytes_of_sentencepieces_byte_fallback(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b"]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>",
                       byte_fallback=True)  # fmt: skip
    library = tokenizers.Tokenizer(model)
    library.normalizer = normalizers.Replace(" ", "▁")
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    library.add_special_tokens(["<unk>", "<s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    ours = tokenizer_at(tmp_path)
    [ids] = ours.encode(["a é😀b"])
    assert b"".join(map(ours.token_bytes, ids)) == "a é😀b".encode()
    for byte in range(256):
        assert ours.token_bytes(2 + byte) == bytes([byte])
    assert ours.token_bytes(1) == b"<s>"


def test_special_tokens_are_written_out_as_in_transformers(tmp_path: Path) -> None:
    rng = random.Random(8)
    for kind, write in (("BertTokenizer", write_bert), ("T5Tokenizer", write_sentencepiece)):
        folder = tmp_path / kind
        folder.mkdir()
        write(folder)
        write_json(folder, "tokenizer_config.json", {"tokenizer_class": kind})
        ours = tokenizer_at(folder)
        theirs = getattr(transformers, kind).from_pretrained(folder)
        special = theirs.all_special_ids
        for _ in range(100):
            ids = [rng.choice([rng.choice(special), rng.randrange(len(theirs))])
                   for _ in range(rng.randrange(9))]  # fmt: skip
            options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
            assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, **options)
        for token_id in special:
            assert ours.token_bytes(token_id).decode() == theirs.decode([token_id])
