"""A teacher's distribution as its k most likely tokens and the probability of all others together.

The soft cross-entropy with it takes "all others" as one outcome:

    sum_k p_k * (log Z - z_k) + r * (log Z - logsumexp over the others of z),    r = 1 - sum_k p_k

Its gradient with respect to a logit is q - p for a kept token and q * (1 - r / q_rest) for another one, where q is the
student's distribution: the others keep the student's proportions and are pulled towards the mass r together. Against
the whole distribution the gradient of a token is off by at most 2 r in the L1 norm, and the loss is too low by the
cross-entropy within the others, at most r * max_others(-log(q / q_rest)).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tsld_fx.fused_loss_chunks import Head, chunk_tokens
from tsld_fx.fused_loss_rows import RowLosses, RowWeights, TopRows, cross_entropy_rows, hard_loss, wide
from tsld_fx.loss_checks import IGNORE

_SLICE = 256  # rows whose probabilities are held in float32 at a time


@dataclass(frozen=True)
class TopLogits:
    """What is kept of a teacher's logits.

    Attributes:
        indices: int32 [B, T, k], the most likely tokens, in no order that counts.
        log_probs: float16 [B, T, k], their log-probabilities.
        rest: float32 [B, T], the probability of all other tokens.
        scores: float32 [B, T - 1], the cross-entropy of the next token, from the whole logits; 0 where masked.
    """

    indices: Tensor
    log_probs: Tensor
    rest: Tensor
    scores: Tensor


def top_of_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, count: int) -> TopLogits:
    """Run a head over chunks of tokens and keep the `count` most likely ones of each; under autocast in its dtype.

    Args:
        hidden: [B, T, H]; weight, bias: [V, H] and [V] or None.
        labels: [B, T] unshifted, -100 ignored.
    """
    device = hidden.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    rows, tokens = labels.numel(), labels.shape[1]
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE).reshape(-1)
    indices = torch.empty(rows, count, dtype=torch.int32, device=hidden.device)
    log_probs = torch.empty(rows, count, dtype=torch.float16, device=hidden.device)
    rest, scores = (torch.empty(rows, dtype=torch.float32, device=hidden.device) for _ in range(2))
    with torch.no_grad(), torch.autocast(device, enabled=False):
        head = Head(hidden, weight, bias, None if hidden.dtype == torch.float64 else low)
        step = min(_SLICE, chunk_tokens(weight.shape[0], head.dtype))
        for start in range(0, rows, step):
            here = slice(start, min(start + step, rows))
            logits = head.logits(here)
            partition = torch.logsumexp(wide(logits), dim=-1, keepdim=True)
            top = logits.topk(count, dim=-1)
            found = wide(top.values) - partition
            indices[here], log_probs[here] = top.indices.int(), found.half()
            rest[here] = (1 - found.exp().sum(-1)).clamp_min(0) if count < weight.shape[0] else 0.0
            scores[here] = cross_entropy_rows(logits, targets[here]).float()
    shape = labels.shape
    return TopLogits(
        indices.view(*shape, count),
        log_probs.view(*shape, count),
        rest.view(shape),
        scores.view(shape)[:, : tokens - 1].contiguous(),
    )


def loss_rows_of_top(student: Tensor, top: TopRows, targets: Tensor, weights: RowWeights, gradient: bool) -> RowLosses:
    """`loss_rows` with a teacher of which the top is known; some rows at a time, to hold little beside the logits."""
    hard = torch.empty(student.shape[0], dtype=wide(student[:0]).dtype, device=student.device)
    soft = torch.empty_like(hard)
    for start in range(0, student.shape[0], _SLICE):
        here = slice(start, start + _SLICE)
        push, pull = (None if w is None else w[here] for w in (weights.hard, weights.soft))
        part = RowWeights(push, pull)
        hard[here], soft[here] = _rows(student[here], top.part(here), targets[here], part, gradient)
    return RowLosses(hard, soft)


def _rows(student: Tensor, top: TopRows, targets: Tensor, weights: RowWeights, gradient: bool) -> tuple[Tensor, Tensor]:
    ours = wide(student)
    hard, partition, index = hard_loss(ours, targets)
    places, known = top.indices.long(), top.log_probs.to(ours.dtype).exp()
    rest = top.rest.to(ours.dtype)
    known = known * ((1 - rest) / known.sum(-1).clamp_min(1e-30)).unsqueeze(-1)  # float16 rounded them
    logits = ours.gather(-1, places)
    mine = (logits - partition.unsqueeze(-1)).exp()
    others = (ours - partition.unsqueeze(-1)).exp_().scatter_(-1, places, 0.0)
    mass = others.sum(-1).clamp_min(torch.finfo(ours.dtype).tiny)
    soft = (known * (partition.unsqueeze(-1) - logits)).sum(-1) - rest * mass.log()
    if gradient:
        pull, push = weights.soft, weights.hard
        zero = torch.zeros_like(mass)
        both = (zero if pull is None else pull) + (zero if push is None else push)
        pull = zero if pull is None else pull
        others.mul_((both - pull * rest / mass).unsqueeze(-1))
        others.scatter_(-1, places, both.unsqueeze(-1) * mine - pull.unsqueeze(-1) * known)
        if push is not None:
            others.scatter_add_(-1, index.unsqueeze(-1), -push.unsqueeze(-1))
        student.copy_(others)
    return hard, soft
