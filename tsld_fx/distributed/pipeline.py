"""Pipeline parallelism: student and teacher in stages, the loss inside the last one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.pipelining import PipelineStage
from transformers import PreTrainedModel

from tsld_fx.distill import DistillConfig
from tsld_fx.distributed.config import SCHEDULES, schedule_class
from tsld_fx.distributed.data import Batch, to_device
from tsld_fx.distributed.engine import Engine, nll_of, put_parameter
from tsld_fx.distributed.forward_only import run_forward
from tsld_fx.distributed.placement import Placement, check_micro_batches, place
from tsld_fx.distributed.ranks import Ranks
from tsld_fx.errors import ConfigError
from tsld_fx.fused_loss import GROUND_TRUTH, HeadLoss
from tsld_fx.passes.graph_tools import tensors_read
from tsld_fx.passes.split_off_head import RESULTS
from tsld_fx.prepared import PreparedModel
from tsld_fx.prepared_state import Ending, HeadInput, PreparedOutput, ending_name
from tsld_fx.weight_cache import WeightCache


class PipelineEngine(Engine):
    """Consecutive layers per process; a step's micro-batches follow each other through the stages.

    Every process is given the tokens of all micro-batches and computes masks and positions itself, so that only the
    hidden state crosses. The last stage returns the loss, never logits. A tied weight lives on each process that
    reads it; its gradients are summed over them.

    Args:
        schedule: a name of `SCHEDULES`.
        micro_batches: of a step.

    Raises:
        ConfigError: too few layers, a number of micro-batches that the schedule cannot run, or a method with taps.
    """

    def __init__(
        self,
        student: PreparedModel,
        teacher: PreTrainedModel | None,
        distill: DistillConfig,
        ranks: Ranks,
        *,
        schedule: str = "1f1b",
        micro_batches: int = 1,
        bf16: bool = False,
    ) -> None:
        super().__init__(student, teacher, distill, ranks, bf16)
        if ranks.world_size == 1:
            schedule = "1f1b"  # one stage: torch 2.11 cannot send from a process to itself
        self.schedule, self.micro_batches = schedule, micro_batches
        self.placement = place(len(student.layer_view().layers), ranks.world_size, schedule)
        self._stages = self._take(student, self.placement, (self.fused, self._evaluates))
        self.parameters = {n: p for n, p in student.named_parameters() if p.requires_grad and not p.is_meta}
        self._taught: dict[int, Any] = {}  # by micro-batch: logits, or what the teacher's head reads
        self._teacher_stages: dict[int, _Stage] = {}
        if self.teacher is not None:
            theirs = place(len(self.teacher.layer_view().layers), ranks.world_size, schedule)
            self._teacher_stages = self._take(self.teacher, theirs, (self._teaching, self._evaluates))
        self._shared = self._shared_parameters()
        self._batches: list[Batch] = []
        self._weights = WeightCache()
        self._shape: tuple[int, ...] | None = None

    # ------------------------------------------------------------ stages
    @property
    def _teaching(self) -> Ending:
        """How the teacher's last stage ends in training."""
        return None if self.fused is None else "head_input"

    @property
    def _evaluates(self) -> Ending:
        """How the last stage ends in evaluation."""
        return None if self.fused is None else GROUND_TRUTH

    def _take(self, model: PreparedModel, placement: Placement, endings: Sequence[Ending]) -> dict[int, _Stage]:
        """This process's stages of a model; what they do not read goes to the meta device.

        Args:
            endings: of the last stage.
        """
        parts: dict[int, dict[str, fx.GraphModule]] = {}
        for stage in placement.mine(self.ranks.rank):
            ends = dict.fromkeys(endings if stage == placement.stages - 1 else (None,))
            first, last = placement.bounds[stage : stage + 2]
            parts[stage] = {
                ending_name(end): model.layer_view(ending=end).stage(first, last, ending_name(end)) for end in ends
            }
        read = {name for ends in parts.values() for part in ends.values() for name in names_read(part)}
        device, moved = self.ranks.device, dict[int, nn.Parameter]()
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            if id(parameter) not in moved:
                keep = name in read
                data = parameter.data.to(device if keep else "meta")
                moved[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
            put_parameter(model, name, moved[id(parameter)])
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
        model._follow_device(device)
        return {stage: _Stage(self, ends, model, stage == placement.stages - 1) for stage, ends in parts.items()}

    def _shared_parameters(self) -> dict[str, Any]:
        """Names of the parameters that several processes hold -> (group, first process), in one order everywhere."""
        holders: dict[str, list[int]] = {}
        for rank, names in enumerate(self.ranks.gather(list(self.parameters))):
            for name in names:
                holders.setdefault(name, []).append(rank)
        groups: dict[tuple[int, ...], Any] = {}
        shared = {}
        for name, ranks in sorted(holders.items()):
            if len(ranks) > 1:
                key = tuple(ranks)
                if key not in groups:
                    groups[key] = dist.new_group(ranks)
                shared[name] = (groups[key], ranks[0])
        return shared

    # ------------------------------------------------------------ a step
    @property
    def share(self) -> slice:
        return slice(None)

    def forward_backward(self, batches: Sequence[Batch]) -> None:
        self.student.train()
        self.teach(batches)
        self.run_schedule()
        self._weights.clear()
        self.sum_shared_gradients()

    def teach(self, batches: Sequence[Batch]) -> None:
        """The teacher's forward pass over the step's micro-batches; the process of the last stage keeps the result."""
        self._batches = [to_device(b, self.ranks.device) for b in batches]
        self._taught.clear()
        if self.teacher is not None and self.teaches:
            self._forward(self._teacher_stages, self._batches, self._taught.__setitem__, self._teaching)

    def _forward(
        self, stages: dict[int, _Stage], batches: Sequence[Batch], consume: Callable[[int, Any], None], ending: Ending
    ) -> None:
        calls = {number: partial(stage.run, ending) for number, stage in stages.items()}
        run_forward(calls, self.placement, batches, next(iter(stages.values())).hidden_like, consume, self.ranks.rank)

    def run_schedule(self) -> None:
        """Forward and backward of the student over the micro-batches that `teach` was given.

        Each weight is quantised once for all of them, also where layers are computed again.
        """
        shape = tuple(self._batches[0]["input_ids"].shape)
        if shape != self._shape:  # the schedule's buffers have one shape
            self._schedule, self._shape = self._build(shape), shape
        numbers = torch.arange(self.micro_batches)
        has_last = self.placement.rank_of[-1] == self.ranks.rank
        with self._weights:
            self._schedule.step(
                target=numbers if has_last else None,
                input_ids=torch.cat([b["input_ids"] for b in self._batches]),
                attention_mask=torch.cat([b["attention_mask"] for b in self._batches]),
                micro_batch=numbers,
            )
        self._taught.clear()

    def _build(self, shape: tuple[int, ...]) -> Any:
        """The schedule of torch.distributed.pipelining over this process's stages, for micro-batches of one shape."""
        loss = torch.empty(1, device="meta", requires_grad=True)
        stages = []
        for index, module in self._stages.items():
            hidden = torch.empty(*shape, module.width, dtype=module.dtype, device="meta", requires_grad=True)
            given = () if index == 0 else (hidden,)
            result = (loss,) if module.is_last else (hidden,)
            stages.append(PipelineStage(module, index, self.placement.stages, self.ranks.device, given, result))
        several = SCHEDULES[self.schedule][1] > 1
        return schedule_class(self.schedule)(
            stages if several else stages[0], self.micro_batches, loss_fn=lambda loss, _: loss, scale_grads=False
        )

    def loss_of(self, stage: _Stage, number: int, *inputs: Tensor) -> Tensor:
        """The share of one micro-batch in the step's loss, [1]; called by the last stage."""
        taught, batch = self._taught.pop(number, None), self._batches[number]
        guide = None if self.fused is None else self._head_loss(taught, batch)
        loss = self._objective(stage.outputs(self.fused, guide, *inputs), taught, batch)
        return torch.stack([loss / self.micro_batches]).float()  # no view: zero-bubble detaches it in place

    def sum_shared_gradients(self) -> None:
        """Give every copy of a tied weight the sum of their gradients."""
        for name, (group, _) in self._shared.items():
            parameter = self.parameters.get(name)
            if parameter is not None:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad, group=group)

    def counted(self) -> dict[str, nn.Parameter]:
        first = {name: rank for name, (_, rank) in self._shared.items()}
        return {n: p for n, p in self.parameters.items() if first.get(n, self.ranks.rank) == self.ranks.rank}

    # ------------------------------------------------------------ evaluation
    def nll(self, batches: Sequence[Batch], *, of_teacher: bool = False, autocast: bool = False) -> tuple[float, int]:
        stages = self._teacher_stages if of_teacher else self._stages
        (self.teacher if of_teacher else self.student).eval()  # type: ignore[union-attr]
        moved = [to_device(b, self.ranks.device) for b in batches]
        sums = torch.zeros(2, dtype=torch.float64)

        def consume(number: int, outputs: PreparedOutput) -> None:
            sums.add_(torch.tensor(nll_of(outputs, moved[number]["labels"]), dtype=torch.float64))

        bf16, self.bf16 = self.bf16, self.bf16 and autocast
        try:
            self._forward(stages, moved, consume, self._evaluates)
        finally:
            self.bf16 = bf16
        dist.all_reduce(sums, group=self.ranks.control)
        return float(sums[0]), int(sums[1])


