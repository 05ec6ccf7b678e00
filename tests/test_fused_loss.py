"""The fused head loss against the plain losses on logits: values and gradients, every objective, many chunkings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tsld_fx import DistillConfig, losses
from tsld_fx.distill import LossTerm
from tsld_fx.errors import ConfigError, DataError, TrainingError

IGNORE = -100
OBJECTIVES: dict[str, DistillConfig] = {
    "gt": DistillConfig("gt"),
    "logit": DistillConfig("logit"),
    "logit_gt": DistillConfig("logit_gt"),
    "tsld": DistillConfig("tsld", temperature=2.0),
    "tsld_mean": DistillConfig("tsld", reduction="mean"),
    "list": DistillConfig(losses=[LossTerm("tsld", 0.5, 3.0), LossTerm("logit", 2.0, 4.0), LossTerm("gt", 0.25)]),
    "two_taus": DistillConfig(losses=[LossTerm("tsld", 1.0, 1.0), LossTerm("tsld", 0.3, 7.0, "mean")]),
    "frozen": DistillConfig(losses=[LossTerm("logit", 0.0), LossTerm("gt", 1.0)]),
}


def batch(seed: int, dtype: torch.dtype = torch.float64, vocabulary: int = 37, bias: bool = True) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    labels = torch.randint(0, vocabulary, (3, 11), generator=g)
    labels[0, :4] = IGNORE
    labels[1, :] = IGNORE  # nothing to learn from this sequence
    labels[2, 5] = IGNORE
    return {
        "hidden": normal(3, 11, 6), "weight": normal(vocabulary, 6), "bias": normal(vocabulary) if bias else None,
        "teacher_hidden": normal(3, 11, 9), "teacher_weight": normal(vocabulary, 9),
        "teacher_bias": normal(vocabulary) if bias else None, "labels": labels,
    }  # fmt: skip


def plain(distill: DistillConfig, b: dict[str, Any], segments: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """The objective through whole logits."""
    ours = torch.nn.functional.linear(b["hidden"], b["weight"], b["bias"])
    theirs = torch.nn.functional.linear(b["teacher_hidden"], b["teacher_weight"], b["teacher_bias"])
    values = []
    for term in distill.terms():
        if term.kind == "gt":
            values.append(losses.ground_truth(ours, b["labels"]))
        elif term.kind == "logit":
            values.append(losses.logit_distillation(ours, theirs, b["labels"], term.temperature or 1.0))
        else:
            tau = term.temperature or 10.0
            values.append(
                losses.token_scaled_logit_distillation(ours, theirs, b["labels"], tau, term.reduction, segments)
            )
    return sum(t.weight * v for t, v in zip(distill.terms(), values, strict=True)), values


def with_grad(b: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v.clone().requires_grad_() if k in names and v is not None else v for k, v in b.items()}


@pytest.mark.parametrize("chunk", [0, 1, 4, 11, 13, 25, 1000])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_equals_the_plain_losses_in_float64(name: str, chunk: int) -> None:
    distill, b = OBJECTIVES[name], batch(chunk + len(name), bias=chunk != 4)
    segments = torch.tensor([[0] * 5 + [3] * 6, [1] * 11, [2, 2, 7, 7, 7, 2, 2, 9, 9, 9, 9]]) if chunk == 13 else None
    first, second = (with_grad(b, "hidden", "weight", "bias") for _ in range(2))
    expected, values = plain(distill, first, segments)
    ours = losses.fused_head_loss(**second, distill=distill, segment_ids=segments, chunk_tokens=chunk)
    (3.0 * expected).backward()
    (3.0 * ours.loss).backward()
    torch.testing.assert_close(ours.loss, expected, rtol=1e-10, atol=1e-10)
    assert [kind for kind, _ in ours.terms] == [term.kind for term in distill.terms()]
    for (_, value), reference in zip(ours.terms, values, strict=True):
        torch.testing.assert_close(value, reference.detach(), rtol=1e-10, atol=1e-10)
    for key in ("hidden", "weight", "bias"):
        if b[key] is not None:
            torch.testing.assert_close(second[key].grad, first[key].grad, rtol=1e-10, atol=1e-10, msg=key)


@pytest.mark.parametrize("chunk", [3, 11, 64])
def test_known_token_scores_change_nothing(chunk: int) -> None:
    b, distill = batch(5), DistillConfig("tsld")
    found = losses.fused_head_loss(**b, distill=distill, chunk_tokens=chunk)
    theirs = torch.nn.functional.linear(b["teacher_hidden"], b["teacher_weight"], b["teacher_bias"])
    scores = losses.token_cross_entropy(theirs[:, :-1], b["labels"][:, 1:])
    torch.testing.assert_close(found.token_scores, scores, rtol=1e-12, atol=1e-12)
    again = losses.fused_head_loss(**b, distill=distill, token_scores=found.token_scores, chunk_tokens=chunk)
    assert again.token_scores is None
    torch.testing.assert_close(again.loss, found.loss, rtol=1e-14, atol=0)


def test_tied_head_sums_the_gradients_of_head_and_embedding() -> None:
    b = batch(1, vocabulary=7, bias=False)
    tokens = torch.arange(33).remainder(7).view(3, 11)
    grads = []
    for fused in (True, False):
        tied = with_grad(b, "weight")
        tied["hidden"] = torch.nn.functional.embedding(tokens, tied["weight"]).tanh()
        loss = losses.fused_head_loss(**tied, chunk_tokens=4).loss if fused else plain(DistillConfig(), tied)[0]
        loss.backward()
        grads.append(tied["weight"].grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("hidden", "bias")])
def test_only_what_needs_a_gradient_gets_one(trained: tuple[str, ...]) -> None:
    b = with_grad(batch(2), *trained)
    guide = {k: v.requires_grad_() for k, v in batch(2).items() if k.startswith("teacher")}
    losses.fused_head_loss(**{**b, **guide}).loss.backward()
    assert {k for k in ("hidden", "weight", "bias") if b[k].grad is not None} == set(trained)
    assert all(v.grad is None for v in guide.values())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_gives_the_same_value(mode: Any) -> None:
    b = batch(3)
    expected = plain(DistillConfig(), b)[0]
    with mode():
        value = losses.fused_head_loss(**b).loss
    assert not value.requires_grad
    torch.testing.assert_close(value.clone(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_autocast_is_as_near_to_float64_as_the_plain_loss(dtype: torch.dtype) -> None:
    """The head's weight may be float32 (masters) or bfloat16; its gradient comes back in that dtype."""
    exact = with_grad(batch(7), "hidden", "weight")
    plain(DistillConfig(), exact)[0].backward()
    errors = []
    for fused in (True, False):
        low = with_grad(
            {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch(7).items()}, "hidden", "weight"
        )
        with torch.autocast("cpu", torch.bfloat16):
            loss = losses.fused_head_loss(**low, chunk_tokens=4).loss if fused else plain(DistillConfig(), low)[0]
        loss.backward()
        assert loss.dtype == torch.float32
        assert low["weight"].grad.dtype == low["hidden"].grad.dtype == dtype
        pairs = [(low[k].grad.double(), exact[k].grad) for k in ("hidden", "weight")]
        errors.append([float((a - b).norm() / b.norm()) for a, b in pairs])
    for fused_error, plain_error in zip(*errors, strict=True):
        assert fused_error < max(1.2 * plain_error, 0.01)


