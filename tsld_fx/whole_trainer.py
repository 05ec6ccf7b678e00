"""A Trainer whose checkpoints are whole or ignored, and that stops at the first NaN or Inf."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import Trainer, TrainerState, default_data_collator
from transformers.trainer_utils import TrainOutput

from tsld_fx.distributed.ranks import Ranks, finite_everywhere
from tsld_fx.errors import CheckpointError, TrainingError
from tsld_fx.quantizers import all_finite
from tsld_fx.runs import check_checkpoint, first_difference, last_whole_checkpoint, mark_whole, unmark_whole
from tsld_fx.sample_checks import check_samples


class WholeCheckpointTrainer(Trainer):
    """A Trainer whose checkpoints are whole or ignored, and that stops at the first NaN or Inf."""

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Trainer.train; with `resume_from_checkpoint=True` it takes the last checkpoint that was written whole.

        Raises:
            TsldError: samples that no batch can be made of, or no good checkpoint to resume from.
        """
        check_samples(self.train_dataset, self.model, stacked=self.data_collator is default_data_collator)
        if resume_from_checkpoint:
            found = last_whole_checkpoint(self.args.output_dir)
            given = found if resume_from_checkpoint is True else Path(resume_from_checkpoint)
            if given is None or not given.is_dir():
                raise CheckpointError(
                    f"{given or self.args.output_dir}: no whole checkpoint to resume from. Start without "
                    "resume_from_checkpoint."
                )
            check_checkpoint(given)
            self._check_same_model(given)
            resume_from_checkpoint = str(given)
        if resume_from_checkpoint and (state := self._finished_state(Path(resume_from_checkpoint))) is not None:
            best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
            self.state = state
            self._load_from_checkpoint(best or str(resume_from_checkpoint))
            return TrainOutput(state.global_step, 0.0, {})
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _check_same_model(self, checkpoint: Path) -> None:
        """Refuse the checkpoint of a model that was quantised in another way, or has other shapes."""
        again = "Resume with the model that it was made from, or start without resume_from_checkpoint."
        model, file = self.accelerator.unwrap_model(self.model), checkpoint / "config.json"
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        before, now = config.get("tsld_fx"), getattr(model.config, "tsld_fx", None)
        if file.is_file() and before != now:
            raise CheckpointError(
                f"{checkpoint}: the checkpoint of another model: {first_difference(before, now)}. {again}"
            )
        if self.is_deepspeed_enabled:  # it keeps shares of the tensors
            return
        wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        for weights in checkpoint.glob("*.safetensors"):
            with safe_open(weights, framework="np") as stored:
                shapes = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
            for name, shape in shapes.items():
                if wanted.get(name) != shape:
                    raise CheckpointError(
                        f"{checkpoint}: tensor {name!r} has shape {shape} there, {wanted.get(name)} here. {again}"
                    )

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
