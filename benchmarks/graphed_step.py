"""The models and the loss of `graphed_runs.py`: one function of the parameters and a batch per kind of run."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from stacked_runs import stack
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from tsld_fx import DistillConfig, PreparedModel, QuantConfig, losses, prepare
from tsld_fx.capture import attach
from tsld_fx.fused_loss import objective_of
from tsld_fx.fused_loss_chunks import has_tsld
from tsld_fx.headless import without_head
from tsld_fx.passes import CausalAttention
from tsld_fx.passes.fuse_head_loss import head_of
from tsld_fx.passes.runner import run_passes
from tsld_fx.preparation import graph_model

# of stacked parameters [R, ...] and numbers of blocks [R, B]: the total and the terms of each run
Loss = Callable[[dict[str, Tensor], Tensor], list[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Ways:
    """How a step computes; none changes what it computes but for rounding.

    Attributes:
        bf16: matrix products and attention in bfloat16 (autocast); parameters, losses and optimiser stay float32.
        causal: attention without a mask tensor.
        fused: head and losses as one operator.
        cached: the teacher runs once over the training blocks, not at every step.
        stacked: runs of one quantisation share a graph, their matrix products batched (its gain is not measured yet).
        compiled: the elementwise parts of forward and backward pass fused by torch.compile.
    """

    bf16: bool = True
    causal: bool = True
    fused: bool = True
    cached: bool = True
    stacked: bool = False
    compiled: bool = False


@dataclass(frozen=True)
class TeacherRows:
    """What the teacher says about every training block: inputs of its head [N, T, H], cross-entropy [N, T - 1]."""

    hidden: Tensor
    scores: Tensor
    weight: Tensor
    bias: Tensor | None


class Models:
    """A prepared model per quantisation, captured once, and the loss function of each kind of run.

    Args:
        load: makes the full-precision model.
        blocks: training samples [N, T] on the device.
        labels: [N, T], -100 ignored (on padding, which is to the right); the blocks themselves by default.
    """

    def __init__(
        self, load: Callable[[], PreTrainedModel], blocks: Tensor, ways: Ways = Ways(), labels: Tensor | None = None
    ) -> None:
        self.load, self.blocks, self.ways, self.device = load, blocks, ways, blocks.device
        self.labels = blocks if labels is None else labels
        self._prepared: dict[QuantConfig, tuple[PreparedModel, PreparedModel]] = {}
        self._bodies: dict[Any, tuple[Any, str]] = {}
        self._plain_losses: dict[Any, Loss] = {}
        self._rows: TeacherRows | None = None
        torch._dynamo.config.recompile_limit = 64  # one compilation for each quantisation

    def students(self, quant: QuantConfig, runs: int) -> dict[str, nn.Parameter]:
        """Fresh parameters by name (also the frozen ones), each [runs, ...]."""
        named = self._pair(quant)[0].named_parameters()
        return {n: nn.Parameter(p.detach().repeat(runs, *(1,) * p.ndim), p.requires_grad) for n, p in named}

    def learned(self, quant: QuantConfig) -> set[str]:
        """Names of the learned scales."""
        return {name for name, _ in self._pair(quant)[0].learned_scales()}

    @torch.no_grad()
    def with_weights(self, quant: QuantConfig, weights: list[Tensor]) -> PreparedModel:
        """The one model in evaluation mode, given these parameters."""
        model = self._pair(quant)[1]
        torch._foreach_copy_(list(model.parameters()), [w.detach() for w in weights])
        return model

    def autocast(self) -> Any:
        """The precision of a step's matrix products."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.ways.bf16)

    def checks(self) -> Any:
        """What a step that is not compiled runs in."""
        return contextlib.nullcontext() if self.ways.compiled else no_checks()

    def _pair(self, quant: QuantConfig) -> tuple[PreparedModel, PreparedModel]:
        if quant not in self._prepared:
            made = self._whole_blocks(prepare(self.load().to(self.device), quant).train())
            self._prepared[quant] = (made, copy.deepcopy(made).eval())
        return self._prepared[quant]

    def _whole_blocks(self, model: PreparedModel) -> PreparedModel:
        if self.ways.causal:
            run_passes(model.graph_module, [CausalAttention(self.blocks.shape[1])])
        return model

    def stacks(self, distill: DistillConfig) -> bool:
        """Whether runs of this objective can share a graph."""
        return self.ways.stacked and self._fuses(distill)

    def _fuses(self, distill: DistillConfig) -> bool:
        return self.ways.fused and objective_of(distill.terms()) is not None

    def loss(self, quant: QuantConfig, distill: Sequence[DistillConfig], batch: int) -> Loss:
        """The loss of runs that share a graph: one, or several that stack, B blocks each."""
        if self._fuses(distill[0]):
            return self._fused(quant, [objective_of(one.terms()) for one in distill], batch)
        if (quant, distill[0]) not in self._plain_losses:
            self._plain_losses[quant, distill[0]] = self._compiled(self._plain(quant, distill[0]))
        plain = self._plain_losses[quant, distill[0]]
        return lambda parameters, samples: [plain({n: p[0] for n, p in parameters.items()}, samples[0])]

    def _compiled(self, function: Any) -> Any:
        return torch.compile(function, dynamic=False) if self.ways.compiled else function

    def _body(self, quant: QuantConfig, runs: int, batch: int) -> tuple[Any, str]:
        """Models up to their heads as a function of stacked parameters and token numbers [R, B, T] that gives
        [R, B, T, H], and the name of the head's weight."""
        if (quant, runs, batch) not in self._bodies:
            model = self._pair(quant)[0]
            body = attach(copy.deepcopy(model.graph_module.graph), model, model.graph_module)
            output = next(n for n in body.graph.nodes if n.op == "output")
            head = head_of(output)
            assert head is not None and head.args[1].op == "get_attr" and len(head.args) == 2, "not a plain head"
            output.args = (head.args[0],)
            name = str(head.args[1].target)
            body.graph.eliminate_dead_code()
            body.recompile()
            several = stack(body, batch) if runs > 1 else None

            def run(parameters: dict[str, Tensor], ids: Tensor) -> Tensor:
                flat = ids.flatten(0, 1)
                if several is not None:
                    hidden = functional_call(several, parameters, (flat, torch.ones_like(flat)))
                else:
                    alone = {n: p[0] for n, p in parameters.items()}
                    hidden = functional_call(body, alone, (flat, torch.ones_like(flat)))
                return hidden.view(*ids.shape, -1)

            self._bodies[quant, runs, batch] = self._compiled(run), name
        return self._bodies[quant, runs, batch]

    def _fused(self, quant: QuantConfig, objectives: Sequence[Any], batch: int) -> Loss:
        body, head = self._body(quant, len(objectives), batch)
        rows = self.rows() if any(o.needs_teacher for o in objectives) else None

        def loss(parameters: dict[str, Tensor], samples: Tensor) -> list[tuple[Tensor, Tensor]]:
            hidden = body(parameters, self.blocks[samples])
            found = []
            for run, o in enumerate(objectives):
                here = samples[run]
                teacher: list[Any] = [None, None, None]
                scores = None
                if rows is not None and o.needs_teacher:
                    teacher = [rows.hidden.index_select(0, here), rows.weight, rows.bias]
                    scores = rows.scores.index_select(0, here) if has_tsld(o.kinds) else None
                total, terms, _ = torch.ops.tsld.head_loss(
                    hidden[run], parameters[head][run], None, *teacher, self.labels.index_select(0, here), None, scores,
                    list(o.kinds), list(o.weights), list(o.temperatures),
                )  # fmt: skip
                found.append((total, terms))
            return found

        return loss

    def _plain(self, quant: QuantConfig, distill: DistillConfig) -> Any:
        model = copy.deepcopy(self._pair(quant)[0])
        model.set_taps(distill.taps)
        graph, teacher = model.graph_module, None
        if distill.needs_teacher:
            guide = graph_model(self.load().to(self.device), None, distill.taps).eval().requires_grad_(False)
            teacher = self._whole_blocks(guide).graph_module

        def loss(parameters: dict[str, Tensor], samples: Tensor) -> tuple[Tensor, Tensor]:
            ids, labels = self.blocks.index_select(0, samples), self.labels.index_select(0, samples)
            ones = torch.ones_like(ids)
            theirs: Any = None
            if teacher is not None:
                with torch.no_grad():
                    theirs = teacher(ids, ones)
            ours = functional_call(graph, parameters, (ids, ones))
            values = [_term(term, ours, theirs, labels) for term in distill.terms()]
            weighted = [term.weight * value for term, value in zip(distill.terms(), values, strict=True)]
            return torch.stack(weighted).sum(), torch.stack(values)

        return loss

    def rows(self) -> TeacherRows:
        """The teacher's rows, made once."""
        if self._rows is None:
            head = without_head(self.load().to(self.device).eval())
            assert head is not None, "the teacher's logits are not the plain result of a linear head"
            hidden, scores = [], []
            for ids, labels in zip(self.blocks.split(64), self.labels.split(64), strict=True):
                with torch.no_grad(), self.autocast():
                    found = head.body(input_ids=ids, use_cache=False).logits
                    logits = torch.nn.functional.linear(found, head.weight, head.bias)
                hidden.append(found.to(torch.bfloat16 if self.ways.bf16 else torch.float32))
                scores.append(losses.token_cross_entropy(logits[:, :-1], labels[:, 1:]))
            self._rows = TeacherRows(torch.cat(hidden), torch.cat(scores), head.weight.clone(), head.bias)
        return self._rows


@contextlib.contextmanager
def no_checks() -> Iterator[None]:
    """The losses' checks of labels wait for the device, which a capture cannot; the blocks have no bad labels."""
    with mock.patch("torch.compiler.is_compiling", return_value=True):
        yield


def _term(term: Any, student: Any, teacher: Any, labels: Tensor) -> Tensor:
    if term.kind == "gt":
        return losses.ground_truth(student["logits"], labels)
    if term.kind == "logit":
        return losses.logit_distillation(student["logits"], teacher["logits"], labels, term.temperature or 1.0)
    if term.kind == "tsld":
        return losses.token_scaled_logit_distillation(
            student["logits"], teacher["logits"], labels, term.temperature or 10.0, term.reduction
        )
    measure = losses.hidden_state_distillation if term.kind == "hidden" else losses.attention_distillation
    tap = "hidden_states." if term.kind == "hidden" else "attention_scores."
    ours, theirs = ([v for k, v in values.items() if k.startswith(tap)] for values in (student, teacher))
    return measure(ours, theirs, None)
