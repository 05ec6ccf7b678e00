"""Text in, blocks of tokens out: files, folders, `datasets` names and the embedded demo text."""

from __future__ import annotations

import lzma
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tsld_fx.errors import DataError
from tsld_fx.task_data import is_task_file

DEMO = "demo"
_TEXT_FILES = (".txt", ".xz", ".md", ".json", ".csv")


def read_documents(source: str | Sequence[str], split: str = "train") -> list[str]:
    """The documents of one split.

    Args:
        source: `demo` (the embedded text), paths of .txt / .txt.xz files (one document each), or the name of a data
            set for `datasets.load_dataset`: `name`, `name:configuration`, or a local folder in the hub's layout.
        split: the split of a data set or of the demo; files are read whole whatever it says.

    Raises:
        DataError: nothing there, not text, or empty.
    """
    sources = [source] if isinstance(source, str) else list(source)
    documents = [text for one in sources for text in _read(one, split)]
    if not any(text.strip() for text in documents):
        raise DataError(f"{', '.join(sources)}: the text is empty (split {split!r}). Give files with text in them.")
    return documents


def _read(source: str, split: str) -> list[str]:
    if source == DEMO:
        from tsld_fx.demo.text import load_splits

        splits = load_splits()
        if split not in splits:
            raise DataError(f"{DEMO}: no split {split!r}. It has {', '.join(splits)}.")
        return [document.text for document in splits[split]]
    path = Path(source)
    if is_task_file(source):
        raise DataError(f"{source}: a file of prompts and answers; this wants plain text. Give a .txt file.")
    if path.is_file():
        return [_read_file(path)]
    if path.suffix in _TEXT_FILES and not path.exists():
        raise DataError(f"{source}: no such file. Give an existing text file, a data set's name, or '{DEMO}'.")
    return _read_dataset(source, split)


def _read_file(path: Path) -> str:
    try:
        if path.suffix == ".xz":
            with lzma.open(path, "rt", encoding="utf-8") as stream:
                text = stream.read()
        else:
            text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise DataError(f"{path}: not UTF-8 text ({error}). Give plain text files, or .txt.xz.") from None
    if not text.strip():
        raise DataError(f"{path}: the file is empty. Give a file with text in it.")
    return text


def _read_dataset(source: str, split: str) -> list[str]:
    from datasets import load_dataset

    name, _, configuration = source.partition(":")
    try:
        rows = load_dataset(name, configuration or None, split=split)
    except Exception as error:
        raise DataError(
            f"{source}: neither a file nor a data set that can be loaded ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}). Give an existing path, or name:configuration."
        ) from None
    column = "text" if "text" in rows.column_names else None
    if column is None:
        raise DataError(f"{source}: no column 'text'; it has {', '.join(rows.column_names)}. Write it to text files.")
    return ["".join(_with_newline(text) for text in rows[column])]


def _with_newline(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"


def tokenize(documents: Sequence[str], tokenizer: Any) -> Tensor:
    """All documents as one int64 stream [tokens], each followed by the end-of-text token if there is one and if
    there are several documents."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None and len(documents) > 1 else []
    stream: list[int] = []
    for text in documents:
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end
    return torch.tensor(stream, dtype=torch.long)


class TokenBlocks(Dataset[dict[str, Tensor]]):
    """A token stream cut into blocks of equal length; the tail that fills no block is left out.

    Items: `input_ids` and `labels` [block_size], and `segment_ids` [block_size] when an end token is given: the
    number of the document within the block that each token belongs to.

    Raises:
        DataError: the stream is shorter than one block.
    """

    def __init__(self, tokens: Tensor, block_size: int, end_token: int | None = None) -> None:
        count = tokens.numel() // block_size
        if count == 0:
            raise DataError(
                f"the text has {tokens.numel()} tokens, less than one block of {block_size}. "
                "Give more text or a smaller block size."
            )
        self.blocks = tokens[: count * block_size].view(count, block_size)
        self.end_token = end_token

    def __len__(self) -> int:
        return self.blocks.shape[0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block = self.blocks[index]
        item = {"input_ids": block, "labels": block.clone()}
        if self.end_token is not None:
            ended = (block == self.end_token).long()
            item["segment_ids"] = ended.cumsum(0) - ended  # the end token belongs to the document that it ends
        return item
