"""A Trainer whose checkpoints are whole or ignored, and that stops at the first NaN or Inf."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerState, default_data_collator
from transformers.trainer_utils import TrainOutput

from tsld_fx.distributed.ranks import Ranks, finite_everywhere
from tsld_fx.errors import CheckpointError, TrainingError
from tsld_fx.quantizers import all_finite
from tsld_fx.runs import check_checkpoint, last_whole_checkpoint, mark_whole, unmark_whole
from tsld_fx.sample_checks import check_samples


class WholeCheckpointTrainer(Trainer):
    """A Trainer whose checkpoints are whole or ignored, and that stops at the first NaN or Inf."""

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Trainer.train; with `resume_from_checkpoint=True` it takes the last checkpoint that was written whole.

        Raises:
            TsldError: samples that no batch can be made of, or no good checkpoint to resume from.
        """
        check_samples(self.train_dataset, self.model, stacked=self.data_collator is default_data_collator)
        if resume_from_checkpoint is True:
            found = last_whole_checkpoint(self.args.output_dir)
            if found is None:
                raise CheckpointError(
                    f"{self.args.output_dir}: no whole checkpoint to resume from. Start without resume_from_checkpoint."
                )
            check_checkpoint(found)
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

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One step; a loss that is NaN or Inf on any process ends the training before it reaches the weights."""
        loss = self._micro_batch(model, inputs, *args, **kwargs)
        if self.args.world_size > 1:
            finite_everywhere(loss)
        if not bool(torch.isfinite(loss)):
            self._check_batch(inputs)
            where = f"the loss of process {self.args.process_index}" if self.args.world_size > 1 else "the loss"
            message = self._not_finite(f"{where} is {float(loss)}")
            raise Ranks.agreed(TrainingError(message), message)
        return loss

    def _micro_batch(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward pass of a micro-batch, without a wait for its result."""
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def _check_batch(self, inputs: dict[str, Any]) -> None:
        """Raise where the batch explains a loss that is not finite."""


def _perplexities(logs: dict[str, float]) -> dict[str, float]:
    pairs = ((k, v) for k, v in logs.items() if k.startswith("eval") and k.endswith("_loss"))
    return {f"{k.removesuffix('_loss')}_perplexity": math.exp(min(v, 700.0)) for k, v in pairs}
