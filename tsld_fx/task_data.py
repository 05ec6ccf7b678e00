"""Prompts with answers: JSON Lines in, samples whose loss counts the answer's tokens only, accuracy out."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from tsld_fx.errors import ConfigError, DataError
from tsld_fx.losses import IGNORE

logger = logging.getLogger(__name__)
_FIELDS = ("prompt", "answer", "choices", "messages")


@dataclass(frozen=True)
class Example:
    """One line of a task file.

    Attributes:
        prompt, answer: text; the model reads them joined as they are, so an answer starts with its own space.
        choices: every answer that counts as one, with `answer` among them; empty for free answers.
        place: file and line.
    """

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    place: str = ""


def is_task_file(source: str) -> bool:
    """Whether a source of a run is a file of prompts and answers."""
    return source.endswith(".jsonl")


def holds_tasks(sources: Sequence[str]) -> bool:
    """Whether a split's sources are task files.

    Raises:
        ConfigError: some are and some are not.
    """
    kinds = {is_task_file(source) for source in sources}
    if len(kinds) > 1:
        raise ConfigError(
            f"data: {', '.join(sources)} mix task files (.jsonl) with text. Use one kind per run: text is trained on "
            "whole, task files on their answers."
        )
    return kinds == {True}


def read_examples(sources: str | Sequence[str], tokenizer: Any = None) -> list[Example]:
    """The examples of JSON Lines files.

    Each line is an object with `prompt` and `answer` (and optionally `choices`, a list that holds the answer), or with
    `messages`, a list of {"role", "content"} whose last one is the assistant's answer.

    Args:
        tokenizer: its chat template writes `messages` out; not needed for prompts and answers.

    Raises:
        DataError: no such file, or a line that is no example; it gives file and line.
    """
    names = [sources] if isinstance(sources, str) else list(sources)
    found = [example for name in names for example in _read_file(Path(name), tokenizer)]
    if not found:
        raise DataError(f"{', '.join(names)}: no examples. Write one JSON object with prompt and answer per line.")
    return found


def _read_file(path: Path, tokenizer: Any) -> Iterable[Example]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}. Give a JSON Lines file of prompts and answers.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}). Write the file as UTF-8.") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _parse(line, f"{path}:{number}", tokenizer)


def _parse(line: str, place: str, tokenizer: Any) -> Example:
    def refuse(what: str) -> DataError:
        return DataError(f'{place}: {what}. Expected {{"prompt": "...", "answer": "..."}} on one line.')

    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise refuse(f"not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise refuse(f"a JSON {type(row).__name__}, not an object")
    if "messages" in row:
        return _conversation(row["messages"], place, tokenizer)
    for name in ("prompt", "answer"):
        if not isinstance(row.get(name), str):
            known = ", ".join(map(repr, row)) or "none"
            raise refuse(f"'{name}' is missing or no text (the fields are {known})")
    if not row["answer"].strip():
        raise refuse("the answer is empty")
    choices = row.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise refuse("'choices' is no list of texts")
    if choices and (row["answer"] not in choices or len(set(choices)) < max(len(choices), 2)):
        raise refuse(f"'choices' {choices} must hold the answer {row['answer']!r} and another one, each once")
    return Example(row["prompt"], row["answer"], tuple(choices), place)


def _conversation(messages: Any, place: str, tokenizer: Any) -> Example:
    good = isinstance(messages, list) and len(messages) > 1
    good = good and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages)
    if not good or messages[-1]["role"] != "assistant" or not str(messages[-1]["content"]).strip():
        raise DataError(
            f"{place}: 'messages' must be a list of {{role, content}} that ends with the assistant's answer."
        )
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            f"{place}: 'messages' need a tokenizer with a chat template, and this model's has none. "
            "Write the conversation out as prompt and answer."
        )
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    return Example(prompt, str(messages[-1]["content"]), (), place)


@dataclass(frozen=True)
class Encoded:
    """Token numbers of one example: `ids` int64 [n], of which the first `prompt` belong to the prompt."""

    ids: Tensor
    prompt: int


def encode(prompt: str, answer: str, tokenizer: Any) -> Encoded:
    """Prompt, answer and the end token; the two texts are tokenised apart, so that the border is the same for every
    answer."""
    first, second = (tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"] for t in (prompt, answer))
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return Encoded(torch.tensor(first + second + end, dtype=torch.long), len(first))


def encode_all(examples: Sequence[Example], tokenizer: Any, block_size: int, what: str) -> list[Encoded]:
    """Every example that fits; the others are left out with one warning.

    Raises:
        DataError: none fits.
    """
    encoded = [encode(e.prompt, e.answer, tokenizer) for e in examples]
    long = [e.place for e, c in zip(examples, encoded, strict=True) if c.ids.numel() > block_size]
    if len(long) == len(examples):
        raise DataError(
            f"{what}: every example is longer than block_size={block_size} tokens (first {long[0]}). Raise block_size."
        )
    if long:
        logger.warning(
            "%s: %d of %d examples are longer than block_size=%d tokens and are left out (first %s).",
            what, len(long), len(examples), block_size, long[0],
        )  # fmt: skip
    return [c for c in encoded if c.ids.numel() <= block_size]


class AnswerSamples(Dataset[dict[str, Tensor]]):
    """Examples as training samples.

    Items: `input_ids`, `labels` (-100 on the prompt and on a sample's first token) and `segment_ids`, int64 [n] each.
    One example per sample; with `packing`, as many as fit into `block_size`, in order, each with a segment number of
    its own and with `position_ids` from 0. Attention still reaches back to earlier examples of a sample.
    """

    def __init__(self, encoded: Sequence[Encoded], block_size: int, packing: bool = False) -> None:
        self.packing = packing
        self.samples: list[list[Encoded]] = []
        used = 0
        for one in encoded:
            if not packing or not self.samples or used + one.ids.numel() > block_size:
                self.samples.append([])
                used = 0
            self.samples[-1].append(one)
            used += one.ids.numel()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        parts = self.samples[index]
        labels = []
        for one in parts:
            kept = one.ids.clone()
            kept[: max(one.prompt, 1)] = IGNORE
            labels.append(kept)
        item = {
            "input_ids": torch.cat([one.ids for one in parts]),
            "labels": torch.cat(labels),
            "segment_ids": torch.cat([torch.full_like(one.ids, n) for n, one in enumerate(parts)]),
        }
        if self.packing:
            item["position_ids"] = torch.cat([torch.arange(one.ids.numel()) for one in parts])
        return item


def collate(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Samples of several lengths as one batch, padded on the right, with an attention_mask [B, T]."""
    fill = {"input_ids": 0, "labels": IGNORE, "segment_ids": -1, "position_ids": 0}
    batch = {
        name: pad_sequence([s[name] for s in samples], batch_first=True, padding_value=value)
        for name, value in fill.items()
        if name in samples[0]
    }
    lengths = torch.tensor([s["input_ids"].numel() for s in samples])
    batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths.unsqueeze(1)).long()
    return batch
