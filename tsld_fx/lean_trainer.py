"""How a distillation step runs: quantised weights shared by micro-batches, CUDA graphs, the loss terms in the log."""

from __future__ import annotations

import os
from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tsld_fx.distill import DistillConfig
from tsld_fx.errors import ConfigError
from tsld_fx.step_graph import StepGraph
from tsld_fx.weight_cache import WeightCache
from tsld_fx.whole_trainer import WholeCheckpointTrainer


def check_sharding(args: Any) -> None:
    """Refuse FSDP through transformers and accelerate.

    Args:
        args: TrainingArguments or None.

    Raises:
        ConfigError: it names the way that works.
    """
    if getattr(args, "fsdp", None) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        raise ConfigError(
            "TSLDTrainer: FSDP through transformers or accelerate shards modules that a captured graph does not call. "
            "Use --parallel fsdp (DistributedTrainer), without training.fsdp and accelerate's FSDP settings."
        )


class LeanTrainer(WholeCheckpointTrainer):
    """What TSLDTrainer does around its loss.

    Attributes:
        distill: the objective; subclasses set it before they call `_ready_steps`.
    """

    distill: DistillConfig

    def _ready_steps(self) -> None:
        self._parts: dict[str, list[Tensor]] = defaultdict(list)  # of the steps since the last log line
        self._step_parts: dict[str, list[Tensor]] = defaultdict(list)  # of the step that runs
        self._step_graphs: dict[tuple[str, ...], StepGraph] = {}
        self._operations: dict[tuple[int, ...], int] = {}
        self._weights = WeightCache() if self._keeps_weights() else None

    def _keeps_weights(self) -> bool:
        """Whether micro-batches of one step share the quantised weights; recomputed layers must not keep them."""
        args = self.args
        several = args.gradient_accumulation_steps > 1
        return several and not (args.torch_compile or args.gradient_checkpointing or args.deepspeed)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch: forward, backward, and a check of the loss."""
        with self._weights or nullcontext():
            loss = super().training_step(model, inputs, *args, **kwargs)
        if self._weights is not None and self.accelerator.sync_gradients:
            self._weights.clear()
        return loss

    def _micro_batch(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if not self._captures():
            loss = super()._micro_batch(model, inputs, *args, **kwargs)
            self._add_parts(self._take_parts())
            return loss
        key = tuple(inputs)
        if key not in self._step_graphs:
            step = super()._micro_batch
            graph = StepGraph(model, lambda batch: step(model, batch, *args, **kwargs), self._take_parts)
            self._step_graphs[key] = graph
        loss, parts = self._step_graphs[key](self._prepare_inputs(inputs))
        self._add_parts(parts)
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Trainer's count, which walks over all parameters, once per shape of batch."""
        shape = tuple(inputs["input_ids"].shape) if "input_ids" in inputs else ()
        if shape not in self._operations:
            self._operations[shape] = int(super().floating_point_ops(inputs))
        return self._operations[shape]

    def _add_parts(self, parts: dict[str, list[Tensor]]) -> None:
        for name, values in parts.items():
            self._parts[name] += values

    def _captures(self) -> bool:
        """Whether steps run as a CUDA graph: asked for, on one GPU, with nothing between forward and backward."""
        args = self.args
        alone = args.world_size == 1 and args.gradient_accumulation_steps == 1 and args.device.type == "cuda"
        return self.distill.cuda_graph and alone and not (args.fp16 or args.torch_compile or args.deepspeed)

    def _take_parts(self) -> dict[str, list[Tensor]]:
        """The loss terms of one step, which then goes on to add to those since the last log line."""
        parts, self._step_parts = self._step_parts, defaultdict(list)
        return parts

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of each loss term since the last line."""
        if "loss" in logs:
            logs |= {name: round(float(torch.stack(v).mean()), 4) for name, v in self._parts.items() if v}
            self._parts.clear()
        super().log(logs, *args, **kwargs)
