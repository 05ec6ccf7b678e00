"""The settings of a training run, from YAML or the command line, checked before any work starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from tsld_fx.config import QuantConfig
from tsld_fx.distill import DistillConfig
from tsld_fx.distributed.config import ParallelConfig
from tsld_fx.errors import ConfigError
from tsld_fx.task_data import holds_tasks
from tsld_fx.text_data import DEMO

# What a run uses unless its settings say otherwise. Batch, block and rate are the paper's (section 5.1).
TRAINING_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-4,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "linear",
    "logging_steps": 10,
    "eval_strategy": "epoch",
    "seed": 0,
}
_NOT_NEGATIVE = ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps")
_SPLITS = ("train", "validation", "test")
_COUNTS = (
    "max_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)


@dataclass(frozen=True)
class DataSettings:
    """Text to train and evaluate on; each entry is a text file, `demo` or what `datasets.load_dataset` takes.

    Files that end in .jsonl hold prompts and answers (`tsld_fx.task_data`); a run has them in all splits or in none.

    Attributes:
        train, validation, test: sources per split; validation and test may be empty.
        block_size: tokens per sample, and per window of the evaluation; of task files the longest example.
        packing: put several examples of a task file into one sample.
    """

    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    block_size: int = 512
    packing: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.packing, bool):
            raise ConfigError(f"data.packing must be true or false, got {self.packing!r}.")
        for name in _SPLITS:
            value = getattr(self, name)
            value = (value,) if isinstance(value, str) else value or ()
            if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
                raise ConfigError(f"data.{name} must be a name or a list of names, got {value!r}.")
            object.__setattr__(self, name, tuple(value))
        kinds = {name: holds_tasks(getattr(self, name)) for name in _SPLITS if getattr(self, name)}
        if len(set(kinds.values())) > 1:
            text, tasks = ([f"data.{n}" for n, k in kinds.items() if k is kind] for kind in (False, True))
            raise ConfigError(
                f"{', '.join(text)}: text; {', '.join(tasks)}: task files. Give text, or task files (.jsonl), for all."
            )
        if not isinstance(self.block_size, int) or self.block_size < 2:
            raise ConfigError(f"data.block_size must be a whole number of at least 2, got {self.block_size!r}.")


@dataclass(frozen=True)
class RunSettings:
    """One training run.

    Attributes:
        model: folder or hub name of the float model to start from.
        teacher: the full-precision teacher; None means `model` itself.
        data: the text; the embedded model's own when it is the model and no text is given.
        quant, distill: as in Python.
        training: fields of transformers.TrainingArguments over `TRAINING_DEFAULTS`.
        checkpoint_steps: optimiser steps between checkpoints; a kill loses at most this many.
        keep: `last` keeps the weights of the last step; `best` those of the best validation loss, with a checkpoint
            at each evaluation (training.eval_strategy, training.eval_steps) instead of every `checkpoint_steps`.
        parallel: how torchrun's processes share the work; None leaves it to transformers' Trainer.
    """

    model: str
    teacher: str | None = None
    data: DataSettings = field(default_factory=DataSettings)
    quant: QuantConfig = field(default_factory=QuantConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    training: Mapping[str, Any] = field(default_factory=dict)
    checkpoint_steps: int = 200
    keep: str = "last"
    parallel: ParallelConfig | None = None

    def __post_init__(self) -> None:
        if self.keep not in ("best", "last"):
            raise ConfigError(f"keep={self.keep!r} is not 'best' or 'last'.")
        for name in ("model", "teacher"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{name} must be a folder or a name, got {value!r}.")
        if not isinstance(self.checkpoint_steps, int) or self.checkpoint_steps < 1:
            raise ConfigError(f"checkpoint_steps must be a whole number of at least 1, got {self.checkpoint_steps!r}.")
        _check_training(self.training)
        if not self.data.train:
            if self.model != DEMO:
                raise ConfigError(
                    "data.train is empty. Give text to train on: --train FILE, or data.train in YAML "
                    "(a file, a data set's name, or 'demo')."
                )
            object.__setattr__(self, "data", replace(self.data, train=(DEMO,), validation=(DEMO,)))
        if self.keep == "best" and (not self.data.validation or self.training.get("eval_strategy") == "no"):
            raise ConfigError(
                "keep='best' goes by the validation loss. Give data.validation, and leave training.eval_strategy out "
                "or set it to 'steps' or 'epoch'."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for run.yaml."""
        return {
            "model": self.model,
            "teacher": self.teacher,
            "data": {f.name: _plain(getattr(self.data, f.name)) for f in fields(DataSettings)},
            "quant": self.quant.to_dict(),
            "distill": self.distill.to_dict(),
            "training": dict(self.training),
            "checkpoint_steps": self.checkpoint_steps,
            "keep": self.keep,
            **({"parallel": self.parallel.to_dict()} if self.parallel else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "settings") -> RunSettings:
        """Read what `to_dict` wrote, or the same shape from YAML.

        Raises:
            ConfigError: an unknown key or value.
        """
        check_keys(where, data, [f.name for f in fields(cls)])
        values = {k: v for k, v in data.items() if v is not None}
        if not values.get("model"):
            raise ConfigError(f"{where}: 'model' is missing. Give the folder or name of the float model.")
        for key, part in (("data", DataSettings), ("quant", QuantConfig), ("distill", DistillConfig)):
            if key in values:
                check_keys(f"{where}.{key}", values[key], [f.name for f in fields(part)])
        if "data" in values:
            values["data"] = DataSettings(**values["data"])
        if "quant" in values:
            values["quant"] = QuantConfig.from_dict(values["quant"])
        if "distill" in values:
            values["distill"] = DistillConfig.from_dict(values["distill"])
        if "parallel" in values:
            values["parallel"] = ParallelConfig.from_dict(values["parallel"])
        return cls(**values)


def check_keys(where: str, values: Any, known: list[str]) -> None:
    """Refuse anything but a mapping with known keys.

    Raises:
        ConfigError: it names the key and those that exist.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a mapping of {', '.join(known)}; got {values!r}.")
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}. Known keys: {', '.join(known)}.")


def read_yaml(file: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        ConfigError: missing, not YAML, or not a mapping.
    """
    try:
        data = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}). Give an existing YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid YAML: {error}. Mend the file.") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: expected a mapping at the top level, such as 'model: path'.")
    return data


