"""Layer-to-layer losses against loops over layers, tokens and heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tsld_fx import losses
from tsld_fx.errors import TrainingError


def layers(shape: tuple[int, ...], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def test_hidden_states_are_compared_over_attended_tokens() -> None:
    student, teacher = layers((2, 5, 4), 0), layers((2, 5, 4), 1)
    for mask in (None, MASK):
        total = 0.0
        for ours, theirs in zip(student, teacher, strict=True):
            errors = [
                float(((ours[b, t] - theirs[b, t]) ** 2).mean())
                for b in range(2)
                for t in range(5)
                if mask is None or mask[b, t]
            ]
            total += sum(errors) / len(errors)
        loss = losses.hidden_state_distillation(student, teacher, mask)
        assert loss.item() == pytest.approx(total, rel=1e-12)


def test_attention_scores_are_compared_over_the_causal_part_between_attended_tokens() -> None:
    student, teacher = layers((2, 3, 5, 5), 0), layers((2, 3, 5, 5), 1)
    for mask in (None, MASK):
        total = 0.0
        for ours, theirs in zip(student, teacher, strict=True):
            errors = [
                float((ours[b, h, q, k] - theirs[b, h, q, k]) ** 2)
                for b in range(2)
                for h in range(3)
                for q in range(5)
                for k in range(q + 1)
                if mask is None or (mask[b, q] and mask[b, k])
            ]
            total += sum(errors) / len(errors)
        loss = losses.attention_distillation(student, teacher, mask)
        assert loss.item() == pytest.approx(total, rel=1e-12)


def test_scores_of_minus_infinity_outside_the_causal_part_do_no_harm() -> None:
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)
    student, teacher = layers((2, 3, 5, 5), 0), layers((2, 3, 5, 5), 1)
    clean = losses.attention_distillation(student, teacher, MASK)
    for junk in (float("-inf"), float("nan"), torch.finfo(torch.float64).min):
        ours = [s.masked_fill(future, junk).requires_grad_() for s in student]
        theirs = [t.masked_fill(future, junk) for t in teacher]
        loss = losses.attention_distillation(ours, theirs, MASK)
        assert loss.item() == pytest.approx(clean.item())
        loss.backward()
        assert all(torch.isfinite(s.grad).all() for s in ours)


def test_batch_of_nothing_but_padding_gives_zero() -> None:
    nothing = torch.zeros(2, 5, dtype=torch.long)
    hidden = losses.hidden_state_distillation(layers((2, 5, 4), 0), layers((2, 5, 4), 1), nothing)
    scores = losses.attention_distillation(layers((2, 3, 5, 5), 0), layers((2, 3, 5, 5), 1), nothing)
    assert hidden.item() == 0.0
    assert scores.item() == 0.0


def test_half_precision_is_compared_in_float32() -> None:
    student, teacher = layers((2, 5, 4), 0), layers((2, 5, 4), 1)
    low = [[t.half() for t in side] for side in (student, teacher)]
    exact = losses.hidden_state_distillation(*[[t.double() for t in side] for side in low], None)
    ours = losses.hidden_state_distillation(*low, None)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize("name", ["hidden_state_distillation", "attention_distillation"])
def test_gradients_pass_gradcheck(name: str) -> None:
    shape = (2, 5, 4) if name.startswith("hidden") else (2, 3, 5, 5)
    teacher = layers(shape, 1)[:2]
    student = [s.requires_grad_() for s in layers(shape, 0)[:2]]
    function = getattr(losses, name)
    assert torch.autograd.gradcheck(lambda a, b: function([a, b], teacher, MASK), tuple(student))


@pytest.mark.parametrize("name", ["hidden_state_distillation", "attention_distillation"])
def test_layers_that_do_not_fit_are_refused(name: str) -> None:
    shape = (2, 5, 4) if name.startswith("hidden") else (2, 3, 5, 5)
    function, ours, theirs = getattr(losses, name), layers(shape, 0), layers(shape, 1)
    with pytest.raises(TrainingError, match=r"the student gives 3 .*the teacher 2.*method='l2l'"):
        function(ours, theirs[:2], None)
    with pytest.raises(TrainingError, match="the student gives 0"):
        function([], [], None)
    with pytest.raises(TrainingError, match=r"of layer 1 are .* in the student and .* in the teacher"):
        function(ours, [theirs[0], theirs[1][:, :, :3], theirs[2]], None)
