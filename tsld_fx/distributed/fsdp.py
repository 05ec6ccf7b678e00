"""FSDP2: `fully_shard` on every layer of student and teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from tsld_fx.distill import DistillConfig
from tsld_fx.distributed.data import Batch, to_device
from tsld_fx.distributed.engine import Engine, nll_of, put_parameter, tied_names
from tsld_fx.distributed.ranks import Ranks
from tsld_fx.fused_loss import GROUND_TRUTH, HeadLoss
from tsld_fx.prepared import PreparedModel


class FsdpEngine(Engine):
    """Parameters, gradients and optimiser states in shards; each process trains on its own micro-batches.

    Args:
        param_dtype: in which layers are gathered: `float32`, or `bfloat16` (see `ParallelConfig`).
    """

    def __init__(
        self,
        student: PreparedModel,
        teacher: PreTrainedModel | None,
        distill: DistillConfig,
        ranks: Ranks,
        *,
        bf16: bool = False,
        param_dtype: str = "float32",
    ) -> None:
        super().__init__(student, teacher, distill, ranks, bf16)
        self._mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
        half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        self._shard(student, half if bf16 and param_dtype == "bfloat16" else MixedPrecisionPolicy())
        if self.teacher is not None:
            self._shard(self.teacher, MixedPrecisionPolicy())
        self.parameters = {n: p for n, p in student.named_parameters() if p.requires_grad}

    def _shard(self, model: PreparedModel, policy: MixedPrecisionPolicy) -> None:
        """Shard the view by layers; embedding, last norm and head are one more group, gathered in full precision.

        That group stays gathered after a forward pass: the fused operator reads the teacher's head while the student
        runs, and the student's own backward pass begins with it.
        """
        ties = tied_names(model)
        view = model.layer_view()
        for layer in view.layers:
            fully_shard(layer, mesh=self._mesh, mp_policy=policy)
        fully_shard(view.root, mesh=self._mesh, reshard_after_forward=False)
        for second, first in ties.items():
            put_parameter(model, second, model.get_parameter(first))
        _move_buffers(model, self.ranks.device)
        model._follow_device(self.ranks.device)
        model._tsld.layered = True

    @property
    def share(self) -> slice:
        return slice(self.ranks.rank, None, self.ranks.world_size)

    def forward_backward(self, batches: Sequence[Batch]) -> None:
        self.student.train()
        for batch in (to_device(b, self.ranks.device) for b in batches):
            feed = {name: batch[name] for name in ("input_ids", "attention_mask")}
            with self.autocast():
                with torch.no_grad():
                    taught = self._teach(feed)
                if self.fused is not None:
                    outputs = self.student(**feed, head_loss=self._head_loss(taught, batch))
                else:
                    outputs = self.student(**feed)
                loss = self._objective(outputs, taught, batch)
            if self.teacher is not None:
                _release(self.teacher)
            (loss / len(batches)).backward()

    def _teach(self, feed: Batch) -> Any:
        """What the student learns from: logits, or the input of the teacher's head and the head, gathered."""
        if self.teacher is None or not self.teaches:
            return None
        return self.teacher(**feed) if self.fused is None else self.teacher.head_input(**feed)

    def nll(self, batches: Sequence[Batch], *, of_teacher: bool = False, autocast: bool = False) -> tuple[float, int]:
        model = self.teacher if of_teacher else self.student
        assert model is not None
        mine = list(batches[self.share])
        short = -(-len(batches) // self.ranks.world_size) - len(mine)  # every process must make as many calls
        total, count = 0.0, 0
        model.eval()
        with torch.no_grad(), torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=autocast and self.bf16):
            for index, batch in enumerate([*mine, *[batches[0]] * short]):
                batch = to_device(batch, self.ranks.device)
                guide = None if self.fused is None else HeadLoss(GROUND_TRUTH, batch["labels"])
                outputs = model(batch["input_ids"], batch["attention_mask"], head_loss=guide)
                if index < len(mine):
                    loss, tokens = nll_of(outputs, batch["labels"])
                    total, count = total + loss, count + tokens
        _release(model)  # what is gathered would go stale when a checkpoint is loaded
        sums = torch.tensor([total, count], dtype=torch.float64)
        dist.all_reduce(sums, group=self.ranks.control)
        return float(sums[0]), int(sums[1])

    def counted(self) -> dict[str, nn.Parameter]:
        return self.parameters


def _release(model: PreparedModel) -> None:
    """Keep only this process's share of embedding, last norm and head."""
    root: Any = model.layer_view().root
    root.reshard()


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
