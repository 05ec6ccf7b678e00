"""tsld::head_loss: the linear head of student and teacher and the losses over their logits, as one operator.

The logits [B * T, V] never exist: the operator goes through chunks of tokens, and each chunk's logits turn into their
own gradient in place. Chunks hold whole sequences where memory allows. A longer sequence takes a first pass with the
teacher alone, because TSLD's softmax over tokens needs the teacher's cross-entropy of all of them; given
`token_scores` save that pass. Gradients are made in the forward pass and only scaled in the backward one, so the
objective's gradient with respect to hidden states, head weight and bias is held in between, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tsld_fx.distill import LossTerm
from tsld_fx.errors import TrainingError
from tsld_fx.fused_loss_chunks import Head, HeadLossRun, Objective, has_tsld
from tsld_fx.fused_loss_rows import TopRows
from tsld_fx.top_logits import TopLogits

_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? teacher_hidden, Tensor? teacher_weight, "
    "Tensor? teacher_bias, Tensor labels, Tensor? segment_ids, Tensor? token_scores, str[] kinds, float[] weights, "
    "float[] temperatures, int chunk=0, ScalarType? dtype=None, Tensor? top_indices=None, "
    "Tensor? top_log_probs=None, Tensor? top_rest=None"
)
torch.library.define("tsld::head_loss", f"({_INPUTS}) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "tsld::head_loss_gradient",
    f"({_INPUTS}, bool[] wanted=[]) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@dataclass(frozen=True)
class HeadLoss:
    """What `PreparedModel.forward(head_loss=...)` needs to run head and losses as one operator.

    Attributes:
        objective: from `objective_of`.
        labels: [B, T] unshifted, -100 ignored.
        teacher_hidden: [B, T, H'] inputs of the teacher's head; None without a teacher.
        teacher_weight, teacher_bias: the teacher's head, [V, H'] and [V].
        segment_ids: [B, T] for one softmax over tokens per document.
        token_scores: [B, T - 1] the teacher's cross-entropy of each token, when it is known already.
        top: the top of the teacher's distribution instead of hidden states and head; its scores are used too.
    """

    objective: Objective
    labels: Tensor
    teacher_hidden: Tensor | None = None
    teacher_weight: Tensor | None = None
    teacher_bias: Tensor | None = None
    segment_ids: Tensor | None = None
    token_scores: Tensor | None = None
    top: TopLogits | None = None

    def tensors(self) -> dict[str, Tensor | None]:
        """The operator's inputs by name."""
        names = ("labels", "teacher_hidden", "teacher_weight", "teacher_bias", "segment_ids", "token_scores")
        found: dict[str, Tensor | None] = {name: getattr(self, name) for name in names}
        if self.top is None:
            return found
        top = {f"top_{name}": getattr(self.top, name) for name in ("indices", "log_probs", "rest")}
        scaled = has_tsld(self.objective.kinds)
        return found | top | ({"token_scores": self.top.scores} if scaled else {})


GROUND_TRUTH = Objective(("gt",), (1.0,), (1.0,))


def objective_of(terms: Sequence[LossTerm]) -> Objective | None:
    """The terms as the operator takes them; None when it cannot (taps, or several softening temperatures)."""
    if any(term.kind in ("hidden", "attention") for term in terms):
        return None
    if len({term.temperature or 1.0 for term in terms if term.kind == "logit"} - {1.0}) > 1:
        return None
    kinds = tuple("tsld_mean" if (t.kind, t.reduction) == ("tsld", "mean") else t.kind for t in terms)
    temperatures = tuple(t.temperature or (10.0 if t.kind == "tsld" else 1.0) for t in terms)
    return Objective(kinds, tuple(float(t.weight) for t in terms), tuple(map(float, temperatures)))


# ---------------------------------------------------------------- the operator that users and graphs call
_DEFAULTS = (0, None, None, None, None)  # from chunk on: the dispatcher leaves trailing defaults out


