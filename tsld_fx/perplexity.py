"""Perplexity of a causal language model on a token stream."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.progress import track
from torch import Tensor, nn

from tsld_fx.errors import DataError
from tsld_fx.losses import IGNORE, token_cross_entropy
from tsld_fx.prepared_inputs import check_tokens


@dataclass(frozen=True)
class Perplexity:
    """Result of an evaluation: exp of the mean negative log-likelihood (nats) over the scored tokens."""

    perplexity: float
    loss: float
    tokens: int


def perplexity(
    model: nn.Module,
    tokens: Tensor,
    length: int,
    *,
    stride: int | None = None,
    batch_size: int = 8,
    progress: str | None = None,
) -> Perplexity:
    """Score a stream in windows of `length` tokens.

    Args:
        model: called with input_ids [B, T]; returns `.logits`.
        tokens: int64 [N].
        stride: None cuts the stream into windows that do not overlap (every token but the first of a window is
            scored); a number moves the window by that many tokens and scores only those that are new in it, so that
            each has at least length - stride tokens of context.
        batch_size: windows per forward pass.
        progress: text of a progress bar; None shows none.

    Raises:
        DataError: fewer than two tokens, windows of fewer than two, a stride outside [1, length], or tokens that
            the model does not have.
    """
    if length < 2:
        raise DataError(f"perplexity: windows need at least 2 tokens, got length={length}.")
    if tokens.numel() < 2:
        raise DataError(f"perplexity needs at least two tokens, got {tokens.numel()}. Give more text.")
    if stride is not None and not 1 <= stride <= length:
        raise DataError(f"stride={stride} must be between 1 and the window's length {length}.")
    check_stream(tokens, model)
    if batch_size < 1:
        raise DataError(f"perplexity: batch_size={batch_size} must be at least 1.")
    device = next(model.parameters()).device
    batches = list(windows(tokens, length, stride or length, batch_size, overlap=stride is not None))
    total, count = torch.zeros((), dtype=torch.float64), 0
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for ids, labels in track(batches, progress or "", disable=progress is None, transient=True):
                logits = model(input_ids=ids.to(device)).logits
                total += token_cross_entropy(logits[:, :-1], labels[:, 1:].to(device)).double().sum().cpu()
                count += int((labels[:, 1:] != IGNORE).sum())
    finally:
        model.train(training)
    loss = float(total) / count
    return Perplexity(math.exp(min(loss, 700.0)), loss, count)


def check_stream(tokens: Tensor, model: nn.Module) -> None:
    """Refuse what is no stream [N] of token numbers that the model has.

    Raises:
        DataError: it gives the shape, or the token and the vocabulary.
    """
    if tokens.ndim != 1:
        raise DataError(f"a text is one stream of token numbers [N], got {list(tokens.shape)}. Flatten it.")
    check_tokens(tokens, model)


def windows(
    tokens: Tensor, length: int, stride: int, batch_size: int, overlap: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (input_ids, labels) of windows of one length; the shorter last window comes alone."""
    group: list[tuple[Tensor, Tensor]] = []
    scored = 0
    for start in range(0, tokens.numel() - 1, stride):
        window = tokens[start : start + length]
        labels = window.clone()
        if overlap:
            labels[: max(scored - start, 0)] = IGNORE
        scored = start + window.numel()
        if window.numel() < 2:
            break
        if group and (len(group) == batch_size or window.numel() != group[0][0].numel()):
            yield torch.stack([w for w, _ in group]), torch.stack([x for _, x in group])
            group = []
        group.append((window, labels))
        if overlap and scored >= tokens.numel():
            break
    if group:
        yield torch.stack([w for w, _ in group]), torch.stack([x for _, x in group])
