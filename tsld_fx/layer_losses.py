"""Layer-to-layer losses: mean squared errors of hidden states and attention scores, taken from the graphs' taps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tsld_fx.errors import TrainingError


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


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
