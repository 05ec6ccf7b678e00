"""The text of the demo model: documents, novels, their tokens, and the tokenizer."""

from __future__ import annotations

import argparse
import json
import lzma
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END = "<|endoftext|>"  # id 0: before, between and after documents
VOCABULARY = 2048
Splits = dict[str, dict[str, str]]  # split -> document name -> text


def read_splits(path: Path | None) -> Splits:
    """The demo's documents by split; from `path` if it exists, else from this Python's library."""
    if path and path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    from tsld_fx.demo.text import load_splits

    splits = {split: {d.name: d.text for d in documents} for split, documents in load_splits().items()}
    if path:
        path.write_text(json.dumps(splits, ensure_ascii=False, indent=0), encoding="utf-8")
    return splits


def read_books(corpus: Path) -> list[str]:
    with (lzma.open if corpus.suffix == ".xz" else open)(corpus, "rt", encoding="utf-8") as file:
        return [book.strip() for book in file.read().split(END)]


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """(n,) int64: END before each text and after the last."""
    ids = chain.from_iterable([0, *encoding.ids] for encoding in tokenizer.encode_batch_fast(texts))
    return np.fromiter(chain(ids, [0]), dtype=np.int64)


def read_tokens(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The novels as (n,) int64 on the device, and the last one, held out, as (m,) int64."""
    if args.tokens and args.tokens.exists():
        stored = np.load(args.tokens)
        train, held_out = stored["train"], stored["held_out"]
    else:
        tokenizer, books = load_tokenizer(args.out), read_books(args.corpus)
        train, held_out = (encode(tokenizer, part).astype(np.uint16) for part in (books[:-1], books[-1:]))
        if args.tokens:
            np.savez_compressed(args.tokens, train=train, held_out=held_out)
    print(f"novels: {len(train):,} tokens, and {len(held_out):,} held out", flush=True)
    train, held_out = (torch.from_numpy(part.astype(np.int64)).to(args.device) for part in (train, held_out))
    return train, held_out


@contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """A scratch folder; what it holds at the end moves into `folder`, each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as scratch:
        yield Path(scratch)
        for path in sorted(Path(scratch).iterdir()):
            path.chmod(0o644)
            os.replace(path, folder / path.name)


def make_tokenizer(out: Path, documents: dict[str, str], books: list[str]) -> None:
    """Trains on all train documents and, from the middle of each book, 40 % as many characters in all."""
    share = int(0.4 * sum(map(len, documents.values())) / len(books))
    slices = [book[len(book) // 2 :][:share] for book in books]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([*documents.values(), *slices], trainer)
    settings = {
        "backend": "tokenizers",
        "bos_token": END,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "model_max_length": 512,
        "tokenizer_class": "TokenizersBackend",
    }
    with whole_files(out) as scratch:
        tokenizer.save(str(scratch / "tokenizer.json"))
        (scratch / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    for name, text in (("documents", "\n".join(documents.values())), ("novels", "\n".join(slices))):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text, name
        print(f"tokenizer: {len(text.encode()) / len(ids):.2f} bytes per token of {name}", flush=True)


def load_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))
