"""TSLDTrainer: the objective of each method, accumulation, precision, learned scales."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from tests.models import build, ids, left_padded, ternary
from tests.tiny_runs import Recorder, Rows, arguments, random_rows
from tsld_fx import DistillConfig, PreparedModel, QuantConfig, TernaryWeight, TSLDTrainer, losses, prepare
from tsld_fx.distill import LossTerm
from tsld_fx.preparation import graph_model

METHODS = ("gt", "logit", "logit_gt", "l2l", "tsld")


def student() -> PreparedModel:
    return copy.deepcopy(ternary("llama")[0])


@cache
def learned(scale: str) -> PreparedModel:
    return prepare(build("llama"), QuantConfig(weight=TernaryWeight(scale=scale), scale_lr_ratio=0.5))


def teacher(**changes: Any) -> PreTrainedModel:
    return build("llama", seed=7, **changes)


def trained(
    folder: Path, model: PreparedModel, rows: Rows, distill: DistillConfig, **changes: Any
) -> tuple[TSLDTrainer, Recorder]:
    recorder, guide = Recorder(), changes.pop("teacher", None) or teacher()
    trainer = TSLDTrainer(
        model=model, teacher=guide, distill=distill, args=arguments(folder, **changes), train_dataset=rows,
        callbacks=[recorder],
    )  # fmt: skip
    trainer.train()
    return trainer, recorder


def oracle(kinds: dict[str, float], ours: Tensor, theirs: Tensor, labels: Tensor, reduction: str = "sum") -> float:
    """The objective in float64, token by token."""
    totals = {"gt": 0.0, "logit": 0.0, "tsld": 0.0}
    count = 0
    for row in range(labels.shape[0]):
        cross, weights = [], []
        for t in range(labels.shape[1] - 1):
            label = int(labels[row, t + 1])
            if label == -100:
                continue
            p, q = theirs[row, t].double().softmax(-1), ours[row, t].double().log_softmax(-1)
            cross.append(float(-(p * q).sum()))
            weights.append(float(-p[label].log()) / 10.0)
            totals["gt"] -= float(q[label])
            count += 1
        totals["logit"] += sum(cross)
        if cross:
            totals["tsld"] += float((torch.tensor(weights).double().softmax(-1) * torch.tensor(cross).double()).sum())
    totals["gt"] /= count
    totals["logit"] /= count
    totals["tsld"] /= labels.shape[0] if reduction == "mean" else 1
    return sum(weight * totals[kind] for kind, weight in kinds.items())


OBJECTIVES: list[tuple[DistillConfig, dict[str, float]]] = [
    (DistillConfig("gt"), {"gt": 1}),
    (DistillConfig("logit"), {"logit": 1}),
    (DistillConfig("logit_gt"), {"logit": 1, "gt": 1}),
    (DistillConfig("tsld"), {"tsld": 1, "gt": 1}),
    (DistillConfig("tsld", reduction="mean"), {"tsld": 1, "gt": 1}),
    (
        DistillConfig(losses=[LossTerm("gt", 0.25), LossTerm("logit", 2.0), {"kind": "tsld", "weight": 0.5}]),
        {"gt": 0.25, "logit": 2.0, "tsld": 0.5},
    ),
]


@pytest.mark.parametrize(("distill", "kinds"), OBJECTIVES, ids=["gt", "logit", "logit_gt", "tsld", "mean", "list"])
def test_first_loss_is_the_methods_formula_and_training_lowers_it(
    distill: DistillConfig, kinds: dict[str, float], tmp_path: Path
) -> None:
    model, guide, rows = student(), teacher(), random_rows(4)
    rows.columns["labels"][1, 6:] = -100
    labels = rows.columns["labels"]
    with torch.no_grad():
        ours, theirs = model(rows.columns["input_ids"]).logits, guide(rows.columns["input_ids"]).logits
    expected = oracle(kinds, ours, theirs, labels, distill.reduction)
    _, log = trained(tmp_path, model, rows, distill, teacher=guide, max_steps=6)
    found = log.values("loss")
    assert found[0] == pytest.approx(expected, rel=2e-6)
    assert found[-1] < found[0]
    parts = {k.removeprefix("loss_") for k in log.lines[0] if k.startswith("loss_")}
    assert parts == set(kinds)


def test_layer_to_layer_adds_hidden_states_and_attention_scores_of_teacher_and_student(tmp_path: Path) -> None:
    distill, rows = DistillConfig("l2l"), random_rows(4)
    tokens = rows.columns["input_ids"]
    model = student()
    model.set_taps(distill.taps)
    with torch.no_grad():
        ours, theirs = model(tokens), graph_model(teacher(), None, distill.taps)(tokens)
    expected = (
        oracle({"logit": 1}, ours.logits, theirs.logits, tokens)
        + sum(float((a - b).double().square().mean()) for a, b in zip(ours[1], theirs[1], strict=True))
        + float(losses.attention_distillation(ours.attention_scores, theirs.attention_scores, None))
    )
    assert len(ours.hidden_states) == len(ours.attention_scores) == 2
    _, log = trained(tmp_path, student(), rows, distill, max_steps=6)
    assert log.values("loss")[0] == pytest.approx(expected, rel=1e-5)
    assert log.values("loss")[-1] < log.values("loss")[0]


@pytest.mark.parametrize(("reduction", "factor"), [("mean", 1.0), ("sum", 0.5)])
def test_accumulated_micro_batches_are_averaged(reduction: Any, factor: float, tmp_path: Path) -> None:
    """Two micro-batches of 2 give the mean of their objectives: for `sum` half of what one batch of 4 gives."""
    distill = DistillConfig(losses=[{"kind": "tsld", "reduction": reduction}])
    whole, halves = student(), student()
    _, log = trained(tmp_path, whole, random_rows(4), distill, max_steps=1, optim="sgd")
    _, split = trained(
        tmp_path, halves, random_rows(4), distill, max_steps=1, optim="sgd",
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    assert split.values("loss")[0] == pytest.approx(factor * log.values("loss")[0], rel=1e-5)
    start = dict(student().named_parameters())
    for name, parameter in halves.named_parameters():
        moved, expected = parameter - start[name], factor * (whole.get_parameter(name) - start[name])
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=2e-7, msg=name)


def test_bf16_autocast_keeps_float32_masters_and_stays_near_float32(tmp_path: Path) -> None:
    model, reference = student(), student()
    _, log = trained(tmp_path, model, random_rows(4), DistillConfig(), bf16=True)
    _, exact = trained(tmp_path, reference, random_rows(4), DistillConfig())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert log.values("loss") == pytest.approx(exact.values("loss"), rel=0.02)
    assert log.values("loss") != exact.values("loss")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_teacher_in_another_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    _, low = trained(tmp_path, student(), random_rows(4), DistillConfig(), teacher=teacher().to(dtype))
    _, exact = trained(tmp_path, student(), random_rows(4), DistillConfig())
    assert low.values("loss") == pytest.approx(exact.values("loss"), rel=0.02)


def test_teacher_never_changes_and_is_never_saved(tmp_path: Path) -> None:
    guide = teacher().train()
    guide.lm_head.weight.requires_grad_(False)
    before, flags = copy.deepcopy(guide.state_dict()), [p.requires_grad for p in guide.parameters()]
    model = student()
    trained(tmp_path, model, random_rows(), DistillConfig(), teacher=guide, save_strategy="steps", save_steps=4)
    assert not guide.training
    assert [p.requires_grad for p in guide.parameters()] == flags
    assert all(p.grad is None for p in guide.parameters())
    for name, value in guide.state_dict().items():
        assert torch.equal(value, before[name]), name
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert set(saved) == set(model.state_dict())
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_padding_does_not_reach_the_loss(method: Any, tmp_path: Path) -> None:
    tokens, mask = left_padded((9, 5))
    tokens, mask = tokens.flip(1), mask.flip(1)
    first = []
    for junk, labels in ((0, tokens.masked_fill(mask == 0, -100)), (50, tokens)):
        rows = Rows(input_ids=tokens + junk * (1 - mask), attention_mask=mask, labels=labels)
        _, log = trained(tmp_path, student(), rows, DistillConfig(method), per_device_train_batch_size=2, max_steps=1)
        first.append(log.values("loss")[0])
    assert first[0] == pytest.approx(first[1], rel=1e-6)


def test_segment_ids_give_each_document_its_own_softmax(tmp_path: Path) -> None:
    tokens = ids(4, 12)
    segments = torch.arange(12).ge(5).long().expand(4, 12).contiguous()
    distill = DistillConfig(losses=[{"kind": "tsld"}], separate_documents=True)
    rows = Rows(input_ids=tokens, labels=tokens, segment_ids=segments)
    with torch.no_grad():
        ours, theirs = student()(tokens).logits, teacher()(tokens).logits
    parts = [tokens.clone(), tokens.clone()]
    parts[0][:, 5:], parts[1][:, :5] = -100, -100
    expected = sum(oracle({"tsld": 1}, ours, theirs, part) for part in parts)
    _, log = trained(tmp_path, student(), rows, distill, max_steps=1)
    assert log.values("loss")[0] == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("scale", ["lsq", "pact"])
def test_learned_scales_have_their_own_rate_no_decay_and_train(scale: str, tmp_path: Path) -> None:
    model = copy.deepcopy(learned(scale))
    before = {name: p.detach().clone() for name, p in model.learned_scales()}
    assert len(before) == 14
    trainer, _ = trained(tmp_path, model, random_rows(), DistillConfig(), weight_decay=0.1)
    groups = trainer.optimizer.param_groups
    ours = [g for g in groups if {id(p) for p in g["params"]} & {id(p) for _, p in model.learned_scales()}]
    assert len(ours) == 1
    assert len(ours[0]["params"]) == len(before)
    assert (ours[0]["lr"], ours[0]["weight_decay"]) == (pytest.approx(1.5e-3), 0.0)
    assert {g["lr"] for g in groups if g is not ours[0]} == {3e-3}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert all(not torch.equal(p, before[name]) for name, p in model.learned_scales())


def test_evaluation_is_the_ground_truth_loss_and_its_perplexity(tmp_path: Path) -> None:
    recorder, model, rows = Recorder(), student(), random_rows(8)
    trainer = TSLDTrainer(
        model=model, teacher=teacher(), args=arguments(tmp_path, per_device_eval_batch_size=8), train_dataset=rows,
        eval_dataset=rows, callbacks=[recorder],
    )  # fmt: skip
    metrics = trainer.evaluate()
    tokens = rows.columns["input_ids"]
    with torch.no_grad():
        expected = oracle({"gt": 1}, model.eval()(tokens).logits, model(tokens).logits, tokens)
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(2.718281828459045**expected, rel=1e-4)
    assert recorder.values("eval_perplexity") == [metrics["eval_perplexity"]]


def test_plain_trainer_trains_a_prepared_model(tmp_path: Path) -> None:
    recorder = Recorder()
    Trainer(
        model=student(), args=arguments(tmp_path, max_steps=8), train_dataset=random_rows(4), callbacks=[recorder]
    ).train()
    assert recorder.values("loss")[-1] < recorder.values("loss")[0]
