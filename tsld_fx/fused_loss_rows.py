"""Row-wise half of the fused head loss: losses of a chunk of logits, and their gradient in place of the logits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tsld_fx.loss_checks import IGNORE


@dataclass(frozen=True)
class RowLosses:
    """Per-row losses, float32 (float64 for float64 logits), 0 where they do not apply.

    Attributes:
        hard: cross-entropy with the target, 0 where it is -100, NaN where it is outside the vocabulary.
        soft: soft cross-entropy with the teacher.
        hot: soft cross-entropy of both at the softening temperature.
    """

    hard: Tensor
    soft: Tensor | None = None
    hot: Tensor | None = None


@dataclass(frozen=True)
class RowWeights:
    """What one unit of a row's loss adds to the objective, [rows]; None leaves a loss out.

    Attributes:
        hard, soft, hot: of the losses in `RowLosses`.
        temperature: of `hot`.
    """

    hard: Tensor | None = None
    soft: Tensor | None = None
    hot: Tensor | None = None
    temperature: float = 1.0


@dataclass(frozen=True)
class TopRows:
    """The top of a teacher's distribution (see `top_logits.TopLogits`): [rows, k], [rows, k] and [rows]."""

    indices: Tensor
    log_probs: Tensor
    rest: Tensor

    def part(self, here: slice) -> TopRows:
        """Some of the rows."""
        return TopRows(self.indices[here], self.log_probs[here], self.rest[here])


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that losses are computed in: float32, or float64 kept."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def _on_triton(logits: Tensor) -> bool:
    return logits.is_cuda and logits.dtype != torch.float64 and _has_triton()


def cross_entropy_rows(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every row of [rows, V] logits with its target (see `RowLosses.hard`)."""
    if _on_triton(logits):
        from tsld_fx.fused_loss_triton import cross_entropy_rows as kernel

        return kernel(logits, targets)
    return hard_loss(wide(logits), targets)[0]


def hard_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, log of the partition function and the targets as valid indices."""
    size = logits.shape[-1]
    partition = torch.logsumexp(logits, dim=-1)
    index = targets.clamp(0, size - 1)
    loss = partition - logits.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    outside = (targets >= size) | ((targets < 0) & (targets != IGNORE))
    loss = loss.masked_fill(targets == IGNORE, 0.0).masked_fill(outside, float("nan"))
    return loss, partition, index


def loss_rows(
    student: Tensor, teacher: Tensor | TopRows | None, targets: Tensor, weights: RowWeights, gradient: bool
) -> RowLosses:
    """Losses of a chunk; with `gradient` the student's logits are overwritten by the objective's gradient.

    Args:
        student, teacher: [rows, V] logits, rows may be strided; teacher is None without soft losses, and may be the
            top of its distribution.
        targets: [rows] int64, -100 ignored.
        weights: of the rows.
    """
    if isinstance(teacher, TopRows):
        from tsld_fx.top_logits import loss_rows_of_top

        return loss_rows_of_top(student, teacher, targets, weights, gradient)
    if _on_triton(student) and (teacher is None or teacher.dtype != torch.float64):
        from tsld_fx.fused_loss_triton import loss_rows as kernel

        return kernel(student, teacher, targets, weights, gradient)
    ours = wide(student)
    hard, partition, index = hard_loss(ours, targets)
    soft = hot = change = None
    if gradient:
        factor = sum(w for w in (weights.hard, weights.soft) if w is not None)
        change = (ours - partition.unsqueeze(-1)).exp_()
        change.mul_(factor.unsqueeze(-1) if isinstance(factor, Tensor) else 0.0)
    if weights.soft is not None:
        assert teacher is not None
        expected = torch.softmax(wide(teacher).to(ours.dtype), dim=-1)
        soft = partition - torch.linalg.vecdot(expected, ours)
        if change is not None:
            change.sub_(expected.mul_(weights.soft.unsqueeze(-1)))
    if weights.hot is not None:
        assert teacher is not None
        expected = torch.softmax(wide(teacher).to(ours.dtype) / weights.temperature, dim=-1)
        log_probs = torch.log_softmax(ours / weights.temperature, dim=-1)
        hot = -torch.linalg.vecdot(expected, log_probs)
        if change is not None:
            change.add_(log_probs.exp_().sub_(expected).mul_((weights.hot / weights.temperature).unsqueeze(-1)))
    if change is not None:
        if weights.hard is not None:
            change.scatter_add_(-1, index.unsqueeze(-1), -weights.hard.unsqueeze(-1))
        student.copy_(change)
    return RowLosses(hard, soft, hot)
