"""The checkpoints of a run that is spread over processes: what the first process writes, and what all of them read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState, TrainingArguments

from tsld_fx.distributed.checkpoints import load_state, read_model, save_state
from tsld_fx.distributed.config import ParallelConfig
from tsld_fx.distributed.engine import Engine, local, put_parameter
from tsld_fx.distributed.ranks import Ranks
from tsld_fx.errors import CheckpointError, TrainingError
from tsld_fx.prepared import PreparedModel
from tsld_fx.quantizers import all_finite
from tsld_fx.runs import last_whole_checkpoint, mark_whole, unmark_whole
from tsld_fx.whole_files import write_json


class SavedRun:
    """What a trainer saves and takes up again; `DistributedTrainer` sets the attributes."""

    args: TrainingArguments
    parallel: ParallelConfig
    ranks: Ranks
    engine: Engine
    optimizer: torch.optim.Optimizer
    scheduler: Any
    state: TrainerState
    _micro_batches: int

    def _not_finite(self, what: str) -> TrainingError:
        found = last_whole_checkpoint(self.args.output_dir)
        kept = f"the last good checkpoint is {found}" if found else "no checkpoint was written before it"
        return TrainingError(
            f"training stopped at step {self.state.global_step}: {what}; {kept}. Lower the learning rate, or set "
            "max_grad_norm; then resume."
        )

    def _folder(self) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

    def save_checkpoint(self) -> None:
        """Write checkpoint-<step>; it counts only after every process has written its part.

        Raises:
            TrainingError: a weight is NaN or Inf.
        """
        self.ranks.agree(self._check_weights)
        folder, step = self._folder(), self.state.global_step
        if self.ranks.is_first:
            unmark_whole(self.args.output_dir, step)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self.ranks.barrier()
        save_state(folder, self.engine.parameters, self.optimizer, self.ranks.control)
        self.ranks.agree(lambda: self._save_rest(folder))
        if self.ranks.is_first:
            mark_whole(self.args.output_dir, step)
            self._forget_old()
        self.ranks.barrier()

    def _check_weights(self) -> None:
        for name, parameter in self.engine.parameters.items():
            if not all_finite(local(parameter.detach())):
                raise self._not_finite(f"'{name}' holds NaN or Inf")

    def _save_rest(self, folder: Path) -> None:
        cuda = torch.cuda.get_rng_state() if self.ranks.device.type == "cuda" else None
        torch.save({"cpu": torch.get_rng_state(), "cuda": cuda}, folder / f"rng_{self.ranks.rank}.pt")
        if self.ranks.is_first:
            self.state.save_to_json(str(folder / "trainer_state.json"))
            write_json(
                folder / "parallel.json",
                {
                    **self.parallel.to_dict(),
                    "world_size": self.ranks.world_size,
                    "micro_batch": self.args.per_device_train_batch_size,
                    "micro_batches": self._micro_batches,
                    "scheduler": self.scheduler.state_dict(),
                },
            )

    def _forget_old(self) -> None:
        if not self.args.save_total_limit:
            return
        found = [p for p in Path(self.args.output_dir).glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
        found.sort(key=lambda p: int(p.name.rpartition("-")[2]))
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        for folder in found[: -self.args.save_total_limit]:
            if str(folder) != best:
                shutil.rmtree(folder, ignore_errors=True)

    def _recorded_micro_batches(self, checkpoint: Path) -> int:
        """Micro-batches per step of the run that is resumed.

        Raises:
            CheckpointError: it cannot go on with these settings on this number of processes.
        """
        try:
            record = json.loads((checkpoint / "parallel.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            raise CheckpointError(
                f"{checkpoint}: not a checkpoint of --parallel fsdp or pipeline. Resume the run as it was started."
            ) from None
        count, size = record["micro_batches"], self.args.per_device_train_batch_size
        if record["micro_batch"] != size:
            raise CheckpointError(
                f"{checkpoint}: per_device_train_batch_size was {record['micro_batch']} there and is {size} now. "
                "Resume with the same settings."
            )
        if self.parallel.mode == "fsdp" and count % self.ranks.world_size:
            fitting = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
            raise CheckpointError(
                f"{checkpoint}: the run takes {count} micro-batches per step, which {self.ranks.world_size} processes "
                f"cannot share evenly. Resume on {fitting} processes."
            )
        if self.parallel.mode == "pipeline" and count != self._micro_batches:
            raise CheckpointError(
                f"{checkpoint}: gradient_accumulation_steps was {count} there and is {self._micro_batches} now. "
                "Resume with the same settings."
            )
        return int(count)

    def _resume(self, checkpoint: Path) -> None:
        steps = self.state.max_steps
        load_state(checkpoint, self.engine.parameters, self.optimizer, self.ranks.control)
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self.state.max_steps = steps
        self.state.is_world_process_zero = self.state.is_local_process_zero = self.ranks.is_first
        record = json.loads((checkpoint / "parallel.json").read_text(encoding="utf-8"))
        self.scheduler.load_state_dict(record["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        file = checkpoint / f"rng_{self.ranks.rank}.pt"
        if record["world_size"] == self.ranks.world_size and file.is_file():
            saved = torch.load(file, weights_only=True)
            torch.set_rng_state(saved["cpu"])
            if saved["cuda"] is not None and self.ranks.device.type == "cuda":
                torch.cuda.set_rng_state(saved["cuda"])

    def load_best(self) -> None:
        """Take the weights of the best evaluation."""
        if self.state.best_model_checkpoint:
            load_state(Path(self.state.best_model_checkpoint), self.engine.parameters, None, self.ranks.control)

    def whole_model(self) -> PreparedModel | None:
        """The trained model on the first process's CPU, read from the last (or best) checkpoint; None elsewhere.

        The trainer is of no use afterwards.
        """
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        folder = best or str(self._folder())
        if not self.ranks.is_first:
            return None
        student, device = self.engine.student, torch.device("cpu")
        values = {n: torch.nn.Parameter(v) for n, v in read_model(folder).items()}
        for name, value in values.items():
            put_parameter(student, name, value)
        for second, first in self.engine.ties.items():
            put_parameter(student, second, values[first])
        for module in student.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
        student.forget_views()
        return student