def _forward_only(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss, terms, scores, *_ = torch.ops.tsld.head_loss_gradient(*args)
    return loss, terms, scores


class _Known(torch.autograd.Function):
    """A value whose gradients with respect to some tensors are known already; the backward pass scales them."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place below: they serve once, and free their memory
        if gradients is None:
            raise TrainingError("tsld::head_loss: its gradient was used already. Do not use retain_graph with it.")
        return (None, None, *(g.mul_(grad) for g in gradients))


@torch.library.impl("tsld::head_loss", "Autograd")
def _head_loss_autograd(*args: Any) -> Any:
    """Hidden states and head hang on two branches, because zero-bubble schedules run back to each apart."""
    args = (*args, *_DEFAULTS[len(args) - 12 :])
    wanted = [t is not None and t.requires_grad for t in args[:3]]
    if not torch.is_grad_enabled() or not any(wanted):
        return _forward_only(*args)
    with torch.no_grad():
        loss, terms, scores, *gradients = torch.ops.tsld.head_loss_gradient(*args, wanted)
    values = [loss, torch.zeros_like(loss)]
    branches = [
        _Known.apply(values.pop(0), [gradients[i] for i in places], *(args[i] for i in places))
        for group in ((0,), (1, 2))
        if (places := [i for i in group if wanted[i]])
    ]
    return sum(branches[1:], branches[0]), terms, scores


torch.library.impl("tsld::head_loss", "CompositeExplicitAutograd", _forward_only)


def _register_autocast(device: str) -> None:
    key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")

    def in_low_precision(*args: Any) -> Any:
        """The matrix products run in autocast's dtype; the losses and the gradients' sums in float32 all the same."""
        chunk = args[12] if len(args) > 12 else 0
        dtype = None if args[0].dtype == torch.float64 else torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return torch.ops.tsld.head_loss(*args[:12], chunk, dtype, *args[14:])

    torch.library.impl("tsld::head_loss", f"Autocast{device.upper()}", in_low_precision)


for _device in ("cpu", "cuda"):
    _register_autocast(_device)


@torch.library.register_fake("tsld::head_loss")
def _(*args: Any) -> Any:
    return _forward_only(*args)


@torch.library.register_fake("tsld::head_loss_gradient")
def _(
    hidden: Tensor, weight: Tensor, bias: Any, teacher_hidden: Any, teacher_weight: Any, teacher_bias: Any,
    labels: Tensor, segment_ids: Any, token_scores: Any, kinds: list[str], weights: list[float],
    temperatures: list[float], chunk: int = 0, dtype: Any = None, top_indices: Any = None, top_log_probs: Any = None,
    top_rest: Any = None, wanted: Sequence[bool] = (),
) -> Any:  # fmt: skip
    precise = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    want = [*wanted, False, False, False][:3]
    none = hidden.new_empty(0)
    shape = (labels.shape[0], labels.shape[1] - 1) if has_tsld(kinds) and token_scores is None else (0,)
    return (
        hidden.new_empty((), dtype=precise),
        hidden.new_empty(len(kinds), dtype=precise),
        hidden.new_empty(shape, dtype=precise),
        *(t.new_empty(t.shape) if want[i] else none for i, t in enumerate((hidden, weight, bias))),
    )


def _head_loss_gradient(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher_hidden: Tensor | None, teacher_weight: Tensor | None,
    teacher_bias: Tensor | None, labels: Tensor, segment_ids: Tensor | None, token_scores: Tensor | None,
    kinds: list[str], weights: list[float], temperatures: list[float], chunk: int = 0, dtype: Any = None,
    top_indices: Tensor | None = None, top_log_probs: Tensor | None = None, top_rest: Tensor | None = None,
    wanted: Sequence[bool] = (),
) -> tuple[Tensor, ...]:  # fmt: skip
    objective = Objective(tuple(kinds), tuple(weights), tuple(temperatures))
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        teacher: Head | TopRows | None = None
        if objective.needs_teacher and top_indices is not None and top_log_probs is not None and top_rest is not None:
            _check_top(objective, token_scores)
            teacher = TopRows(top_indices.flatten(0, 1), top_log_probs.flatten(0, 1), top_rest.flatten())
        elif objective.needs_teacher:
            if teacher_hidden is None or teacher_weight is None:
                raise TrainingError(
                    f"tsld::head_loss: the objective {objective.key!r} needs the teacher's hidden states and head."
                )
            teacher = Head(teacher_hidden, teacher_weight, teacher_bias, dtype)
        student = Head(hidden, weight, bias, dtype)
        run = HeadLossRun(student, teacher, labels, segment_ids, objective)
        return run(token_scores, chunk, [*wanted, False, False, False][:3])


def _check_top(objective: Objective, scores: Tensor | None) -> None:
    if has_tsld(objective.kinds) and scores is None:
        raise TrainingError(
            "tsld::head_loss: the top of a teacher's distribution comes with its token scores for TSLD."
        )
    if any(kind == "logit" and t != 1.0 for kind, t in zip(objective.kinds, objective.temperatures, strict=True)):
        raise TrainingError(
            "tsld::head_loss: the top of a teacher's distribution cannot be softened. Use temperature 1."
        )


torch.library.impl("tsld::head_loss_gradient", "CompositeExplicitAutograd", _head_loss_gradient)
