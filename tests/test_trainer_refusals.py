"""What TSLDTrainer refuses, and that a NaN leaves the last good checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.models import VOCABULARY, build, ternary
from tests.tiny_runs import arguments, random_rows
from tsld_fx import DistillConfig, PreparedModel, QuantConfig, TernaryWeight, TSLDTrainer, prepare
from tsld_fx.errors import CheckpointError, ConfigError, DataError, TrainingError
from tsld_fx.runs import last_whole_checkpoint
from tsld_fx.task_data import collate


def student() -> PreparedModel:
    return copy.deepcopy(ternary("llama")[0])


def trainer(folder: Path, model: Any = None, **changes: Any) -> TSLDTrainer:
    given = {
        "model": student() if model is None else model, "teacher": build("llama", seed=7),
        "args": arguments(folder), "train_dataset": random_rows(), **changes,
    }  # fmt: skip
    return TSLDTrainer(**given)


def test_teacher_that_shares_storage_is_refused(tmp_path: Path) -> None:
    model = build("llama")
    prepared = prepare(model)
    with pytest.raises(TrainingError, match=r"shares storage with the student \('model\.embed_tokens\.weight'\)"):
        trainer(tmp_path, prepared, teacher=model)
    one_tensor = build("llama", seed=7)
    one_tensor.model.norm.weight = prepared.model.norm.weight
    with pytest.raises(TrainingError, match=r"'model\.norm\.weight'.*Load the teacher a second time"):
        trainer(tmp_path, prepared, teacher=one_tensor)


@pytest.mark.parametrize("method", ["logit", "logit_gt", "l2l", "tsld"])
def test_missing_teacher_is_refused(method: Any, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="needs a teacher, got NoneType"):
        trainer(tmp_path, teacher=None, distill=DistillConfig(method))


def test_ground_truth_needs_no_teacher(tmp_path: Path) -> None:
    result = trainer(tmp_path, teacher=None, distill=DistillConfig("gt")).train()
    assert result.global_step == 4


def test_teacher_of_another_vocabulary_is_refused_with_both_sizes(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=rf"has {VOCABULARY + 4} tokens, the student's {VOCABULARY}"):
        trainer(tmp_path, teacher=build("llama", vocab_size=VOCABULARY + 4))
    assert not list(tmp_path.iterdir())


def test_model_that_was_not_prepared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM; it must come from tsld_fx\.prepare"):
        trainer(tmp_path, build("llama"))


def test_frozen_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="requires_grad=False, so there is nothing to train"):
        trainer(tmp_path, student().requires_grad_(False))


def test_accelerates_fsdp_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--parallel fsdp"):
        trainer(tmp_path, args=arguments(tmp_path, fsdp="full_shard"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="--parallel fsdp"):
        trainer(tmp_path)


def test_separate_documents_without_the_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs `segment_ids`"):
        trainer(tmp_path, distill=DistillConfig(separate_documents=True)).train()


@pytest.mark.parametrize("method", ["gt", "logit", "tsld"])
def test_labels_out_of_range_are_refused(method: Any, tmp_path: Path) -> None:
    rows = random_rows(4)
    rows.columns["labels"][:, 5] = VOCABULARY
    with pytest.raises(DataError, match=rf"labels\[0, 5\] = {VOCABULARY} is outside the vocabulary of {VOCABULARY}"):
        trainer(tmp_path, train_dataset=rows, distill=DistillConfig(method)).train()


@pytest.mark.parametrize("method", ["gt", "logit", "tsld"])
def test_batch_with_every_label_masked_is_refused(method: Any, tmp_path: Path) -> None:
    rows = random_rows(4)
    rows.columns["labels"][:] = -100
    with pytest.raises(DataError, match="every label of this batch is -100"):
        trainer(tmp_path, train_dataset=rows, distill=DistillConfig(method)).train()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no samples"),
        (
            [{"input_ids": torch.arange(n), "labels": torch.arange(n)} for n in (4, 5)],
            "sample 0 has 4 tokens, sample 1",
        ),
        ([{"input_ids": [1, VOCABULARY], "labels": [1, 2]}], f"token {VOCABULARY} is outside"),
        ([{"input_ids": [1, -2], "labels": [1, 2]}], "token -2 is outside"),
    ],
)
def test_samples_that_no_batch_can_be_made_of_are_refused(rows: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        trainer(tmp_path, train_dataset=rows).train()


def test_samples_of_several_lengths_train_with_a_collator_that_pads(tmp_path: Path) -> None:
    rows = [{"input_ids": torch.arange(n), "labels": torch.arange(n)} for n in range(4, 12)]
    assert trainer(tmp_path, train_dataset=rows, data_collator=collate).train().global_step == 4


def test_batch_without_labels_is_refused(tmp_path: Path) -> None:
    rows = random_rows(4)
    del rows.columns["labels"]
    with pytest.raises(DataError, match="the batch has no labels"):
        trainer(tmp_path, train_dataset=rows).train()


class Poison(TrainerCallback):
    """Puts a value into one weight after a step."""

    def __init__(self, step: int, value: float) -> None:
        self.step, self.value = step, value

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                model.model.norm.weight[0] = self.value


@pytest.mark.parametrize(("value", "step"), [(float("nan"), 3), (float("inf"), 4)])
def test_weight_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
    value: float, step: int, tmp_path: Path
) -> None:
    """Poisoned after step 3 the next loss is NaN; after step 4 the checkpoint of that step would hold it."""
    args = arguments(tmp_path, max_steps=8, save_strategy="steps", save_steps=2)
    running = trainer(tmp_path, args=args, callbacks=[Poison(step, value)])
    with pytest.raises(TrainingError, match=rf"stopped at step {step}: .*last good checkpoint is .*checkpoint-2"):
        running.train()
    good = last_whole_checkpoint(tmp_path)
    assert good is not None and good.name == "checkpoint-2"
    assert all(bool(t.isfinite().all()) for t in load_file(good / "model.safetensors").values())
    resumed = trainer(tmp_path, args=args)
    assert resumed.train(resume_from_checkpoint=True).global_step == 8


def test_nan_loss_reaches_no_weight(tmp_path: Path) -> None:
    model = student()
    running = trainer(tmp_path, model, callbacks=[Poison(2, float("nan"))])
    with pytest.raises(TrainingError, match=r"stopped at step 2: the loss is nan; no checkpoint was written"):
        running.train()
    bad = [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]
    assert bad == ["model.norm.weight"]


def test_checkpoints_that_do_not_belong_to_the_model_are_refused(tmp_path: Path) -> None:
    every = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer(tmp_path, args=every).train()
    last = last_whole_checkpoint(tmp_path)
    assert last is not None
    others = {
        "weight.scale was 'twn' there and is 'lsq' now": prepare(build("llama"), QuantConfig(TernaryWeight("lsq"))),
        r"down_proj.weight. has shape \[32, 44\] there, \[32, 64\] here": prepare(build("llama", intermediate_size=64)),
    }
    for message, model in others.items():
        with pytest.raises(CheckpointError, match=message):
            trainer(tmp_path, model, args=every).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match=r"nowhere: no whole checkpoint"):
        trainer(tmp_path, args=every).train(resume_from_checkpoint=str(tmp_path / "nowhere"))
    file = last / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"optimizer\.pt: cut short"):
        trainer(tmp_path, args=every).train(resume_from_checkpoint=str(last))


def test_resuming_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no whole checkpoint to resume from"):
        trainer(tmp_path).train(resume_from_checkpoint=True)
