"""The teacher's confidence against TSLD's token scales: one line per token (arXiv 2308.06744, section 4)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tsld_fx import losses


@dataclass(frozen=True)
class TokenTable:
    """Every predicted token; all columns are flat tensors of one length.

    Attributes:
        sequence, position: where it stands; position t predicts token t + 1.
        target: the token to predict.
        confidence: the teacher's highest probability.
        probability: the teacher's probability of the target.
        teacher_loss, student_loss: cross-entropy with the target, nats.
        divergence: KL(teacher || student), nats.
        scale: TSLD's weight of the token times the number of tokens of its sequence: 1 means that it counts as in
            a plain mean.
        agree: whether student and teacher have the same most likely token.
    """

    sequence: Tensor
    position: Tensor
    target: Tensor
    confidence: Tensor
    probability: Tensor
    teacher_loss: Tensor
    student_loss: Tensor
    divergence: Tensor
    scale: Tensor
    agree: Tensor

    def rows(self) -> list[dict[str, Any]]:
        """One mapping per token, as `tokens.csv` has them."""
        columns = {name: getattr(self, name).tolist() for name in self.__dataclass_fields__}
        return [dict(zip(columns, line, strict=True)) for line in zip(*columns.values(), strict=True)]

    def by_confidence(self, bins: int = 10) -> list[dict[str, float]]:
        """Means over equal steps of the teacher's confidence; empty steps are left out."""
        made = []
        for index in range(bins):
            low, high = index / bins, (index + 1) / bins
            here = (self.confidence >= low) & ((self.confidence < high) | (index == bins - 1))
            if bool(here.any()):
                names = ("scale", "divergence", "teacher_loss", "student_loss")
                means = {name: float(getattr(self, name)[here].mean()) for name in names}
                made.append({"confidence": (low + high) / 2, "tokens": int(here.sum()), **means})
        return made


@torch.no_grad()
def token_table(
    teacher: PreTrainedModel, student: PreTrainedModel, batches: Iterable[Tensor], temperature: float = 10.0
) -> TokenTable:
    """Score every token with both models.

    Args:
        batches: token numbers [B, T].
        temperature: tau of the token scales.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in TokenTable.__dataclass_fields__}
    seen = 0
    for ids in batches:
        theirs = teacher(input_ids=ids, use_cache=False).logits.float()
        ours = student(input_ids=ids, use_cache=False).logits.float()
        scales = losses.token_scales(theirs, ids, temperature) * (ids.shape[1] - 1)
        wide, narrow = theirs[:, :-1].log_softmax(-1), ours[:, :-1].log_softmax(-1)
        target = ids[:, 1:]
        rows, steps = torch.meshgrid(*(torch.arange(n) for n in target.shape), indexing="ij")
        found = {
            "sequence": rows + seen,
            "position": steps,
            "target": target,
            "confidence": wide.amax(-1).exp(),
            "probability": wide.gather(-1, target.unsqueeze(-1)).squeeze(-1).exp(),
            "teacher_loss": -wide.gather(-1, target.unsqueeze(-1)).squeeze(-1),
            "student_loss": -narrow.gather(-1, target.unsqueeze(-1)).squeeze(-1),
            "divergence": (wide.exp() * (wide - narrow)).sum(-1),
            "scale": scales,
            "agree": wide.argmax(-1) == narrow.argmax(-1),
        }
        for name, value in found.items():
            parts[name].append(value.flatten().cpu())
        seen += ids.shape[0]
    return TokenTable(**{name: torch.cat(values) for name, values in parts.items()})


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's correlation of two vectors; equal values share their mean rank."""
    ranks = []
    for values in (x, y):
        _, place, counts = values.unique(return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum(0) - (counts - 1) / 2).double()[place])
    centred = [r - r.mean() for r in ranks]
    norm = centred[0].norm() * centred[1].norm()
    return float((centred[0] @ centred[1]) / norm) if float(norm) else 0.0