class _Stage(nn.Module):
    """Some layers of a model, with autocast, and with the loss where it is the student's last stage.

    Args:
        ends: the stage's graphs by ending; all but the last stage have one.
    """

    def __init__(
        self, engine: PipelineEngine, ends: dict[str, fx.GraphModule], model: PreparedModel, is_last: bool
    ) -> None:
        super().__init__()
        self.graphs = nn.ModuleList(ends.values())
        self.is_last = is_last
        self.width: int = model.config.get_text_config().hidden_size
        self.dtype = next(p.dtype for p in model.parameters())  # what crosses: the residual stream's
        self._engine, self._ends = engine, ends

    def forward(self, *hidden: Tensor, input_ids: Tensor, attention_mask: Tensor, micro_batch: Tensor) -> Tensor:
        """The hidden state [B, T, H]; of the last stage the loss [1] of a numbered micro-batch."""
        with self._engine.autocast():
            if self.is_last:
                return self._engine.loss_of(self, int(micro_batch), *hidden, input_ids, attention_mask)
            values: Tensor = self._ends[""](*hidden, input_ids, attention_mask)
            return values.to(self.dtype)

    def run(
        self, ending: Ending, *hidden: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> Tensor | PreparedOutput | HeadInput:
        """A forward pass alone: the hidden state, or what the last stage gives with that ending."""
        with self._engine.autocast():
            if not self.is_last:
                values: Tensor = self._ends[""](*hidden, input_ids, attention_mask)
                return values.to(self.dtype)
            if ending == "head_input":
                values = self._ends[ending](*hidden, input_ids, attention_mask)
                return HeadInput(*(values[name] for name in RESULTS))
            guide = None if ending is None else HeadLoss(GROUND_TRUTH, labels)
            return self.outputs(ending, guide, *hidden, input_ids, attention_mask)

    def outputs(self, ending: Ending, guide: HeadLoss | None, *inputs: Tensor) -> PreparedOutput:
        """Logits, or the losses of a fused ending; of the last stage."""
        values = self._ends[ending_name(ending)](*inputs, **(guide.tensors() if guide else {}))
        return PreparedOutput(**{name: values.get(name) for name in ("logits", "loss", "loss_terms")})

    def hidden_like(self, batch: Batch) -> Tensor:
        """An empty hidden state for a batch."""
        ids = batch["input_ids"]
        return torch.empty(*ids.shape, self.width, dtype=self.dtype, device=ids.device)


def names_read(part: fx.GraphModule) -> set[str]:
    """The model's names of the tensors that a stage reads, in its layers too."""
    names = set(tensors_read(part.graph))
    for layer in (getattr(part, str(n.target)) for n in part.graph.nodes if n.op == "call_module"):
        names |= set(tensors_read(layer.body.graph))
    return names


def check_pipeline(
    student: PreparedModel, distill: DistillConfig, world_size: int, schedule: str, micro_batches: int
) -> None:
    """Refuse what a pipeline cannot do, before anything is moved.

    Raises:
        ConfigError: it says what and what to use instead.
    """
    if distill.taps:
        raise ConfigError(
            "pipeline: hidden states and attention scores of every layer would have to cross all stages. "
            "Use --parallel fsdp for this method, or a method of logits (tsld, logit, logit_gt, gt)."
        )
    schedule_class(schedule)
    place(len(student.layer_view().layers), world_size, schedule)
    check_micro_batches(micro_batches, world_size, schedule)
