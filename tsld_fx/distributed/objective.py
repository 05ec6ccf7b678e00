"""The training objective as a function of two models' outputs, for the processes that hold the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tsld_fx import losses
from tsld_fx.distill import DistillConfig
from tsld_fx.errors import DataError


def objective(
    config: DistillConfig,
    student: Any,
    teacher: Any,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of a configuration's losses on one micro-batch, as in TSLDTrainer.

    Args:
        student, teacher: have `.logits` [B, T, V], and the taps that the method needs. None for `gt`.
        labels: [B, T] unshifted, -100 ignored.

    Returns:
        The total and each term by its log name (`loss_tsld`), detached.

    Raises:
        DataError, TrainingError: labels or a teacher that do not fit.
    """
    scaled = any(term.kind == "tsld" for term in config.terms())
    if config.separate_documents and scaled and segment_ids is None:
        raise DataError(
            "DistillConfig(separate_documents=True) needs `segment_ids` [B, T] in every batch. "
            "Add the column to the data set, or set separate_documents=False."
        )
    total, parts = torch.zeros((), device=labels.device), dict[str, Tensor]()
    for term in config.terms():
        if term.kind == "gt":
            value = losses.ground_truth(student.logits, labels)
        elif term.kind == "logit":
            value = losses.logit_distillation(student.logits, teacher.logits, labels, term.temperature or 1.0)
        elif term.kind == "tsld":
            value = losses.token_scaled_logit_distillation(
                student.logits, teacher.logits, labels, term.temperature or 10.0, term.reduction,
                segment_ids if config.separate_documents else None,
            )  # fmt: skip
        elif term.kind == "hidden":
            value = losses.hidden_state_distillation(student.hidden_states, teacher.hidden_states, attention_mask)
        else:
            value = losses.attention_distillation(student.attention_scores, teacher.attention_scores, attention_mask)
        parts[f"loss_{term.kind}"] = value.detach()
        total = total + term.weight * value
    return total, parts


def learnable(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Labels [B, T] with -100 on padding and on the first token after it: nothing to learn of it, nor from it."""
    if attention_mask is None:
        return labels
    padding = attention_mask == 0
    after = torch.nn.functional.pad(padding[:, :-1], (1, 0))
    return labels.masked_fill(padding | after, losses.IGNORE)
