"""Every training loss. Logits are [B, T, V], labels [B, T] unshifted with -100 ignored; the shift happens inside.

Token t of a sequence predicts label t + 1. Everything is computed in at least float32 (float64 stays float64).
TSLD: Kim et al., Token-Scaled Logit Distillation, NeurIPS 2023, arXiv 2308.06744.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tsld_fx.config import check_positive
from tsld_fx.distill import DistillConfig
from tsld_fx.errors import ConfigError, DataError, TrainingError
from tsld_fx.layer_losses import attention_distillation, hidden_state_distillation
from tsld_fx.loss_checks import IGNORE, check_labels, check_targets, require_targets


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _check_labels(logits: Tensor, labels: Tensor) -> None:
    check_labels(labels, tuple(logits.shape))


def _check_teacher(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise TrainingError(
            f"student logits {list(student.shape)} and teacher logits {list(teacher.shape)} differ. "
            "Distillation needs a teacher with the student's vocabulary, fed the same batch."
        )


class _SoftCrossEntropy(torch.autograd.Function):
    """Per-token cross-entropy of the student with the teacher's distribution; saves one [.., V] tensor only."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher_probs: Tensor) -> Tensor:
        log_probs = torch.log_softmax(student, dim=-1)
        loss = -torch.linalg.vecdot(teacher_probs, log_probs)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(log_probs.exp_().sub_(teacher_probs))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * grad.unsqueeze(-1), None


def soft_cross_entropy(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """- sum_v softmax(teacher)_v * log_softmax(student)_v for every token, [...] for logits [..., V]."""
    _check_teacher(student_logits, teacher_logits)
    return _SoftCrossEntropy.apply(_wide(student_logits), torch.softmax(_wide(teacher_logits.detach()), dim=-1))


def token_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every token, 0 where the target is -100; [B, T] for logits [B, T, V]."""
    flat = functional.cross_entropy(_wide(logits).flatten(0, 1), targets.flatten(), reduction="none")
    return flat.view_as(targets)


def ground_truth(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy with the next token over the tokens that are not -100.

    Raises:
        DataError: a label outside the vocabulary, or no label left to learn from.
    """
    _check_labels(logits, labels)
    targets = labels[:, 1:]
    count = (targets != IGNORE).sum()
    require_targets(count)
    return token_cross_entropy(logits[:, :-1], targets).sum() / count


def logit_distillation(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 1.0
) -> Tensor:
    """Mean soft cross-entropy over the tokens whose label is not -100, times temperature squared.

    Raises:
        DataError, TrainingError: labels or a teacher that do not fit.
    """
    _check_labels(student_logits, labels)
    _check_teacher(student_logits, teacher_logits)
    valid = labels[:, 1:] != IGNORE
    count = valid.sum()
    require_targets(count)
    student, teacher = student_logits[:, :-1], teacher_logits[:, :-1]
    check_positive("logit_distillation", "temperature", temperature)
    if temperature != 1.0:
        student, teacher = _wide(student) / temperature, _wide(teacher) / temperature
    tokens = soft_cross_entropy(student, teacher).masked_fill(~valid, 0.0)
    return tokens.sum() / count * temperature**2


def token_scales(
    teacher_logits: Tensor, labels: Tensor, temperature: float = 10.0, segment_ids: Tensor | None = None
) -> Tensor:
    """TSLD's weights w_t: softmax over the tokens of a sequence of (teacher's cross-entropy / temperature).

    Args:
        segment_ids: [B, T] integers; tokens with one number are one document, and each document gets a softmax
            of its own. A token belongs to the document of the label that it predicts.

    Returns:
        [B, T - 1], without gradient; every sequence (document) with a valid token sums to 1, the others are 0.
    """
    check_positive("token_scales", "temperature", temperature)
    with torch.no_grad():
        targets = labels[:, 1:]
        scores = token_cross_entropy(teacher_logits[:, :-1], targets)
        segments = None if segment_ids is None else segment_ids[:, 1:]
        return scales_of_scores(scores, targets != IGNORE, temperature, segments)


def scales_of_scores(scores: Tensor, valid: Tensor, temperature: float, segments: Tensor | None = None) -> Tensor:
    """Softmax of scores / temperature over the valid tokens of each sequence, or of each segment of it; else 0.

    Args:
        scores: [B, T] the teacher's cross-entropy of each token.
        valid: [B, T] booleans.
        segments: [B, T] integers, the document that each token counts for.
    """
    scores = (scores / temperature).masked_fill(~valid, float("-inf"))
    if segments is None:
        return _softmax_or_zero(scores)
    lowest = segments.min()
    rows = torch.arange(len(segments), device=segments.device).unsqueeze(1)
    keys = rows * (segments.max() - lowest + 1) + segments - lowest
    document = torch.unique(keys, return_inverse=True)[1].view(-1)
    flat = scores.reshape(-1)
    top = torch.full_like(flat, float("-inf")).scatter_reduce(0, document, flat, "amax")
    grown = torch.exp(flat - top[document]).nan_to_num(nan=0.0)  # -inf - -inf: a document without a valid token
    total = torch.zeros_like(flat).scatter_add(0, document, grown)
    return (grown / total[document].clamp_min(torch.finfo(flat.dtype).tiny)).view_as(scores)


def _softmax_or_zero(scores: Tensor) -> Tensor:
    """Softmax over the last dimension; a line of nothing but -inf gives zeros."""
    return torch.nan_to_num(torch.softmax(scores, dim=-1), nan=0.0)


def token_scaled_logit_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 10.0,
    reduction: str = "sum",
    segment_ids: Tensor | None = None,
) -> Tensor:
    """TSLD: sum over the tokens of each sequence of w_t * soft cross-entropy_t (arXiv 2308.06744, section 4.2, eq. 7).

    Args:
        student_logits, teacher_logits: [B, T, V] over one vocabulary.
        labels: [B, T] unshifted, -100 ignored (also in the softmax over tokens).
        temperature: tau of the softmax over tokens.
        reduction: `sum` over the B sequences (the paper's script) or `mean` over them, where a fully masked
            sequence counts as zero.
        segment_ids: [B, T]; one softmax per packed document (see `token_scales`).

    Raises:
        DataError, TrainingError: labels or a teacher that do not fit.
    """
    if reduction not in ("sum", "mean"):
        raise DataError(f"token_scaled_logit_distillation: reduction={reduction!r} is not 'sum' or 'mean'.")
    _check_labels(student_logits, labels)
    _check_teacher(student_logits, teacher_logits)
    scales = token_scales(teacher_logits, labels, temperature, segment_ids)
    tokens = soft_cross_entropy(student_logits[:, :-1], teacher_logits[:, :-1])
    total = (scales * tokens.masked_fill(scales == 0, 0.0)).sum()
    return total if reduction == "sum" else total / labels.shape[0]


