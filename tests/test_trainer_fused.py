"""TSLDTrainer's fused head and losses, compiled steps and shared quantised weights: the same results as without."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.models import build, ids, left_padded, ternary
from tests.tiny_runs import Recorder, Rows, arguments, random_rows
from tsld_fx import DistillConfig, PreparedModel, QuantConfig, TernaryWeight, TSLDTrainer, losses, prepare, quantizers
from tsld_fx.errors import DataError
from tsld_fx.fused_loss import HeadLoss, objective_of
from tsld_fx.headless import without_head

CLOSE = {"rtol": 2e-5, "atol": 2e-6}


def run(
    folder: Path, model: PreparedModel, rows: Rows, distill: DistillConfig, family: str = "llama", **changes: Any
) -> tuple[TSLDTrainer, Recorder]:
    recorder = Recorder()
    trainer = TSLDTrainer(
        model=model, teacher=build(family, seed=7), distill=distill, train_dataset=rows, eval_dataset=rows,
        args=arguments(folder, **{"optim": "sgd", "learning_rate": 0.01, **changes}), callbacks=[recorder],
    )  # fmt: skip
    trainer.train()
    return trainer, recorder


def both(
    folder: Path, model: PreparedModel, rows: Rows, method: Any, **changes: Any
) -> list[tuple[TSLDTrainer, Recorder]]:
    return [
        run(folder, copy.deepcopy(model), rows, DistillConfig(method, fused=fused), **changes)
        for fused in (True, False)
    ]


@pytest.mark.parametrize("method", ["gt", "logit", "logit_gt", "tsld"])
def test_fused_training_and_evaluation_equal_the_plain_ones(method: str, tmp_path: Path) -> None:
    tokens, mask = left_padded((9, 5, 1, 7))
    rows = Rows(input_ids=tokens, attention_mask=mask, labels=tokens)
    (ours, log), (plain, reference) = both(tmp_path, ternary("llama")[0], rows, method)
    assert ours._objective is not None
    assert plain._objective is None
    for name in log.lines[0]:
        if name.startswith("loss"):
            assert log.values(name) == pytest.approx(reference.values(name), rel=1e-4), name
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter, plain.model.get_parameter(name), **CLOSE, msg=name)
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


def test_fused_training_of_a_tied_quantised_head_with_bias(tmp_path: Path) -> None:
    config = QuantConfig(overrides={"lm_head": TernaryWeight()})
    model = prepare(build("gpt2", resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0), config)
    (ours, _), (plain, _) = both(tmp_path, model, random_rows(4), "tsld", family="gpt2")
    assert ours._objective is not None
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter, plain.model.get_parameter(name), **CLOSE, msg=name)


def test_logits_are_never_made_and_metrics_still_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = run(tmp_path, copy.deepcopy(ternary("llama")[0]), random_rows(4), DistillConfig(), max_steps=1)
    shapes: list[tuple[int, ...]] = []
    forward = PreparedModel.forward

    def watched(self: PreparedModel, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        shapes.append(None if out.logits is None else tuple(out.logits.shape))
        return out

    monkeypatch.setattr(PreparedModel, "forward", watched)
    trainer.evaluate()
    assert shapes == [None]
    trainer.compute_metrics = lambda p: {"shape": p.predictions.shape[-1]}
    metrics = trainer.evaluate()
    assert shapes[1:] == [(4, 12, 97)]
    assert metrics["eval_shape"] == 97


@pytest.mark.parametrize("family", ["gemma2"])
def test_soft_capped_logits_take_the_plain_way(family: str, tmp_path: Path) -> None:
    assert without_head(build(family)) is None
    trainer, log = run(
        tmp_path, copy.deepcopy(ternary(family)[0]), random_rows(4), DistillConfig(), family, max_steps=1
    )
    assert trainer._objective is None
    assert len(log.values("loss")) == 1


@pytest.mark.parametrize("family", ["gpt2", "opt_projected", "qwen3"])
def test_a_headless_model_gives_what_the_head_reads(family: str) -> None:
    model, tokens = build(family), ids()
    cut = without_head(model)
    assert cut is not None
    with torch.no_grad():
        logits = nn.functional.linear(cut.body(input_ids=tokens, use_cache=False).logits, cut.weight, cut.bias)
        assert torch.equal(logits, model(input_ids=tokens).logits)
    assert type(model.get_output_embeddings()) is nn.Linear


def test_bad_labels_are_named(tmp_path: Path) -> None:
    for value, said in ((97, "outside the vocabulary"), (-100, "-100")):
        rows = random_rows(4)
        rows.columns["labels"][:] = value
        with pytest.raises(DataError, match=said):
            run(tmp_path, copy.deepcopy(ternary("llama")[0]), rows, DistillConfig())


def test_compiled_training_equals_eager_without_graph_breaks(tmp_path: Path) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    logs = []
    for compiled in (True, False):
        changes = {"torch_compile_backend": "aot_eager"} if compiled else {}
        model = copy.deepcopy(ternary("llama")[0])
        trainer, log = run(tmp_path, model, random_rows(4), DistillConfig(), torch_compile=compiled, **changes)
        logs.append((log.values("loss"), trainer.evaluate()["eval_loss"]))
    assert logs[0][0] == pytest.approx(logs[1][0], rel=1e-6)
    assert logs[0][1] == pytest.approx(logs[1][1], rel=1e-6)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] >= 2  # the teacher and the student


def test_two_objectives_are_compiled_in_one_process() -> None:
    tokens = ids()
    labels, hidden, weight = tokens, torch.randn(*tokens.shape, 8), torch.randn(97, 8)
    for method in ("tsld", "logit_gt"):  # other weights and temperatures: the second time they are symbols to dynamo
        objective = objective_of(DistillConfig(method).terms())
        assert objective is not None
        student = prepare(build("llama"), QuantConfig()).train()
        assert student.fuse_head_loss(objective)
        values = HeadLoss(objective, labels, hidden, weight, None)
        compiled = torch.compile(student, fullgraph=True, backend="eager")
        torch.testing.assert_close(
            compiled(input_ids=tokens, head_loss=values).loss, student(input_ids=tokens, head_loss=values).loss
        )


def test_micro_batches_share_the_quantised_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven layers twice: 14 weights, quantised once in each of 3 steps of 4 micro-batches."""
    computed = []
    compute = quantizers.fake_quantize
    monkeypatch.setattr(quantizers, "fake_quantize", lambda *a: computed.append(1) or compute(*a))
    changes = {"max_steps": 3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    weights = []
    for shares in (True, False):
        with monkeypatch.context() as patch:
            if not shares:
                patch.setattr(TSLDTrainer, "_keeps_weights", lambda self: False)
            computed.clear()
            trainer, _ = run(tmp_path, copy.deepcopy(ternary("llama")[0]), random_rows(12), DistillConfig(), **changes)
            assert len(computed) == (14 * 3 if shares else 14 * 12)
            weights.append(dict(trainer.model.named_parameters()))
    for name, parameter in weights[0].items():
        assert torch.equal(parameter, weights[1][name]), name


def test_fused_graph_runs_by_layers_with_recomputation(tmp_path: Path) -> None:
    runs = []
    for recompute in (True, False):
        model = copy.deepcopy(ternary("llama")[0])
        trainer, log = run(tmp_path, model, random_rows(4), DistillConfig(), gradient_checkpointing=recompute)
        assert trainer._objective is not None
        runs.append(log.values("loss"))
    assert runs[0] == pytest.approx(runs[1], rel=1e-6)


def test_padding_columns_of_the_loss_are_checked_against_the_head() -> None:
    with pytest.raises(DataError, match="outside the vocabulary of 97"):
        losses.check_targets(torch.tensor([[1, 97]]), 97, DistillConfig().terms())
