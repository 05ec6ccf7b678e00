"""Every loss against a plain float64 formula: two loops over sequences and tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tsld_fx import losses
from tsld_fx.errors import DataError, TrainingError, TsldError

IGNORE = -100
tsld = losses.token_scaled_logit_distillation


def log_softmax(logits: list[float]) -> list[float]:
    highest = max(logits)
    total = highest + math.log(sum(math.exp(z - highest) for z in logits))
    return [z - total for z in logits]


def tsld_by_hand(student: Tensor, teacher: Tensor, labels: Tensor, tau: float, segments: Tensor | None = None) -> float:
    """Sum over sequences (documents) and tokens of softmax_t(c_t / tau) * soft cross-entropy_t."""
    total = 0.0
    for b in range(labels.shape[0]):
        documents: dict[int, list[tuple[float, float]]] = {}
        for t in range(labels.shape[1] - 1):
            target = int(labels[b, t + 1])
            if target == IGNORE:
                continue
            ours, theirs = log_softmax(student[b, t].tolist()), log_softmax(teacher[b, t].tolist())
            hardness = -theirs[target]
            soft = -sum(math.exp(p) * q for p, q in zip(theirs, ours, strict=True))
            document = 0 if segments is None else int(segments[b, t + 1])
            documents.setdefault(document, []).append((hardness, soft))
        for tokens in documents.values():
            norm = sum(math.exp(hardness / tau) for hardness, _ in tokens)
            total += sum(math.exp(hardness / tau) / norm * soft for hardness, soft in tokens)
    return total


def logit_by_hand(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> float:
    values = []
    for b in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1):
            if int(labels[b, t + 1]) != IGNORE:
                ours = log_softmax((student[b, t] / temperature).tolist())
                theirs = log_softmax((teacher[b, t] / temperature).tolist())
                values.append(-sum(math.exp(p) * q for p, q in zip(theirs, ours, strict=True)))
    return sum(values) / len(values) * temperature**2


def ground_truth_by_hand(logits: Tensor, labels: Tensor) -> float:
    values = [
        -log_softmax(logits[b, t].tolist())[int(labels[b, t + 1])]
        for b in range(labels.shape[0])
        for t in range(labels.shape[1] - 1)
        if int(labels[b, t + 1]) != IGNORE
    ]
    return sum(values) / len(values)


def batch(
    sequences: int = 3, tokens: int = 7, vocabulary: int = 11, seed: int = 0, masked: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Student's and teacher's logits and labels with a masked prompt, masked padding and holes."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        torch.randn(sequences, tokens, vocabulary, generator=generator, dtype=torch.float64) * 3 for _ in range(2)
    )
    labels = torch.randint(0, vocabulary, (sequences, tokens), generator=generator)
    if masked:
        labels[0, :3] = IGNORE
        labels[1, 5:] = IGNORE
        labels[-1, 3] = IGNORE
    return student, teacher, labels


@pytest.mark.parametrize("tau", [0.5, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize("masked", [False, True])
def test_tsld_equals_the_formula(tau: float, masked: bool) -> None:
    student, teacher, labels = batch(masked=masked)
    expected = tsld_by_hand(student, teacher, labels, tau)
    assert tsld(student, teacher, labels, tau).item() == pytest.approx(expected, rel=1e-12)
    mean = tsld(student, teacher, labels, tau, reduction="mean").item()
    assert mean == pytest.approx(expected / 3, rel=1e-12)


def test_defaults_are_tau_ten_and_the_sum_over_sequences() -> None:
    student, teacher, labels = batch()
    assert tsld(student, teacher, labels).item() == pytest.approx(tsld_by_hand(student, teacher, labels, 10.0))


def test_packed_documents_get_a_softmax_each() -> None:
    student, teacher, labels = batch(2, 9)
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 5, 5], [3, 3, 3, 3, 3, 3, 4, 4, 4]])
    ours = tsld(student, teacher, labels, 2.0, segment_ids=segments)
    assert ours.item() == pytest.approx(tsld_by_hand(student, teacher, labels, 2.0, segments), rel=1e-12)
    scales = losses.token_scales(teacher, labels, 2.0, segments)
    assert scales.shape == (2, 8)
    for row in range(2):
        for number in segments[row, 1:].unique():
            here = (segments[row, 1:] == number) & (labels[row, 1:] != IGNORE)
            assert scales[row][here].sum().item() == pytest.approx(1.0 if here.any() else 0.0)
    one = tsld(student, teacher, labels, 2.0, segment_ids=torch.zeros_like(labels))
    assert one.item() == pytest.approx(tsld(student, teacher, labels, 2.0).item())


def test_document_alone_in_its_sequence_gives_the_same_loss() -> None:
    student, teacher, labels = batch(1, 10, masked=False)
    labels[0, 5] = IGNORE  # the first token of the second document has no context
    segments = torch.tensor([[0] * 5 + [1] * 5])
    together = tsld(student, teacher, labels, 3.0, segment_ids=segments)
    first = tsld(student[:, :5], teacher[:, :5], labels[:, :5], 3.0)
    second = tsld(student[:, 5:], teacher[:, 5:], labels[:, 5:], 3.0)
    assert together.item() == pytest.approx((first + second).item(), rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_logit_distillation_equals_the_formula(temperature: float) -> None:
    student, teacher, labels = batch()
    ours = losses.logit_distillation(student, teacher, labels, temperature)
    assert ours.item() == pytest.approx(logit_by_hand(student, teacher, labels, temperature), rel=1e-12)


def test_ground_truth_equals_the_formula() -> None:
    student, _, labels = batch()
    assert losses.ground_truth(student, labels).item() == pytest.approx(ground_truth_by_hand(student, labels))


def test_gradient_of_tsld_is_scale_times_difference_of_distributions() -> None:
    """d loss / d z_t = w_t (softmax(student_t) - softmax(teacher_t)), zero at the last token and where masked."""
    student, teacher, labels = batch()
    student.requires_grad_()
    tsld(student, teacher, labels, 2.0).backward()
    for b in range(3):
        kept = [t for t in range(6) if int(labels[b, t + 1]) != IGNORE]
        hardness = {t: -log_softmax(teacher[b, t].tolist())[int(labels[b, t + 1])] for t in kept}
        norm = sum(math.exp(h / 2.0) for h in hardness.values())
        for t in range(7):
            weight = math.exp(hardness[t] / 2.0) / norm if t in kept else 0.0
            expected = weight * (student[b, t].softmax(-1) - teacher[b, t].softmax(-1))
            torch.testing.assert_close(student.grad[b, t], expected.detach(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["tsld", "tsld_mean", "tsld_segments", "logit", "logit_hot", "ground_truth"])
def test_gradients_pass_gradcheck(name: str) -> None:
    student, teacher, labels = batch(2, 5, 6, masked=False)
    labels[0, 2] = IGNORE
    segments = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 2]])
    function = {
        "tsld": lambda z: tsld(z, teacher, labels, 2.0),
        "tsld_mean": lambda z: tsld(z, teacher, labels, 2.0, "mean"),
        "tsld_segments": lambda z: tsld(z, teacher, labels, 2.0, segment_ids=segments),
        "logit": lambda z: losses.logit_distillation(z, teacher, labels),
        "logit_hot": lambda z: losses.logit_distillation(z, teacher, labels, 3.0),
        "ground_truth": lambda z: losses.ground_truth(z, labels),
    }[name]
    assert torch.autograd.gradcheck(function, (student.requires_grad_(),))


def test_teacher_never_receives_a_gradient() -> None:
    student, teacher, labels = batch()
    student.requires_grad_()
    teacher.requires_grad_()
    (tsld(student, teacher, labels) + losses.logit_distillation(student, teacher, labels, 2.0)).backward()
    states = [torch.randn(3, 7, 4, requires_grad=True) for _ in range(2)]
    losses.hidden_state_distillation([states[0]], [states[1]], None).backward()
    assert teacher.grad is None
    assert states[1].grad is None
    assert states[0].grad is not None


def test_fully_masked_sequence_counts_as_zero_and_is_never_nan() -> None:
    student, teacher, labels = batch(masked=False)
    alone = tsld(student[:2], teacher[:2], labels[:2])
    labels[2] = IGNORE
    student.requires_grad_()
    total = tsld(student, teacher, labels)
    assert total.item() == pytest.approx(alone.item())
    assert tsld(student, teacher, labels, reduction="mean").item() == pytest.approx(alone.item() / 3)
    total.backward()
    assert (student.grad[2] == 0).all()
    nothing = tsld(student, teacher, torch.full_like(labels, IGNORE))
    assert nothing.item() == 0.0


def test_values_at_masked_positions_do_not_matter() -> None:
    student, teacher, labels = batch()
    off = torch.ones(3, 7, dtype=torch.bool)
    off[:, :-1] = labels[:, 1:] == IGNORE  # the last token predicts nothing
    for junk in (1e4, float("inf"), float("nan")):
        ours = student.clone().masked_fill(off[..., None], junk).requires_grad_()
        theirs = teacher.masked_fill(off[..., None], junk)
        for loss, clean in (
            (tsld(ours, theirs, labels), tsld(student, teacher, labels)),
            (losses.logit_distillation(ours, theirs, labels), losses.logit_distillation(student, teacher, labels)),
            (losses.ground_truth(ours, labels), losses.ground_truth(student, labels)),
        ):
            assert loss.item() == pytest.approx(clean.item(), rel=1e-12), junk


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher, labels = batch(2, 6, 500, masked=False)
    student, teacher = (student * 3).to(dtype).requires_grad_(), (teacher * 3).to(dtype)
    wide_student, wide_teacher = student.detach().double(), teacher.double()
    for ours, exact in (
        (tsld(student, teacher, labels), tsld_by_hand(wide_student, wide_teacher, labels, 10.0)),
        (losses.logit_distillation(student, teacher, labels), logit_by_hand(wide_student, wide_teacher, labels)),
        (losses.ground_truth(student, labels), ground_truth_by_hand(wide_student, labels)),
    ):
        assert ours.dtype == torch.float32
        assert ours.item() == pytest.approx(exact, rel=1e-5)
        ours.backward()
    assert student.grad.dtype == dtype


def test_float64_stays_float64() -> None:
    student, teacher, labels = batch()
    for loss in (
        tsld(student, teacher, labels),
        losses.logit_distillation(student, teacher, labels),
        losses.ground_truth(student, labels),
        losses.hidden_state_distillation([student], [teacher], None),
    ):
        assert loss.dtype == torch.float64


@given(seed=st.integers(0, 1000), shift=st.floats(-50, 50))
def test_invariances(seed: int, shift: float) -> None:
    student, teacher, labels = batch(seed=seed)
    plain = tsld(student, teacher, labels, 2.0).item()
    assert tsld(student + shift, teacher - shift, labels, 2.0).item() == pytest.approx(plain, rel=1e-9)
    order = torch.randperm(3)
    assert tsld(student[order], teacher[order], labels[order], 2.0).item() == pytest.approx(plain, rel=1e-9)
    words = torch.randperm(11)
    place = torch.argsort(words)
    renamed = torch.where(labels == IGNORE, IGNORE, place[labels.clamp_min(0)])
    assert tsld(student[..., words], teacher[..., words], renamed, 2.0).item() == pytest.approx(plain, rel=1e-9)
    assert plain >= tsld(teacher, teacher, labels, 2.0).item() - 1e-9, "the teacher itself is the lowest point"


def test_hard_tokens_weigh_more_and_high_tau_weighs_all_alike() -> None:
    _, teacher, labels = batch(1, 8, masked=False)
    targets = labels[:, 1:]
    hardness = -teacher[:, :-1].log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    scales = losses.token_scales(teacher, labels, 1.0)
    assert torch.equal(scales[0].argsort(), hardness[0].argsort())
    torch.testing.assert_close(losses.token_scales(teacher, labels, 1e9)[0], torch.full((7,), 1 / 7).double())
    assert not scales.requires_grad


def test_losses_compile_without_graph_breaks() -> None:
    student, teacher, labels = batch()
    compiled = torch.compile(tsld, backend="aot_eager", fullgraph=True)
    eager, traced = student.clone().requires_grad_(), student.clone().requires_grad_()
    tsld(eager, teacher, labels).backward()
    compiled(traced, teacher, labels).backward()
    torch.testing.assert_close(eager.grad, traced.grad)


def refused(error: type[TsldError], said: str, call: object, *arguments: object, **options: object) -> None:
    with pytest.raises(error, match=said):
        call(*arguments, **options)  # type: ignore[operator]


def test_labels_that_do_not_fit_are_refused_with_their_place() -> None:
    student, teacher, labels = batch()
    for value in (11, -1, -101):
        wrong = labels.clone()
        wrong[1, 2] = value
        said = rf"labels\[1, 2\] = {value} is outside the vocabulary of 11.*-100"
        refused(DataError, said, tsld, student, teacher, wrong)
        refused(DataError, said, losses.logit_distillation, student, teacher, wrong)
        refused(DataError, said, losses.ground_truth, student, wrong)
    refused(DataError, r"logits \[3, 7, 11\] and labels \[3, 6\]", tsld, student, teacher, labels[:, 1:])


def test_teacher_of_another_vocabulary_is_refused() -> None:
    student, teacher, labels = batch()
    said = r"student logits \[3, 7, 11\] and teacher logits \[3, 7, 10\].*vocabulary"
    refused(TrainingError, said, tsld, student, teacher[..., :-1], labels)
    refused(TrainingError, said, losses.logit_distillation, student, teacher[..., :-1], labels)


def test_batch_without_any_label_is_refused_where_a_mean_over_tokens_is_taken() -> None:
    student, teacher, labels = batch()
    labels[:, 1:] = IGNORE  # the first label predicts nothing after the shift
    said = "every label of this batch is -100"
    refused(DataError, said, losses.ground_truth, student, labels)
    refused(DataError, said, losses.logit_distillation, student, teacher, labels)


def test_unknown_reduction_is_refused() -> None:
    refused(DataError, "reduction='max' is not 'sum' or 'mean'", tsld, *batch(), reduction="max")
