"""Every training loss. Logits are [B, T, V], labels [B, T] unshifted with -100 ignored; the shift happens inside.

Token t of a sequence predicts label t + 1. Everything is computed in at least float32 (float64 stays float64).
TSLD: Kim et al., Token-Scaled Logit Distillation, NeurIPS 2023, arXiv 2308.06744.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tsld_fx.errors import DataError, TrainingError

IGNORE = -100


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _check_labels(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise DataError(
            f"logits {list(logits.shape)} and labels {list(labels.shape)} do not fit: logits are "
            "[batch, tokens, vocabulary] and labels [batch, tokens], unshifted."
        )
    if torch.compiler.is_compiling():
        return
    wrong = (labels != IGNORE) & ((labels < 0) | (labels >= logits.shape[-1]))
    if bool(wrong.any()):
        row, token = (int(i) for i in wrong.nonzero()[0])
        raise DataError(
            f"labels[{row}, {token}] = {int(labels[row, token])} is outside the vocabulary of {logits.shape[-1]} "
            "tokens. Tokenise with the model's own tokenizer, or mark ignored positions with -100."
        )


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
    _require_targets(count)
    return token_cross_entropy(logits[:, :-1], targets).sum() / count


def _require_targets(count: Tensor) -> None:
    if not torch.compiler.is_compiling() and not int(count):
        raise DataError(
            "every label of this batch is -100 after the shift: there is nothing to learn from. "
            "Check the masking of prompts and padding, or drop such samples."
        )


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
    _require_targets(count)
    student, teacher = student_logits[:, :-1], teacher_logits[:, :-1]
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
    with torch.no_grad():
        targets = labels[:, 1:]
        valid = targets != IGNORE
        scores = token_cross_entropy(teacher_logits[:, :-1], targets) / temperature
        scores = scores.masked_fill(~valid, float("-inf"))
        if segment_ids is None:
            return _softmax_or_zero(scores)
        segments = segment_ids[:, 1:]
        scales = torch.zeros_like(scores)
        for number in segments.unique():
            here = segments == number
            scales = torch.where(here, _softmax_or_zero(scores.masked_fill(~here, float("-inf"))), scales)
        return scales


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


def hidden_state_distillation(
    student: Sequence[Tensor], teacher: Sequence[Tensor], attention_mask: Tensor | None
) -> Tensor:
    """Sum over layers of the mean squared error of hidden states [B, T, H] over the tokens that are attended."""
    _check_layers("hidden states", student, teacher)
    total = torch.zeros((), device=student[0].device)
    for ours, theirs in zip(student, teacher, strict=True):
        error = (_wide(ours) - _wide(theirs.detach())).square().mean(-1)
        total = total + _masked_mean(error, attention_mask)
    return total


def attention_distillation(
    student: Sequence[Tensor], teacher: Sequence[Tensor], attention_mask: Tensor | None
) -> Tensor:
    """Sum over layers of the mean squared error of attention scores [B, heads, T, T] before the softmax.

    Only the causal part between attended tokens counts.
    """
    _check_layers("attention scores", student, teacher)
    tokens = student[0].shape[-1]
    allowed = torch.ones(tokens, tokens, dtype=torch.bool, device=student[0].device).tril()
    allowed = allowed.expand(student[0].shape[0], 1, tokens, tokens)
    if attention_mask is not None:
        keep = attention_mask.bool()
        allowed = allowed & keep[:, None, None, :] & keep[:, None, :, None]
    total = torch.zeros((), device=student[0].device)
    for ours, theirs in zip(student, teacher, strict=True):
        error = (_wide(ours) - _wide(theirs.detach())).masked_fill(~allowed, 0.0).square()
        total = total + error.sum() / (allowed.sum() * ours.shape[1]).clamp_min(1)
    return total


def _masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean()
    keep = mask.bool()
    return values.masked_fill(~keep, 0.0).sum() / keep.sum().clamp_min(1)


def _check_layers(what: str, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    if not student or len(student) != len(teacher):
        raise TrainingError(
            f"layer-to-layer distillation: the student gives {len(student)} {what}, the teacher {len(teacher)}. "
            "Both need the same number of layers and the taps of DistillConfig(method='l2l')."
        )
    for layer, (ours, theirs) in enumerate(zip(student, teacher, strict=True)):
        if ours.shape != theirs.shape:
            raise TrainingError(
                f"layer-to-layer distillation: {what} of layer {layer} are {list(ours.shape)} in the student and "
                f"{list(theirs.shape)} in the teacher. Use a teacher of the student's architecture, or method='tsld'."
            )
