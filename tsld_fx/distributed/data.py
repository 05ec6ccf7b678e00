"""Which sequences each step trains on, as a function of the step alone, so that a resumed run needs no replay."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from tsld_fx.distributed.objective import learnable
from tsld_fx.errors import ConfigError, DataError

Batch = dict[str, Tensor]


class StepBatches:
    """The micro-batches of each optimiser step, in the order in which transformers' Trainer draws them.

    The sequences at the end of an epoch that fill no whole step are left out of that epoch.

    Args:
        dataset: items with input_ids and labels [T], optionally attention_mask and segment_ids.
        micro_batch: sequences of a micro-batch.
        count: micro-batches of a step, over all processes.
        seed: of the shuffling; epoch e is shuffled by seed + e.

    Raises:
        ConfigError: the data set is smaller than one step.
    """

    def __init__(
        self, dataset: Any, micro_batch: int, count: int, seed: int, collate: Callable[[list[Any]], Any] | None = None
    ) -> None:
        self.dataset, self.micro_batch, self.count, self.seed = dataset, micro_batch, count, seed
        self.collate = collate or default_collate
        self.steps_per_epoch = len(dataset) // (micro_batch * count)
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"the training text has {len(dataset)} samples, less than the {micro_batch * count} of one step "
                f"({count} micro-batches of {micro_batch}). Give more text, or lower per_device_train_batch_size or "
                "gradient_accumulation_steps."
            )
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def total_steps(self, max_steps: int, epochs: float) -> int:
        """Steps of a training of `max_steps`, or of `epochs` where that is not positive."""
        return max_steps if max_steps > 0 else math.ceil(epochs * self.steps_per_epoch)

    def step(self, step: int, mine: slice = slice(None)) -> list[Batch]:
        """The micro-batches of one step (from 0), or those that one process takes."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.dataset), generator=generator)
        size = self.micro_batch * self.count
        rows = self._order[place * size : (place + 1) * size].view(self.count, self.micro_batch)
        return [as_batch(self.collate([self.dataset[int(i)] for i in group])) for group in rows[mine]]


def rows_in_order(dataset: Any, size: int, collate: Callable[[list[Any]], Any] | None = None) -> list[Batch]:
    """A data set's batches for evaluation, the last one perhaps smaller."""
    collate = collate or default_collate
    starts = range(0, len(dataset), size)
    return [as_batch(collate([dataset[i] for i in range(s, min(s + size, len(dataset)))])) for s in starts]


def as_batch(values: Any) -> Batch:
    """Check a collated batch and hide padding from its labels.

    Raises:
        DataError: no input_ids or no labels.
    """
    for name in ("input_ids", "labels"):
        if name not in values:
            raise DataError(f"the batch has no {name}. Give a data set with input_ids and labels (-100: not learnt).")
    if values.get("position_ids") is not None:
        raise DataError("position_ids are not passed between stages or shards. Leave the column out.")
    batch = {k: values[k] for k in ("input_ids", "attention_mask", "segment_ids") if values.get(k) is not None}
    batch["labels"] = learnable(values["labels"], batch.get("attention_mask"))
    batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    return batch


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