def _check_training(training: Mapping[str, Any]) -> None:
    from transformers import TrainingArguments

    if not isinstance(training, Mapping):
        raise ConfigError(f"training: expected a mapping of TrainingArguments' fields, got {training!r}.")
    known = {f.name: f.default for f in fields(TrainingArguments) if f.init}
    fixed = ("output_dir", "save_strategy", "save_steps", "load_best_model_at_end", "report_to")
    for key, value in training.items():
        if key in fixed:
            raise ConfigError(
                f"training.{key} is set by tsld_fx (output folder, checkpoint_steps, keep). Leave it out."
            )
        if key not in known:
            raise ConfigError(f"training: {key!r} is not a field of transformers.TrainingArguments.")
        if isinstance(known[key], bool) and not isinstance(value, bool):
            raise ConfigError(f"training.{key} must be true or false, got {value!r}.")
        if type(known[key]) in (int, float) and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise ConfigError(f"training.{key} must be a number, got {value!r} (in YAML write 1.0e-4, not 1e-4).")
        if (key in _NOT_NEGATIVE and value < 0) or (key == "num_train_epochs" and value <= 0):
            raise ConfigError(f"training.{key} must be {'positive' if value else 'more than 0'}, got {value!r}.")
        if key in _COUNTS and not (isinstance(value, int) and (value > 0 or (key, value) == ("max_steps", -1))):
            raise ConfigError(f"training.{key} must be a whole number of at least 1, got {value!r}.")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
