"""Labels that a loss cannot use are refused here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tsld_fx.distill import LossTerm
from tsld_fx.errors import DataError

IGNORE = -100


def check_labels(labels: Tensor, logits_shape: tuple[int, ...]) -> None:
    """Refuse labels that do not fit logits of [B, T, V].

    Raises:
        DataError: it gives the shapes, or the label outside the vocabulary.
    """
    if len(logits_shape) != 3 or tuple(labels.shape) != logits_shape[:2]:
        raise DataError(
            f"logits {list(logits_shape)} and labels {list(labels.shape)} do not fit: logits are "
            "[batch, tokens, vocabulary] and labels [batch, tokens], unshifted."
        )
    if not torch.compiler.is_compiling():
        _check_vocabulary(labels, logits_shape[-1])


def _check_vocabulary(labels: Tensor, vocabulary: int) -> None:
    if labels.is_floating_point():
        raise DataError(f"labels are {labels.dtype}; they are token numbers, int64. Call .long() on them.")
    wrong = (labels != IGNORE) & ((labels < 0) | (labels >= vocabulary))
    if bool(wrong.any()):
        row, token = (int(i) for i in wrong.nonzero()[0])
        raise DataError(
            f"labels[{row}, {token}] = {int(labels[row, token])} is outside the vocabulary of {vocabulary} "
            "tokens. Tokenise with the model's own tokenizer, or mark ignored positions with -100."
        )


def check_targets(labels: Tensor, vocabulary: int, terms: Sequence[LossTerm]) -> None:
    """Refuse labels [B, T] outside the vocabulary, and a batch with no label left where a term is a mean over them.

    Raises:
        DataError: it says which.
    """
    _check_vocabulary(labels, vocabulary)
    if any(term.kind in ("gt", "logit") for term in terms):
        require_targets((labels[:, 1:] != IGNORE).sum())


def require_targets(count: Tensor) -> None:
    """Refuse a batch without a label to learn from (a wait for the device).

    Raises:
        DataError: there is none.
    """
    if not torch.compiler.is_compiling() and not int(count):
        raise DataError(
            "every label of this batch is -100 after the shift: there is nothing to learn from. "
            "Check the masking of prompts and padding, or drop such samples."
        )
