"""TSLDTrainer: transformers' Trainer with a teacher and the distillation losses."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tsld_fx import losses
from tsld_fx.cached_samples import FIELDS, CachedBatches, CachedSamples
from tsld_fx.config import check_type
from tsld_fx.distill import DistillConfig, LossTerm
from tsld_fx.distributed.objective import learnable
from tsld_fx.distributed.objective import objective as plain_objective
from tsld_fx.errors import ConfigError, DataError, TrainingError
from tsld_fx.fused_loss import GROUND_TRUTH, HeadLoss, objective_of
from tsld_fx.fused_loss_chunks import Objective
from tsld_fx.headless import HeadlessModel, without_head
from tsld_fx.lean_trainer import LeanTrainer, check_sharding
from tsld_fx.preparation import graph_model
from tsld_fx.prepared import PreparedModel
from tsld_fx.prepared_state import PreparedOutput
from tsld_fx.teacher_cache import TOP, TeacherCache
from tsld_fx.teacher_checks import check_teacher
from tsld_fx.top_logits import TopLogits, top_of_head
from tsld_fx.whole_trainer import WholeCheckpointTrainer

logger = logging.getLogger(__name__)
_FEED = ("input_ids", "attention_mask", "position_ids")


class TSLDTrainer(LeanTrainer):
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

    train_dataset: Any
    data_collator: Any

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
        check_type("TSLDTrainer", self.distill, DistillConfig)
        check_sharding(kwargs.get("args"))
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
        compiles = self.args.torch_compile and self.teacher is not None
        self._run_teacher: Any = self._compiled(self.teacher) if compiles else self.teacher
        self._loss_only = False
        self._ready_steps()
        self._head: HeadlessModel | None = None
        self._objective = self._fused_objective(model)
        self._cache = self._open_cache() if self.distill.teacher_cache else None
        self._row: tuple[Any, ...] | None = None  # of the batch that runs, to be cached

    def _ready_teacher(self, teacher: PreTrainedModel) -> PreTrainedModel:
        teacher = teacher.eval().to(self.args.device)  # no_grad keeps it from training
        return graph_model(teacher, None, self.distill.taps).eval() if self.distill.taps else teacher

    def _fused_objective(self, model: PreparedModel) -> Objective | None:
        """The objective in the form of tsld::head_loss; None where head and losses cannot be one operator."""
        objective = objective_of(self.distill.terms()) if self.distill.fused else None
        if objective is None:
            return None
        if not model.fuse_head_loss(objective) or not model.fuse_head_loss(GROUND_TRUTH):
            return None
        if self.teacher is not None:
            self._head = without_head(self.teacher)
            if self._head is None:
                logger.info(
                    "the teacher's logits are not the plain result of a linear head: losses run on whole logits"
                )
                return None
            if self.args.torch_compile:
                self._head = HeadlessModel(self._compiled(self._head.body), self._head.head)
        return objective

    def _open_cache(self) -> TeacherCache | None:
        """Let the training samples carry the teacher's rows."""
        if self._objective is None or self._head is None or self.train_dataset is None:
            raise ConfigError(
                f"TSLDTrainer: teacher_cache={self.distill.teacher_cache!r} needs training data and a teacher whose "
                "logits are the plain result of a linear head, as the student's. Leave it out."
            )
        folder = self.distill.cache_folder or Path(self.args.output_dir) / "teacher_cache"
        kind, scored = self.distill.teacher_cache or "", _has_tsld(self.distill)
        assert self.teacher is not None
        count, vocabulary = self.distill.cached_logits, self._head.weight.shape[0]
        if kind == "top_logits" and count > vocabulary:
            raise ConfigError(
                f"DistillConfig: cached_logits={count} is more than the vocabulary of {vocabulary} tokens. Lower it."
            )
        cache = TeacherCache(folder, kind, self.train_dataset, self.teacher, scored, count)
        self.train_dataset = CachedSamples(self.train_dataset, cache)
        self.data_collator = CachedBatches(self.data_collator)
        return cache

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch, and its rows into the teacher's cache."""
        loss = super().training_step(*args, **kwargs)
        if self._cache is not None and self._row is not None:
            samples, prints, *values = self._row
            self._cache.put(samples.tolist(), prints.tolist(), *values)
        return loss

    def _compiled(self, module: nn.Module) -> Any:
        """The teacher compiled as TrainingArguments asks for the student."""
        mode, backend = self.args.torch_compile_mode, self.args.torch_compile_backend
        return torch.compile(module, **{k: v for k, v in (("mode", mode), ("backend", backend)) if v is not None})

    # ------------------------------------------------------------ the loss
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The objective in training, the ground-truth cross-entropy in evaluation."""
        feed, labels, segment_ids = self._batch(inputs, model.training)
        if self._objective is not None and (self._loss_only or not return_outputs):
            loss = self._fused_loss(model, feed, labels, segment_ids, inputs)
            return (loss, {}) if return_outputs else loss
        outputs: PreparedOutput = model(**feed)
        loss = self._plain_loss(outputs, feed, labels, segment_ids) if model.training else None
        if loss is None:
            loss = losses.ground_truth(outputs.logits, labels)
        return (loss, {"logits": outputs.logits}) if return_outputs else loss

    def _batch(self, inputs: dict[str, Any], training: bool) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        """What the models read, the labels without padding, and the documents if they are told apart."""
        labels = inputs.get("labels")
        if labels is None:
            raise DataError(
                "TSLDTrainer: the batch has no labels. Give labels = input_ids with -100 where nothing is to be learnt."
            )
        feed = {name: inputs[name] for name in _FEED if inputs.get(name) is not None}
        labels = learnable(labels, feed.get("attention_mask"))
        separate = self.distill.separate_documents and training  # evaluation is the ground truth's cross-entropy
        segment_ids = inputs.get("segment_ids") if separate else None
        if separate and segment_ids is None and _has_tsld(self.distill):
            raise DataError(
                "DistillConfig(separate_documents=True) needs `segment_ids` [B, T] in every batch. "
                "Add the column to the data set, or set separate_documents=False."
            )
        return feed, labels, segment_ids

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, without logits where nothing asks for them."""
        self._loss_only = prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        finally:
            self._loss_only = False

    def _check_batch(self, inputs: dict[str, Any]) -> None:
        self._check_labels(self._batch(self._prepare_inputs(inputs), True)[1], self.distill.terms())

    def _check_labels(self, labels: Tensor, terms: tuple[LossTerm, ...]) -> None:
        head = self.accelerator.unwrap_model(self.model).get_output_embeddings()
        losses.check_targets(labels, head.weight.shape[0], terms)

    def _fused_loss(
        self, model: nn.Module, feed: dict[str, Tensor], labels: Tensor, segment_ids: Tensor | None, inputs: Any
    ) -> Tensor:
        objective = self._objective if model.training else GROUND_TRUTH
        assert objective is not None
        if not model.training or not labels.is_cuda:  # in training on a GPU a loss of NaN tells, without a wait
            self._check_labels(labels, self.distill.terms() if model.training else (LossTerm("gt"),))
        guide: dict[str, Any] = {}
        if self._head is not None and objective.needs_teacher and self.distill.teacher_cache == "top_logits":
            guide = {"top": self._top_logits(feed, labels, inputs), "segment_ids": segment_ids}
        elif self._head is not None and objective.needs_teacher:
            hidden = inputs.get("teacher_hidden")
            if hidden is None:
                with torch.no_grad():
                    hidden = self._head.body(**feed, use_cache=False).logits
            guide = {
                "teacher_hidden": hidden,
                "teacher_weight": self._head.weight,
                "teacher_bias": self._head.bias,
                "segment_ids": segment_ids,
                "token_scores": inputs.get("token_scores") if _has_tsld(self.distill) else None,
            }
        outputs: PreparedOutput = model(**feed, head_loss=HeadLoss(objective, labels, **guide))
        assert outputs.loss is not None and outputs.loss_terms is not None
        if model.training:
            for term, value in zip(self.distill.terms(), outputs.loss_terms.detach().unbind(), strict=True):
                self._step_parts[f"loss_{term.kind}"].append(value)
            self._row = self._row_of(inputs, guide, outputs.token_scores, labels)
        return outputs.loss

    def _top_logits(self, feed: dict[str, Tensor], labels: Tensor, inputs: Any) -> TopLogits:
        """The most likely tokens of the teacher, from the cache or from a run of it."""
        if TOP[0] in inputs:
            indices, log_probs, rest = (inputs[name] for name in TOP)
            return TopLogits(indices, log_probs, rest, inputs["token_scores"])
        assert self._head is not None
        with torch.no_grad():
            hidden = self._head.body(**feed, use_cache=False).logits
        return top_of_head(hidden, self._head.weight, self._head.bias, labels, self.distill.cached_logits)

    def _row_of(
        self, inputs: Any, guide: dict[str, Any], scores: Tensor | None, labels: Tensor
    ) -> tuple[Any, ...] | None:
        """What the cache does not have yet of this batch."""
        if self._cache is None or "token_scores" in inputs or "tsld_sample" not in inputs:
            return None
        if (top := guide.get("top")) is not None:
            kept = (top.indices, top.log_probs, top.rest)
            return inputs["tsld_sample"], inputs["tsld_print"], top.scores, None, kept
        if (hidden := guide.get("teacher_hidden")) is None:
            return None
        if scores is None or not scores.numel():
            scores = torch.zeros(labels[:, 1:].shape, device=labels.device)
        return inputs["tsld_sample"], inputs["tsld_print"], scores, hidden

    def _plain_loss(
        self, student: PreparedOutput, feed: dict[str, Tensor], labels: Tensor, segment_ids: Tensor | None
    ) -> Tensor:
        teacher = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher = self._run_teacher(**feed, use_cache=False)
        total, parts = plain_objective(self.distill, student, teacher, labels, feed.get("attention_mask"), segment_ids)
        for name, value in parts.items():
            self._step_parts[name].append(value)
        return total

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

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [n for n in ("segment_ids", *FIELDS) if n not in self._signature_columns]


def _has_tsld(distill: DistillConfig) -> bool:
    return any(term.kind == "tsld" for term in distill.terms())


__all__ = ["TSLDTrainer", "WholeCheckpointTrainer", "check_teacher"]
