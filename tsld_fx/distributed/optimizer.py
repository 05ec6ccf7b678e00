"""The optimiser and schedule that transformers' Trainer would make, for the parameters that one process holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler

from tsld_fx.errors import ConfigError
from tsld_fx.prepared import PreparedModel

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")


def check_arguments(args: TrainingArguments) -> None:
    """Refuse what only transformers' Trainer can do.

    Raises:
        ConfigError: it names the argument.
    """
    if str(getattr(args.optim, "value", args.optim)) not in OPTIMIZERS:
        raise ConfigError(
            f"training.optim={getattr(args.optim, 'value', args.optim)!r}: --parallel fsdp and pipeline have "
            f"{', '.join(OPTIMIZERS)}. Choose one of them, or --parallel ddp."
        )
    for name in ("fp16", "deepspeed", "fsdp", "torch_compile", "auto_find_batch_size", "neftune_noise_alpha"):
        if getattr(args, name, None):
            raise ConfigError(
                f"training.{name} is not supported with --parallel fsdp and pipeline. Leave it out (bf16 works)."
            )


def make_optimizer(
    model: PreparedModel, parameters: Mapping[str, nn.Parameter], args: TrainingArguments
) -> torch.optim.Optimizer:
    """Trainer's groups (with and without weight decay) and one for learned scales, over `parameters` by name."""
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    learned = {name for name, _ in model.learned_scales()}
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, None)
    plain = {n: p for n, p in parameters.items() if n not in learned}
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in plain.items() if n in decayed], "weight_decay": args.weight_decay},
        {"params": [p for n, p in plain.items() if n not in decayed], "weight_decay": 0.0},
    ]
    if learned:
        rate = args.learning_rate * model.quant_config.scale_lr_ratio
        scales = [p for n, p in parameters.items() if n in learned]
        groups.append({"params": scales, "lr": rate, "weight_decay": 0.0})
    return kind(groups, **options)


def make_scheduler(optimizer: torch.optim.Optimizer, args: TrainingArguments, steps: int) -> Any:
    """The learning-rate schedule of the arguments over `steps` steps."""
    return get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