@dataclass(frozen=True)
class FusedLoss:
    """What `fused_head_loss` returns.

    Attributes:
        loss: [] the weighted sum, differentiable.
        terms: value of each loss before its weight, in the order of the objective's terms, without gradient.
        token_scores: [B, T - 1] the teacher's cross-entropy of each token (0 where masked) when it was computed here.
    """

    loss: Tensor
    terms: tuple[tuple[str, Tensor], ...]
    token_scores: Tensor | None


def fused_head_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor,
    distill: DistillConfig | None = None,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    segment_ids: Tensor | None = None,
    token_scores: Tensor | None = None,
    chunk_tokens: int = 0,
) -> FusedLoss:
    """The objective of `distill` from the inputs of both linear heads: logits [B, T, V] never exist as a whole.

    Equal to the functions above on hidden @ weight.t() + bias, values and gradients (with respect to hidden, weight
    and bias; summed over chunks in float32 at least). Under autocast the matrix products run in its dtype. Its
    gradient can be used once: no retain_graph.

    Args:
        hidden: [B, T, H] what the student's head reads.
        weight, bias: [V, H] and [V], the student's head (a quantised weight is passed as such).
        teacher_hidden, teacher_weight, teacher_bias: the same of the teacher, [B, T, H'], [V, H'], [V]; None without.
        labels: [B, T] unshifted, -100 ignored.
        distill: methods gt, logit, logit_gt, tsld, or a list of such terms (default: tsld).
        segment_ids: [B, T]; one softmax over tokens per document.
        token_scores: [B, T - 1] `FusedLoss.token_scores` of an earlier call on this batch: saves a pass over long
            sequences.
        chunk_tokens: tokens per chunk, 0 to choose by memory.

    Raises:
        DataError, TrainingError, ConfigError: labels, a teacher or an objective that do not fit.
    """
    from tsld_fx.fused_loss import objective_of

    terms = (distill or DistillConfig()).terms()
    objective = objective_of(terms)
    if objective is None:
        kinds = ", ".join(term.kind for term in terms)
        raise ConfigError(
            f"fused_head_loss: the losses ({kinds}) need more than the two heads, or soften by several temperatures. "
            "Use the functions of tsld_fx.losses on logits."
        )
    check_labels(labels, (*hidden.shape[:2], weight.shape[0]))
    if not torch.compiler.is_compiling():
        check_targets(labels, weight.shape[0], terms)
    if objective.needs_teacher:
        _check_teacher_head(hidden, weight, teacher_hidden, teacher_weight)
    results = torch.ops.tsld.head_loss(
        hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, labels, segment_ids, token_scores,
        objective.kinds, objective.weights, objective.temperatures, chunk_tokens,
    )  # fmt: skip
    values = tuple((term.kind, value) for term, value in zip(terms, results[1].unbind(), strict=True))
    return FusedLoss(results[0], values, results[2] if results[2].numel() else None)


def _check_teacher_head(hidden: Tensor, weight: Tensor, teacher: Tensor | None, teacher_weight: Tensor | None) -> None:
    if teacher is None or teacher_weight is None:
        raise TrainingError("fused_head_loss: this objective needs teacher_hidden and teacher_weight.")
    if teacher.shape[:2] != hidden.shape[:2] or teacher_weight.shape[0] != weight.shape[0]:
        raise TrainingError(
            f"fused_head_loss: the student's hidden states and head are {list(hidden.shape)} and {list(weight.shape)}, "
            f"the teacher's {list(teacher.shape)} and {list(teacher_weight.shape)}. Both need the same batch and "
            "vocabulary."
        )


__all__ = [
    "IGNORE",
    "FusedLoss",
    "attention_distillation",
    "check_targets",
    "fused_head_loss",
    "ground_truth",
    "hidden_state_distillation",
    "logit_distillation",
    "soft_cross_entropy",
    "token_cross_entropy",
    "token_scaled_logit_distillation",
    "token_scales",
]
