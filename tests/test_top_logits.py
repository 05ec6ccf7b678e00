"""The top of a teacher's distribution: loss and gradient against autograd, its bias against the whole one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.test_fused_loss import IGNORE, OBJECTIVES, batch
from tsld_fx import DistillConfig, losses
from tsld_fx.distill import LossTerm
from tsld_fx.errors import TrainingError
from tsld_fx.fused_loss import objective_of
from tsld_fx.losses import scales_of_scores
from tsld_fx.top_logits import TopLogits, top_of_head

SOFT = ("logit", "logit_gt", "tsld", "tsld_mean", "two_taus")


def top_of(b: dict[str, Any], count: int) -> TopLogits:
    """The definition in float64."""
    logits = torch.nn.functional.linear(b["teacher_hidden"], b["teacher_weight"], b["teacher_bias"])
    values, indices = torch.log_softmax(logits, -1).topk(count, dim=-1)
    scores = losses.token_cross_entropy(logits[:, :-1], b["labels"][:, 1:])
    return TopLogits(indices.int(), values, 1 - values.exp().sum(-1), scores)


def fused(b: dict[str, Any], distill: DistillConfig, top: TopLogits, chunk: int = 0) -> tuple[Tensor, ...]:
    objective = objective_of(distill.terms())
    assert objective is not None
    rest = (b["labels"], None, top.scores, objective.kinds, objective.weights, objective.temperatures, chunk, None)
    student = (b["hidden"], b["weight"], b["bias"], None, None, None)
    found: tuple[Tensor, ...] = torch.ops.tsld.head_loss(*student, *rest, top.indices, top.log_probs, top.rest)
    return found


def plain(b: dict[str, Any], distill: DistillConfig, top: TopLogits) -> Tensor:
    """The formula at the head of `tsld_fx.top_logits`, through whole log-probabilities."""
    logits = torch.nn.functional.linear(b["hidden"], b["weight"], b["bias"])
    log_q = torch.log_softmax(logits, -1)
    places = top.indices.long()
    others = log_q.scatter(-1, places, float("-inf")).logsumexp(-1)
    tokens = -(top.log_probs.exp() * log_q.gather(-1, places)).sum(-1) - top.rest * others
    targets = b["labels"][:, 1:]
    valid = targets != IGNORE
    total = torch.zeros((), dtype=logits.dtype)
    for term in distill.terms():
        if term.kind == "gt":
            value = losses.ground_truth(logits, b["labels"])
        elif term.kind == "logit":
            value = tokens[:, :-1][valid].mean()
        else:
            scales = scales_of_scores(top.scores, valid, term.temperature or 10.0, None)
            value = (scales * tokens[:, :-1]).sum() / (b["labels"].shape[0] if term.reduction == "mean" else 1)
        total = total + term.weight * value
    return total


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("name", SOFT)
def test_loss_and_gradients_equal_the_formulas(name: str, chunk: int) -> None:
    values = []
    for through in (lambda *a: fused(*a, chunk)[0], plain):
        b = batch(3)
        for key in ("hidden", "weight", "bias"):
            b[key].requires_grad_(True)
        loss = through(b, OBJECTIVES[name], top_of(b, 6))
        loss.backward()
        values.append([loss.detach(), *(b[key].grad for key in ("hidden", "weight", "bias"))])
    for ours, theirs in zip(*values, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_all_tokens_give_the_whole_loss_and_few_a_bounded_bias() -> None:
    b, logit = batch(4), DistillConfig("logit")
    b["labels"] = torch.randint(0, 37, (3, 11))
    b["hidden"].requires_grad_(True)
    b["weight"], b["bias"] = torch.eye(37, 6, dtype=torch.float64), None  # so that hidden states are some logits

    def loss_and_gradient(count: int) -> tuple[Tensor, Tensor]:
        logits = torch.nn.functional.linear(b["hidden"], b["weight"]).detach().requires_grad_(True)
        changed = {**b, "hidden": logits, "weight": torch.eye(37, dtype=torch.float64)}
        loss = fused(changed, logit, top_of(b, count))[0]
        loss.backward()
        assert logits.grad is not None
        return loss.detach(), logits.grad[:, :-1] * 30  # 30 tokens count

    whole, gradient = loss_and_gradient(37)
    expected = losses.fused_head_loss(**b, distill=logit).loss
    torch.testing.assert_close(whole, expected.detach(), rtol=1e-10, atol=0)
    previous = torch.tensor(0.0, dtype=torch.float64)
    for count in (1, 4, 16, 30):
        loss, found = loss_and_gradient(count)
        rest = top_of(b, count).rest[:, :-1]
        assert previous < loss < whole  # merging outcomes never adds, and fewer are merged each time
        assert ((found - gradient).abs().sum(-1) <= 2 * rest + 1e-12).all()
        previous = loss


def test_top_of_a_head_over_chunks() -> None:
    b = batch(5, torch.float32)
    found, expected = (
        top_of_head(b["teacher_hidden"], b["teacher_weight"], b["teacher_bias"], b["labels"], 8),
        top_of(b, 8),
    )
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.log_probs, expected.log_probs.half(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.rest, expected.rest, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.scores, expected.scores)
    assert top_of_head(b["teacher_hidden"], b["teacher_weight"], None, b["labels"], 37).rest.eq(0).all()


def test_what_the_top_cannot_give_is_refused() -> None:
    b = batch(6)
    top = top_of(b, 4)
    with pytest.raises(TrainingError, match="token scores"):
        fused(b, DistillConfig("tsld"), TopLogits(top.indices, top.log_probs, top.rest, None))  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="soften"):
        fused(b, DistillConfig(losses=[LossTerm("logit", 1.0, 2.0)]), top)
