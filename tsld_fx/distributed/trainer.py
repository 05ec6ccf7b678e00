"""The training loop of FSDP2 and pipelines, with the settings, callbacks and checkpoints of transformers' Trainer."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DefaultFlowCallback,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import CallbackHandler

from tsld_fx.distill import DistillConfig
from tsld_fx.distributed.config import ParallelConfig
from tsld_fx.distributed.data import Batch, StepBatches, rows_in_order
from tsld_fx.distributed.engine import Engine
from tsld_fx.distributed.fsdp import FsdpEngine
from tsld_fx.distributed.optimizer import check_arguments, make_optimizer, make_scheduler
from tsld_fx.distributed.pipeline import PipelineEngine, check_pipeline
from tsld_fx.distributed.ranks import Ranks
from tsld_fx.distributed.saved_run import SavedRun
from tsld_fx.errors import ConfigError
from tsld_fx.perplexity import Perplexity, windows
from tsld_fx.prepared import PreparedModel
from tsld_fx.sample_checks import check_samples
from tsld_fx.trainer import check_teacher

logger = logging.getLogger(__name__)


class DistributedTrainer(SavedRun):
    """Quantisation-aware training of a model that is spread over processes.

    Every process of `torchrun --nproc-per-node N` makes one, with the same arguments, and calls `train`. What it
    computes is what TSLDTrainer computes in one process: a pipeline takes `gradient_accumulation_steps` micro-batches
    of `per_device_train_batch_size` sequences per step, whatever the number of processes; FSDP takes that many on each
    process. A resumed FSDP run keeps the micro-batches per step that it began with, also on another number of
    processes.

    Args:
        model: what `tsld_fx.prepare` returned, on the CPU or on this process's device. It is taken apart; `whole_model`
            puts the trained one together again.
        teacher: as for TSLDTrainer; with args.bf16 it is stored in bfloat16.
        args: transformers' TrainingArguments.
        parallel: mode `fsdp` or `pipeline`.
        train_dataset, eval_dataset: items with input_ids and labels [T], all of one length in a pipeline.
        keep_teacher: hold a teacher that the method does not need, to evaluate it.

    Raises:
        TsldError: on every process, before anything is moved: arguments that contradict each other or the model.
    """

    def __init__(
        self,
        model: PreparedModel,
        teacher: PreTrainedModel | None,
        args: TrainingArguments,
        train_dataset: Any,
        *,
        distill: DistillConfig | None = None,
        parallel: ParallelConfig | None = None,
        eval_dataset: Any = None,
        callbacks: Sequence[TrainerCallback] = (),
        data_collator: Callable[[list[Any]], Any] | None = None,
        ranks: Ranks | None = None,
        keep_teacher: bool = False,
    ) -> None:
        self.args, self.parallel, self.distill = args, parallel or ParallelConfig("fsdp"), distill or DistillConfig()
        self.ranks = ranks or Ranks.start(args.use_cpu)
        self.train_dataset, self.eval_dataset, self._collate = train_dataset, eval_dataset, data_collator
        self._micro_batches = args.gradient_accumulation_steps
        if self.parallel.mode == "fsdp":
            self._micro_batches *= self.ranks.world_size
        keep_teacher = keep_teacher or self.distill.needs_teacher
        self.engine = self._start(model, teacher if keep_teacher else None)
        self.optimizer = make_optimizer(model, self.engine.parameters, args)
        shown = [*callbacks] if self.ranks.is_first else []
        self.callbacks = CallbackHandler([DefaultFlowCallback(), *shown], model, None, self.optimizer, None)
        self.state, self.control = TrainerState(), TrainerControl()
        self.state.is_world_process_zero = self.state.is_local_process_zero = self.ranks.is_first

    def _start(self, model: PreparedModel, teacher: PreTrainedModel | None) -> Engine:
        self.ranks.agree(lambda: self._check(model, teacher))
        if self.args.gradient_checkpointing:
            model.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)
            if self.parallel.mode == "pipeline" and self.parallel.schedule in ("zero_bubble", "zbv"):
                logger.warning(
                    "gradient_checkpointing with %s: each layer is computed again several times over. Leave it out, or "
                    "use 1f1b.", self.parallel.schedule,
                )  # fmt: skip
        set_seed(self.args.seed)
        with self.ranks.guard():
            if self.parallel.mode == "fsdp":
                return FsdpEngine(
                    model, teacher, self.distill, self.ranks, bf16=self.args.bf16, param_dtype=self.parallel.param_dtype
                )
            return PipelineEngine(
                model, teacher, self.distill, self.ranks,
                schedule=self.parallel.schedule, micro_batches=self._micro_batches, bf16=self.args.bf16,
            )  # fmt: skip

    def _check(self, model: PreparedModel, teacher: PreTrainedModel | None) -> None:
        """Refuse everything that can be refused before anything is moved."""
        check_arguments(self.args)
        if not isinstance(model, PreparedModel):
            raise ConfigError(f"DistributedTrainer: model is a {type(model).__name__}; it must come from prepare().")
        if self.parallel.mode == "ddp":
            raise ConfigError("DistributedTrainer: mode 'ddp' is served by TSLDTrainer, one process per device.")
        if self.distill.teacher_cache:
            raise ConfigError(
                f"distill.teacher_cache={self.distill.teacher_cache!r} is not supported with --parallel fsdp and "
                "pipeline: no process sees all samples. Leave it out, or use --parallel ddp."
            )
        if self.distill.needs_teacher or teacher is not None:
            check_teacher(teacher, model)
        check_samples(self.train_dataset, model, stacked=self._collate is None)
        self._batches(self._micro_batches)
        if self.parallel.mode == "pipeline":
            world, schedule = self.ranks.world_size, self.parallel.schedule
            if schedule == "zbv" and world > 1 and self.ranks.device.type == "cpu" and torch.__version__ < (2, 13):
                raise ConfigError(
                    f"parallel.schedule='zbv': its transfers over gloo hang with torch {torch.__version__}. "
                    "Use zero_bubble, GPUs, or torch 2.13."
                )
            check_pipeline(model, self.distill, world, schedule, self._micro_batches)

    def _batches(self, count: int) -> StepBatches:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        size = self.args.per_device_train_batch_size
        return StepBatches(self.train_dataset, size, count, seed, self._collate)

    # ------------------------------------------------------------ training
    def train(self, resume_from_checkpoint: str | Path | None = None) -> TrainerState:
        """Train to the last step, from a checkpoint if one is given.

        Raises:
            TsldError: on every process, with the cause that stopped one of them; the last whole checkpoint stays good.
        """
        with self.ranks.guard():
            return self._train(resume_from_checkpoint)

    def _train(self, resume: str | Path | None) -> TrainerState:
        args = self.args
        if resume is not None:
            self._micro_batches = self.ranks.agree(lambda: self._recorded_micro_batches(Path(resume)))
        batches = self._batches(self._micro_batches)
        self.state.max_steps = batches.total_steps(args.max_steps, args.num_train_epochs)
        self.state.num_train_epochs = math.ceil(self.state.max_steps / batches.steps_per_epoch)
        self.scheduler = make_scheduler(self.optimizer, args, self.state.max_steps)
        self.callbacks.lr_scheduler = self.scheduler
        if resume is not None:
            self._resume(Path(resume))
        self.state.compute_steps(args, self.state.max_steps)
        self._call("on_train_begin")
        self._sums: list[dict[str, float]] = []
        while self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            step = self.state.global_step
            if step % batches.steps_per_epoch == 0:
                self._call("on_epoch_begin")
            self._call("on_step_begin")
            mine = self.ranks.agree(lambda: batches.step(step, self.engine.share))  # noqa: B023
            norm = self._step(mine)
            self.state.global_step += 1
            self.state.epoch = self.state.global_step / batches.steps_per_epoch
            self._call("on_step_end")
            self._follow(norm)
            if self.state.global_step % batches.steps_per_epoch == 0:
                self._call("on_epoch_end")
                self._follow(norm)
        self._call("on_train_end")
        return self.state

    def _step(self, batches: Sequence[Batch]) -> float:
        """One optimiser step; losses that are not finite stop it before they reach the weights."""
        engine = self.engine
        engine.zero_grad()
        engine.forward_backward(batches)
        losses = engine.take_losses()
        self._check_finite(losses)
        norm = engine.clip(self.args.max_grad_norm or 0.0)
        self.optimizer.step()
        self.scheduler.step()
        self._sums.append(losses)
        return norm

    def _check_finite(self, losses: dict[str, float]) -> None:
        if not math.isfinite(losses["loss"]):
            rank = next(r for r, loss in enumerate(self.engine.last_by_rank) if not math.isfinite(loss))
            error = self._not_finite(f"the loss of process {rank} is {self.engine.last_by_rank[rank]}")
            raise self.ranks.agreed(error if self.ranks.is_first else None, str(error))

    def _call(self, event: str, **kwargs: Any) -> None:
        """Tell the callbacks of the first process, and give every process what they decided."""
        control = getattr(self.callbacks, event)(self.args, self.state, self.control, **kwargs)
        self.control = TrainerControl(**{k: v for k, v in self.ranks.gather(vars(control))[0].items()})

    def _follow(self, norm: float) -> None:
        """Log, evaluate and save where the callbacks asked for it."""
        control = self.control
        if control.should_log and self._sums:
            count = len(self._sums)
            logs = {name: sum(s[name] for s in self._sums) / count for name in self._sums[0]}
            self._sums = []
            rates = {"grad_norm": norm, "learning_rate": self.scheduler.get_last_lr()[0]}
            self._log({"loss": logs.pop("loss"), **rates, **{k: round(v, 4) for k, v in logs.items()}})
        if control.should_evaluate:
            self._call("on_evaluate", metrics=self.evaluate())
        if control.should_save:
            self.save_checkpoint()
            self._call("on_save")

    def _log(self, logs: dict[str, float]) -> None:
        self.state.log_history.append({**logs, "epoch": self.state.epoch, "step": self.state.global_step})
        self._call("on_log", logs=logs)

    # ------------------------------------------------------------ evaluation
    def evaluate(self) -> dict[str, float]:
        """Cross-entropy and perplexity on the evaluation data set; logged, and compared with the best so far."""
        if self.eval_dataset is None:
            return {}
        batches = rows_in_order(self.eval_dataset, self.args.per_device_eval_batch_size, self._collate)
        total, count = self.engine.nll(batches, autocast=True)
        loss = total / count
        metrics = {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}
        self._log(metrics)
        if self.state.best_metric is None or loss < self.state.best_metric:
            self.state.best_metric, self.state.best_global_step = loss, self.state.global_step
            self.state.best_model_checkpoint = str(self._folder())
        return metrics

    def perplexity(self, tokens: Tensor, length: int, *, of_teacher: bool = False) -> Perplexity:
        """Perplexity of a token stream in windows that do not overlap, as `tsld_fx.perplexity` gives it."""
        found = windows(tokens, length, length, self.args.per_device_eval_batch_size, overlap=False)
        batches = [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": y} for i, y in found]
        with self.ranks.guard():
            total, count = self.engine.nll(batches, of_teacher=of_teacher)
        loss = total / count
        return Perplexity(math.exp(min(loss, 700.0)), loss, count)