def test_half_precision_gradients_do_not_vanish() -> None:
    """Gradients of single logits below float16's range still add up: 2,000 words share the teacher's mass."""
    g = torch.Generator().manual_seed(0)
    hidden, theirs = (torch.randn(2, 64, 8, generator=g) * 0.05 for _ in range(2))
    weight, labels = torch.randn(2000, 8, generator=g), torch.randint(0, 2000, (2, 64), generator=g)
    grads = []
    for dtype in (torch.float32, torch.float16):
        ours = hidden.to(dtype, copy=True).requires_grad_()
        losses.fused_head_loss(ours, weight.to(dtype), theirs.to(dtype), weight.to(dtype), labels).loss.backward()
        grads.append(ours.grad.float())
    torch.testing.assert_close(grads[1], grads[0], rtol=0.02, atol=float(grads[0].abs().max()) * 0.01)


def test_compiles_without_graph_breaks_and_serves_once() -> None:
    b = batch(4, torch.float32)
    eager, compiled = (with_grad(b, "hidden", "weight") for _ in range(2))

    def objective(b: dict[str, Any]) -> Tensor:
        return losses.fused_head_loss(**{**b, "hidden": b["hidden"] * 2}, chunk_tokens=8).loss

    objective(eager).backward()
    torch.compile(objective, backend="aot_eager", fullgraph=True)(compiled).backward()
    for key in ("hidden", "weight"):
        torch.testing.assert_close(compiled[key].grad, eager[key].grad)
    loss = objective(eager)
    loss.backward(retain_graph=True)
    with pytest.raises(TrainingError, match="retain_graph"):
        loss.backward()


def test_gradients_of_hidden_states_and_head_can_be_asked_for_apart() -> None:
    """As zero-bubble schedules do: first back to the hidden states, later to the weights."""
    plain, apart = (with_grad(batch(5, torch.float64), "hidden", "weight", "bias") for _ in range(2))
    losses.fused_head_loss(**plain).loss.backward()
    loss = losses.fused_head_loss(**apart).loss
    (hidden,) = torch.autograd.grad(loss, apart["hidden"], retain_graph=True)
    weight, bias = torch.autograd.grad(loss, (apart["weight"], apart["bias"]))
    for found, key in ((hidden, "hidden"), (weight, "weight"), (bias, "bias")):
        assert torch.equal(found, plain[key].grad)


def test_weight_gradient_is_handed_over_without_a_copy() -> None:
    b = with_grad(batch(6, torch.float32), "weight")
    loss = losses.fused_head_loss(**b).loss
    buffer = loss.grad_fn.gradients[0].data_ptr()
    loss.backward()
    assert b["weight"].grad.data_ptr() == buffer


def test_refusals() -> None:
    b = batch(0)
    with pytest.raises(ConfigError, match="hidden"):
        losses.fused_head_loss(**b, distill=DistillConfig("l2l"))
    with pytest.raises(ConfigError, match="temperatures"):
        losses.fused_head_loss(
            **b, distill=DistillConfig(losses=[LossTerm("logit", 1, 2.0), LossTerm("logit", 1, 3.0)])
        )
    with pytest.raises(DataError, match=r"labels\[0, 4\] = 37"):
        losses.fused_head_loss(
            **{**b, "labels": b["labels"].clone().index_put_((torch.tensor(0), torch.tensor(4)), torch.tensor(37))}
        )
    with pytest.raises(DataError, match="-100"):
        losses.fused_head_loss(**{**b, "labels": torch.full((3, 11), IGNORE)})
    with pytest.raises(TrainingError, match="vocabulary"):
        losses.fused_head_loss(**{**b, "teacher_weight": b["teacher_weight"][1:]})
    with pytest.raises(TrainingError, match="teacher_hidden"):
        losses.fused_head_loss(**{**b, "teacher_hidden": None})
