"""How well a model answers: perplexity of the right answers, and accuracy where there are choices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from transformers import PreTrainedModel

from tsld_fx.errors import DataError
from tsld_fx.losses import token_cross_entropy
from tsld_fx.prepared_inputs import check_tokens
from tsld_fx.settings import RunSettings
from tsld_fx.task_data import AnswerSamples, Encoded, Example, collate, encode, encode_all, read_examples


@dataclass(frozen=True)
class TaskScore:
    """Result on one task file.

    Attributes:
        perplexity: exp of the mean negative log-likelihood (nats) of the right answers' tokens, end token included.
        loss, tokens: that mean, and how many tokens it is over.
        accuracy: share of the examples whose right answer has the highest total log-likelihood among the choices;
            None where no example has choices.
        chance: accuracy of guessing, mean of 1 / choices; None likewise.
        examples: examples scored.
    """

    perplexity: float
    loss: float
    tokens: int
    accuracy: float | None
    chance: float | None
    examples: int


def score_task(
    model: nn.Module,
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    block_size: int = 512,
    batch_size: int = 16,
    progress: str | None = None,
) -> TaskScore:
    """Score a model on prompts and answers.

    Args:
        model: called with input_ids and attention_mask [B, T]; returns `.logits`.
        block_size: examples of more tokens are left out, with a warning.

    Raises:
        DataError: no example fits, or no batch does.
    """
    if batch_size < 1:
        raise DataError(f"scoring: batch_size={batch_size} must be at least 1.")
    answers = encode_all(examples, tokenizer, block_size, "scoring")
    kept = [e for e in examples if encode(e.prompt, e.answer, tokenizer).ids.numel() <= block_size]
    wrong = [[c for c in e.choices if c != e.answer] for e in kept]
    others = [encode(e.prompt, c, tokenizer) for e, choices in zip(kept, wrong, strict=True) for c in choices]
    likelihoods = _log_likelihoods(model, [*answers, *others], batch_size, progress)
    right, rest = likelihoods[: len(answers)], likelihoods[len(answers) :].split([len(w) for w in wrong])
    tokens = sum(_answer_tokens(one) for one in answers)
    loss = -float(right.sum()) / tokens
    closed = [i for i, w in enumerate(wrong) if w]
    accuracy = chance = None
    if closed:
        accuracy = sum(bool((right[i] > rest[i]).all()) for i in closed) / len(closed)
        chance = sum(1 / (1 + len(wrong[i])) for i in closed) / len(closed)
    return TaskScore(math.exp(min(loss, 700.0)), loss, tokens, accuracy, chance, len(answers))


def _answer_tokens(one: Encoded) -> int:
    return one.ids.numel() - max(one.prompt, 1)


@torch.no_grad()
def _log_likelihoods(model: nn.Module, encoded: Sequence[Encoded], batch_size: int, progress: str | None) -> Tensor:
    """Total log-likelihood of each answer, float64 on the CPU, in the order given."""
    device = next(model.parameters()).device
    order = sorted(range(len(encoded)), key=lambda i: encoded[i].ids.numel())  # little padding
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    found = torch.zeros(len(encoded), dtype=torch.float64)
    training = model.training
    model.eval()
    try:
        for chosen in track(batches, progress or "", disable=progress is None, transient=True):
            samples = AnswerSamples([encoded[i] for i in chosen], 0)
            batch = {k: v.to(device) for k, v in collate([samples[i] for i in range(len(samples))]).items()}
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            losses = token_cross_entropy(logits[:, :-1], batch["labels"][:, 1:])
            found[torch.tensor(chosen)] = -losses.double().sum(1).cpu()
    finally:
        model.train(training)
    return found


class TaskRun:
    """The task files of a run: samples to train on, scores to report."""

    collator = staticmethod(collate)

    def __init__(self, settings: RunSettings, tokenizer: Any) -> None:
        self.settings, self.tokenizer = settings, tokenizer
        self._examples, self._samples = dict[str, list[Example]](), dict[str, AnswerSamples]()

    def examples(self, split: str) -> list[Example]:
        """The examples of a split, read once; empty where it has no files."""
        if split not in self._examples:
            sources = getattr(self.settings.data, split)
            self._examples[split] = read_examples(sources, self.tokenizer) if sources else []
        return self._examples[split]

    def check(self, model: PreTrainedModel) -> None:
        """Read and encode all of it, so that what cannot be used is refused before anything is written.

        Raises:
            TsldError: a bad line, examples that are all too long, another vocabulary.
        """
        for split in ("train", "validation", "test"):
            samples = self.blocks(split) or ()
            for index in range(len(samples)):
                check_tokens(samples[index]["input_ids"], model)

    def blocks(self, split: str, segments: bool = False) -> AnswerSamples | None:
        """The samples of a split; None where it has no files."""
        examples, data = self.examples(split), self.settings.data
        if not examples:
            return None
        if split not in self._samples:
            encoded = encode_all(examples, self.tokenizer, data.block_size, split)
            self._samples[split] = AnswerSamples(encoded, data.block_size, data.packing)
        return self._samples[split]

    def score(self, split: str, model: PreTrainedModel, progress: str | None) -> dict[str, float]:
        """{split: perplexity of the answers}, with {split}_accuracy where there are choices."""
        examples = self.examples(split)
        if not examples:
            return {}
        found = score_task(model, examples, self.tokenizer, block_size=self.settings.data.block_size, progress=progress)
        accuracy = {} if found.accuracy is None else {f"{split}_accuracy": found.accuracy}
        return {split: found.perplexity, **accuracy}
