"""The training objective as a function of two models' outputs, on whole logits or from the fused operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tsld_fx import losses
from tsld_fx.distill import DistillConfig
from tsld_fx.errors import DataError
from tsld_fx.fused_loss import GROUND_TRUTH, HeadLoss, objective_of
from tsld_fx.fused_loss_chunks import Objective
from tsld_fx.prepared import PreparedModel
from tsld_fx.prepared_state import HeadInput, PreparedOutput


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
    segments = segments_of(config, segment_ids)
    total, parts = torch.zeros((), device=labels.device), dict[str, Tensor]()
    for term in config.terms():
        if term.kind == "gt":
            value = losses.ground_truth(student.logits, labels)
        elif term.kind == "logit":
            value = losses.logit_distillation(student.logits, teacher.logits, labels, term.temperature or 1.0)
        elif term.kind == "tsld":
            value = losses.token_scaled_logit_distillation(
                student.logits, teacher.logits, labels, term.temperature or 10.0, term.reduction, segments
            )
        elif term.kind == "hidden":
            value = losses.hidden_state_distillation(student.hidden_states, teacher.hidden_states, attention_mask)
        else:
            value = losses.attention_distillation(student.attention_scores, teacher.attention_scores, attention_mask)
        parts[f"loss_{term.kind}"] = value.detach()
        total = total + term.weight * value
    return total, parts


def fused_objective(config: DistillConfig, student: PreparedModel, teacher: PreparedModel | None) -> Objective | None:
    """The objective in the form of tsld::head_loss; None where the losses need whole logits.

    They do with fused=False, for losses over inner values, and for a model whose logits are not the plain result of a
    linear head.
    """
    found = objective_of(config.terms()) if config.fused else None
    if found is None or not student.fuse_head_loss(found):
        return None
    return found if teacher is None or teacher.fuse_head_loss(GROUND_TRUTH) else None


def head_loss(
    config: DistillConfig,
    objective: Objective,
    vocabulary: int,
    taught: HeadInput | None,
    labels: Tensor,
    segment_ids: Tensor | None = None,
) -> HeadLoss:
    """What the student's fused operator reads of one micro-batch.

    Args:
        vocabulary: rows of the head's weight.
        taught: the input of the teacher's head, and the head; None for `gt`.
        labels: [B, T] unshifted, -100 ignored.

    Raises:
        DataError: labels or segment ids that do not fit. On a GPU labels are not looked at, which would wait for it: a
            label outside the vocabulary makes the loss NaN there.
    """
    segments = segments_of(config, segment_ids)
    if not labels.is_cuda:
        losses.check_targets(labels, vocabulary, config.terms())
    if taught is None:
        return HeadLoss(objective, labels)
    return HeadLoss(objective, labels, taught.hidden, taught.weight.detach(), taught.bias, segments)


def fused_terms(config: DistillConfig, outputs: PreparedOutput) -> tuple[Tensor, dict[str, Tensor]]:
    """The result of the fused operator in the form of `objective`'s."""
    assert outputs.loss is not None and outputs.loss_terms is not None
    values = outputs.loss_terms.detach().unbind()
    return outputs.loss, {f"loss_{t.kind}": value for t, value in zip(config.terms(), values, strict=True)}


def segments_of(config: DistillConfig, segment_ids: Tensor | None) -> Tensor | None:
    """The documents that token scales tell apart, if they do.

    Raises:
        DataError: they should, and the batch does not say where documents end.
    """
    if not config.separate_documents:
        return None
    if segment_ids is None and any(term.kind == "tsld" for term in config.terms()):
        raise DataError(
            "DistillConfig(separate_documents=True) needs `segment_ids` [B, T] in every batch. "
            "Add the column to the data set, or set separate_documents=False."
        )
    return segment_ids


def learnable(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Labels [B, T] with -100 on padding and on the first token after it: nothing to learn of it, nor from it."""
    if attention_mask is None:
        return labels
    padding = attention_mask == 0
    after = torch.nn.functional.pad(padding[:, :-1], (1, 0))
    return labels.masked_fill(padding | after, losses.IGNORE)
