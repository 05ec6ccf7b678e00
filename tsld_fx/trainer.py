"""TSLDTrainer: transformers' Trainer with a teacher and the distillation losses."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.trainer_utils import TrainOutput

from tsld_fx import losses
from tsld_fx.distill import DistillConfig, LossTerm
from tsld_fx.errors import CheckpointError, ConfigError, DataError, TrainingError
from tsld_fx.prepared import PreparedModel, PreparedOutput, graph_model
from tsld_fx.quantizers import all_finite
from tsld_fx.runs import last_whole_checkpoint, mark_whole, unmark_whole

_FEED = ("input_ids", "attention_mask", "position_ids")


class WholeCheckpointTrainer(Trainer):
    """A Trainer whose checkpoints are whole or ignored, and that stops at the first NaN or Inf."""

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Trainer.train; with `resume_from_checkpoint=True` it takes the last checkpoint that was written whole."""
        if resume_from_checkpoint is True:
            found = last_whole_checkpoint(self.args.output_dir)
            if found is None:
                raise CheckpointError(
                    f"{self.args.output_dir}: no whole checkpoint to resume from. Start without resume_from_checkpoint."
                )
            resume_from_checkpoint = str(found)
        if resume_from_checkpoint and (state := self._finished_state(Path(resume_from_checkpoint))) is not None:
            best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
            self.state = state
            self._load_from_checkpoint(best or str(resume_from_checkpoint))
            return TrainOutput(state.global_step, 0.0, {})
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _finished_state(self, checkpoint: Path) -> TrainerState | None:
        """The state in a checkpoint that this training ended with, None if there are steps left.

        Trainer itself would train one step more: it looks whether to stop after each step.
        """
        file = checkpoint / "trainer_state.json"
        if not file.is_file():
            return None
        state = TrainerState.load_from_json(str(file))
        control = state.stateful_callbacks.get("TrainerControl", {})
        steps, epochs = self.args.max_steps, self.args.num_train_epochs
        same = state.max_steps == steps if steps > 0 else state.num_train_epochs == math.ceil(epochs)
        return state if same and control.get("args", {}).get("should_training_stop") else None

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        for name, parameter in self.accelerator.unwrap_model(self.model).named_parameters():
            if not all_finite(parameter):
                raise TrainingError(self._not_finite(f"'{name}' holds NaN or Inf"))
        if self.args.should_save:
            unmark_whole(self.args.output_dir, self.state.global_step)
        super()._save_checkpoint(*args, **kwargs)
        if self.args.should_save:
            mark_whole(self.args.output_dir, self.state.global_step)

    def _not_finite(self, what: str) -> str:
        found = last_whole_checkpoint(self.args.output_dir)
        kept = f"the last good checkpoint is {found}" if found else "no checkpoint was written before it"
        return (
            f"training stopped at step {self.state.global_step}: {what}; {kept}. "
            "Lower the learning rate, set max_grad_norm, or use bf16 instead of fp16; then resume."
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the perplexity beside every evaluation loss."""
        super().log(logs | _perplexities(logs), *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's evaluation with `<prefix>_perplexity` added."""
        metrics = super().evaluate(*args, **kwargs)
        return metrics | _perplexities(metrics)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One step; a loss that is NaN or Inf ends the training before it reaches the weights."""
        loss: Tensor = super().training_step(*args, **kwargs)
        if not bool(torch.isfinite(loss)):
            raise TrainingError(self._not_finite(f"the loss is {float(loss)}"))
        return loss


class TSLDTrainer(WholeCheckpointTrainer):
    """Quantisation-aware training against a full-precision teacher.

    A transformers Trainer in everything else: its arguments, callbacks, checkpoints, resume and accelerate.
    The loss of a step is averaged over gradient-accumulation steps and over devices (see `DistillConfig` for what
    `reduction` means inside one micro-batch). Evaluation reports the cross-entropy with the ground truth and
    `eval_perplexity`. Learned scales train at `QuantConfig.scale_lr_ratio` times the learning rate, without decay.

    Args:
        model: what `tsld_fx.prepare` returned.
        teacher: any causal language model with the student's vocabulary, in any precision; it is put into eval mode,
            moved to the training device, never trained and never saved. None only for method `gt`.
        distill: the objective (default: TSLD with ground truth). The taps that it needs are turned on here.
        args, kwargs: as for transformers.Trainer. Batches hold input_ids and labels [B, T] (unshifted, -100
            ignored), and optionally attention_mask, position_ids, segment_ids.

    Raises:
        TsldError: before training: no prepared model, a teacher that is missing, shares storage with the student or
            has another vocabulary. During training: a loss or a weight that is NaN or Inf stops the step; the last
            checkpoint stays good.
    """

    def __init__(
        self,
        model: PreparedModel | None = None,
        *,
        teacher: PreTrainedModel | None = None,
        distill: DistillConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, PreparedModel):
            raise ConfigError(
                f"TSLDTrainer: model is a {type(model).__name__}; it must come from tsld_fx.prepare(model, config)."
            )
        if not any(p.requires_grad for p in model.parameters()):
            raise TrainingError(
                "TSLDTrainer: every parameter of the student has requires_grad=False, so there is nothing to train. "
                "Call model.requires_grad_(True), or load the student anew."
            )
        self.distill = distill or DistillConfig()
        if self.distill.needs_teacher:
            check_teacher(teacher, model)
        super().__init__(model=model, **kwargs)
        if self.args.n_gpu > 1:
            raise TrainingError(
                f"TSLDTrainer: {self.args.n_gpu} GPUs in one process would be used through DataParallel, which cannot "
                "run a graph. Start one process per GPU (torchrun --nproc-per-node), or set CUDA_VISIBLE_DEVICES=0."
            )
        self.loss_is_scaled_for_ga = False  # newer transformers ask; older ones look at accepts_loss_kwargs
        model.set_taps(self.distill.taps)
        self.teacher = self._ready_teacher(teacher) if teacher is not None and self.distill.needs_teacher else None
        self._parts: dict[str, list[Tensor]] = defaultdict(list)

    def _ready_teacher(self, teacher: PreTrainedModel) -> PreTrainedModel:
        teacher = teacher.eval().to(self.args.device)  # no_grad keeps it from training
        return graph_model(teacher, None, self.distill.taps).eval() if self.distill.taps else teacher

    # ------------------------------------------------------------ the loss
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The objective in training, the ground-truth cross-entropy in evaluation."""
        labels = inputs.get("labels")
        if labels is None:
            raise DataError(
                "TSLDTrainer: the batch has no labels. Give labels = input_ids with -100 where nothing is to be learnt."
            )
        feed = {name: inputs[name] for name in _FEED if inputs.get(name) is not None}
        if "attention_mask" in feed:  # nothing to learn of padding, nor from it
            padding = feed["attention_mask"] == 0
            after = torch.nn.functional.pad(padding[:, :-1], (1, 0))
            labels = labels.masked_fill(padding | after, losses.IGNORE)
        outputs: PreparedOutput = model(**feed)
        loss = self._objective(outputs, feed, labels, inputs.get("segment_ids")) if model.training else None
        if loss is None:
            loss = losses.ground_truth(outputs.logits, labels)
        return (loss, {"logits": outputs.logits}) if return_outputs else loss

    def _objective(
        self, student: PreparedOutput, feed: dict[str, Tensor], labels: Tensor, segment_ids: Tensor | None
    ) -> Tensor:
        teacher = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher = self.teacher(**feed, use_cache=False)
        total = torch.zeros((), device=labels.device)
        for term in self.distill.terms():
            value = self._term(term, student, teacher, feed, labels, segment_ids)
            self._parts[f"loss_{term.kind}"].append(value.detach())
            total = total + term.weight * value
        return total

    def _term(
        self,
        term: LossTerm,
        student: PreparedOutput,
        teacher: Any,
        feed: dict[str, Tensor],
        labels: Tensor,
        segment_ids: Tensor | None,
    ) -> Tensor:
        mask = feed.get("attention_mask")
        if term.kind == "gt":
            return losses.ground_truth(student.logits, labels)
        if term.kind == "logit":
            return losses.logit_distillation(student.logits, teacher.logits, labels, term.temperature or 1.0)
        if term.kind == "tsld":
            if self.distill.separate_documents and segment_ids is None:
                raise DataError(
                    "DistillConfig(separate_documents=True) needs `segment_ids` [B, T] in every batch. "
                    "Add the column to the data set, or set separate_documents=False."
                )
            return losses.token_scaled_logit_distillation(
                student.logits, teacher.logits, labels, term.temperature or 10.0, term.reduction,
                segment_ids if self.distill.separate_documents else None,
            )  # fmt: skip
        if term.kind == "hidden":
            return losses.hidden_state_distillation(student.hidden_states or (), teacher.hidden_states or (), mask)
        ours, theirs = student.attention_scores or (), teacher.attention_scores or ()
        return losses.attention_distillation(ours, theirs, mask)

    # ------------------------------------------------------------ optimiser, logs
    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Trainer's optimiser with the learned scales in a group of their own."""
        existed = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        learned = [] if existed else [p for _, p in model.learned_scales() if p.requires_grad]
        if learned:
            ids = {id(p) for p in learned}
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in ids]
            rate = self.args.learning_rate * model.quant_config.scale_lr_ratio
            optimizer.add_param_group({"params": learned, "lr": rate, "weight_decay": 0.0})
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of each loss term since the last line."""
        if "loss" in logs:
            logs |= {name: round(float(torch.stack(v).mean()), 4) for name, v in self._parts.items() if v}
            self._parts.clear()
        super().log(logs, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "segment_ids" not in self._signature_columns:
            self._signature_columns.append("segment_ids")


def check_teacher(teacher: object, student: PreTrainedModel) -> None:
    """Refuse a teacher that is missing, is the student, or speaks another vocabulary.

    Raises:
        TrainingError: it says which.
    """
    if not isinstance(teacher, PreTrainedModel):
        raise TrainingError(
            f"TSLDTrainer: this method needs a teacher, got {type(teacher).__name__}. Give the full-precision model "
            "as teacher=, or use DistillConfig(method='gt')."
        )
    ours = {p.untyped_storage().data_ptr() for p in student.parameters() if p.numel() and not p.is_meta}
    shared = next((n for n, p in teacher.named_parameters() if p.untyped_storage().data_ptr() in ours), None)
    if shared is not None:
        raise TrainingError(
            f"TSLDTrainer: the teacher shares storage with the student ('{shared}'), so it would change while the "
            "student trains. Load the teacher a second time, or pass copy.deepcopy(model) taken before prepare."
        )
    theirs = teacher.config.get_text_config().vocab_size
    if theirs != student.config.get_text_config().vocab_size:
        raise TrainingError(
            f"TSLDTrainer: the teacher's vocabulary has {theirs} tokens, the student's "
            f"{student.config.get_text_config().vocab_size}. Both must use one tokenizer."
        )


def _perplexities(logs: dict[str, float]) -> dict[str, float]:
    pairs = ((k, v) for k, v in logs.items() if k.startswith("eval") and k.endswith("_loss"))
    return {f"{k.removesuffix('_loss')}_perplexity": math.exp(min(v, 700.0)) for k, v in pairs}
