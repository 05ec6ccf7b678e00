"""What the training loop needs of a model that is spread over processes."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from tsld_fx.distill import DistillConfig
from tsld_fx.distributed.data import Batch
from tsld_fx.distributed.objective import fused_objective, fused_terms, head_loss, objective
from tsld_fx.distributed.ranks import Ranks
from tsld_fx.fused_loss import HeadLoss
from tsld_fx.losses import IGNORE, token_cross_entropy
from tsld_fx.preparation import graph_model
from tsld_fx.prepared import PreparedModel
from tsld_fx.prepared_state import HeadInput, PreparedOutput


class Engine(ABC):
    """A student and its teacher, spread over the processes.

    Args:
        student: its parameters that this process does not hold are taken away.
        teacher: likewise; None where the method needs none.
        bf16: autocast, and a teacher stored in bfloat16.

    Attributes:
        parameters: the trainable parameters (or shards of them) that this process holds, by the model's own names.
        losses: of the micro-batches since `take_losses`, on the processes that compute them.
        fused: the objective that runs with the heads as one operator, so that logits never exist; None where the
            losses need whole logits.
    """

    def __init__(
        self, student: PreparedModel, teacher: PreTrainedModel | None, distill: DistillConfig, ranks: Ranks, bf16: bool
    ) -> None:
        self.student, self.distill, self.ranks, self.bf16 = student, distill, ranks, bf16
        student.set_taps(distill.taps)
        self.ties = tied_names(student)
        self.teacher = None if teacher is None else frozen_graph(teacher, distill, bf16)
        self.teaches = distill.needs_teacher
        self.fused = fused_objective(distill, student, self.teacher)
        self.vocabulary = student.get_output_embeddings().weight.shape[0]
        self.parameters: dict[str, nn.Parameter] = {}
        self.losses: dict[str, list[Tensor]] = defaultdict(list)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bfloat16 autocast where the run asks for it."""
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.bf16)

    @property
    @abstractmethod
    def share(self) -> slice:
        """Which micro-batches of a step this process is given."""

    @abstractmethod
    def forward_backward(self, batches: Sequence[Batch]) -> None:
        """Add the gradient of the step's mean loss to the parameters; the losses go to `self.losses`."""

    @abstractmethod
    def nll(self, batches: Sequence[Batch], *, of_teacher: bool = False, autocast: bool = False) -> tuple[float, int]:
        """Summed negative log-likelihood (nats) and number of the next tokens, over all batches; on every process."""

    @abstractmethod
    def counted(self) -> dict[str, nn.Parameter]:
        """The parameters whose gradient this process counts, so that each counts once over all processes."""

    def _head_loss(self, taught: HeadInput | None, batch: Batch) -> HeadLoss:
        assert self.fused is not None
        return head_loss(self.distill, self.fused, self.vocabulary, taught, batch["labels"], batch.get("segment_ids"))

    def _objective(self, student: PreparedOutput, teacher: Any, batch: Batch) -> Tensor:
        if student.loss_terms is not None:
            total, parts = fused_terms(self.distill, student)
        else:
            total, parts = objective(
                self.distill, student, teacher, batch["labels"], batch["attention_mask"], batch.get("segment_ids")
            )
        self.losses["loss"].append(total.detach())
        for name, value in parts.items():
            self.losses[name].append(value)
        return total

    def take_losses(self) -> dict[str, float]:
        """Mean of each loss over the micro-batches of all processes since the last call.

        Raises:
            TsldError: a loss that is NaN or Inf, with the process that computed it.
        """
        mine = {name: [float(torch.stack(v).sum()), len(v)] for name, v in self.losses.items() if v}
        self.losses.clear()
        every = self.ranks.gather(mine)
        names = dict.fromkeys(name for found in every for name in found)
        self.last_by_rank = [found.get("loss", [0.0, 0])[0] for found in every]
        return {
            name: sum(f[name][0] for f in every if name in f) / sum(f[name][1] for f in every if name in f)
            for name in names
        }

    def clip(self, limit: float) -> float:
        """Scale the gradients of all processes to a common norm of at most `limit`; 0 only measures.

        Returns:
            The norm before, over every parameter once.
        """
        grads = [local(p.grad) for p in self.counted().values() if p.grad is not None]
        squares = torch.zeros((), dtype=torch.float32, device=self.ranks.device)
        for norm in torch._foreach_norm(grads) if grads else ():
            squares += norm.float().square()
        dist.all_reduce(squares)
        norm = float(squares.sqrt())
        if limit > 0 and norm > limit:
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    local(parameter.grad).mul_(limit / (norm + 1e-6))
        return norm

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def tied_names(model: nn.Module) -> dict[str, str]:
    """Second names of tied parameters -> first name."""
    first: dict[int, str] = {}
    ties = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            ties[name] = first[id(parameter)]
        first.setdefault(id(parameter), name)
    return ties


def put_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Set a parameter by its dotted name."""
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._parameters[leaf] = parameter


def frozen_graph(teacher: PreTrainedModel, distill: DistillConfig, bf16: bool) -> PreparedModel:
    """The teacher as a graph without quantisation, in eval mode; one that is a graph already is taken as it is."""
    if bf16:
        teacher = teacher.to(torch.bfloat16)
    return graph_model(teacher.eval().requires_grad_(False), None, distill.taps).eval()  # type: ignore[return-value]


def nll_of(outputs: PreparedOutput, labels: Tensor) -> tuple[float, int]:
    """Summed negative log-likelihood of the next tokens, and how many there are, from logits or their mean loss."""
    targets = labels[:, 1:]
    count = int((targets != IGNORE).sum())
    if outputs.logits is not None:
        return float(token_cross_entropy(outputs.logits[:, :-1], targets).double().sum()), count
    assert outputs.loss is not None
    return (float(outputs.loss) * count if count else 0.0), count
