"""The fused head loss over chunks of tokens: logits in a buffer, row losses, gradients summed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tsld_fx.fused_loss_rows import RowLosses, RowWeights, TopRows, cross_entropy_rows, loss_rows
from tsld_fx.loss_checks import IGNORE
from tsld_fx.losses import scales_of_scores

LOGITS_BYTES = 640 << 20  # most that the logits of one chunk take, per model
MOST_TOKENS = 2048  # larger chunks make the matrix products no faster
_HALF_SCALE = 4096.0  # float16 gradients of single logits would vanish below 6e-8


def chunk_tokens(vocabulary: int, dtype: torch.dtype) -> int:
    """Tokens per chunk: a power of two, at most MOST_TOKENS, whose logits take at most LOGITS_BYTES."""
    fit = LOGITS_BYTES // (vocabulary * dtype.itemsize)
    return min(MOST_TOKENS, max(64, 1 << max(fit, 1).bit_length() - 1))


def has_tsld(kinds: Sequence[str]) -> bool:
    """Whether a loss weighs tokens by the teacher's cross-entropy."""
    return any(kind.startswith("tsld") for kind in kinds)


@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses in the form that the operator takes: parallel lists.

    Attributes:
        key: a name of it, made once: torch.compile cannot format numbers that it has seen change.
    """

    kinds: tuple[str, ...]
    weights: tuple[float, ...]
    temperatures: tuple[float, ...]
    key: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = zip(self.kinds, self.weights, self.temperatures, strict=True)
        object.__setattr__(self, "key", " ".join(f"{k}*{w!r}@{t!r}" for k, w, t in parts))

    @property
    def needs_teacher(self) -> bool:
        """Whether any loss compares with a teacher."""
        return any(kind != "gt" for kind in self.kinds)


class Head:
    """One model's head over flat tokens: logits of a slice of them, in a buffer that is used again."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> None:
        self.dtype = dtype or hidden.dtype
        self.hidden = hidden.reshape(-1, hidden.shape[-1])
        self.weight, self.weight_dtype = weight.to(self.dtype), weight.dtype
        self.bias = None if bias is None else bias.to(self.dtype)
        self.bias_dtype = None if bias is None else bias.dtype
        self.buffer: Tensor | None = None

    def rows(self, here: slice) -> Tensor:
        """[rows, H] inputs of a slice in the dtype of the matrix product."""
        return self.hidden[here].to(self.dtype)

    def logits(self, here: slice) -> Tensor:
        """[rows, V] of a slice; on a GPU the buffer's rows are padded, so that GEMMs find any vocabulary aligned."""
        size, x = self.weight.shape[0], self.rows(here)
        if self.buffer is None or self.buffer.shape[0] < x.shape[0]:
            width = -(-size // 64) * 64 if x.is_cuda else size  # oneDNN reads bf16 rows beyond their end
            self.buffer = x.new_empty(x.shape[0], width)
        out = self.buffer[: x.shape[0], :size]
        if self.bias is None:
            return torch.mm(x, self.weight.t(), out=out)
        return torch.addmm(self.bias, x, self.weight.t(), out=out)


@dataclass
class HeadLossRun:
    """One evaluation of an objective over a batch."""

    student: Head
    teacher: Head | TopRows | None
    labels: Tensor
    segment_ids: Tensor | None
    objective: Objective

    def __post_init__(self) -> None:
        self.batch, self.tokens = self.labels.shape
        self.targets = torch.nn.functional.pad(self.labels[:, 1:], (0, 1), value=IGNORE).contiguous()
        self.valid = self.targets != IGNORE
        self.precise = torch.float64 if self.student.hidden.dtype == torch.float64 else torch.float32
        self.count = self.valid.sum().to(self.precise)

    def chunks(self, chunk: int) -> Iterator[slice]:
        """Slices of the flat tokens; whole sequences where one fits into a chunk."""
        rows = self.batch * self.tokens
        step = chunk // self.tokens * self.tokens or chunk
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))

    def __call__(self, scores: Tensor | None, chunk: int, want: list[bool]) -> tuple[Tensor, ...]:
        """Loss [], terms [K], the token scores found [B, T - 1] (or empty), gradients of hidden, weight and bias.

        Args:
            scores: [B, T - 1] the teacher's cross-entropy, None to find it here.
            chunk: tokens per chunk, 0 to choose.
            want: which gradients.
        """
        chunk = chunk or chunk_tokens(self.student.weight.shape[0], self.student.dtype)
        finds = has_tsld(self.objective.kinds) and scores is None
        if scores is not None:
            scores = torch.nn.functional.pad(scores.to(self.precise), (0, 1))
        elif finds:
            scores = torch.zeros(self.batch, self.tokens, dtype=self.precise, device=self.labels.device)
        ahead = finds and chunk < self.tokens  # the softmax over a sequence is needed before its first chunk
        if ahead:
            for here in self.chunks(chunk):
                self.score(here, self.teacher_logits(here), scores)
        gradients = _Gradients(self.student, want, self.labels.shape)
        terms = torch.zeros(len(self.objective.kinds), dtype=self.precise, device=self.labels.device)
        for here in self.chunks(chunk):
            theirs = self.teacher_logits(here)
            if finds and not ahead:
                self.score(here, theirs, scores)
            shares = self.shares(here, scores)
            logits = self.student.logits(here)
            weights = self.row_weights(shares, gradients.scale)
            rows = loss_rows(logits, theirs, self.targets.view(-1)[here], weights, any(want))
            terms += torch.stack([_weighted(self.row_loss(rows, i), share) for i, share in enumerate(shares)])
            gradients.add(here, logits)
        loss = sum(term * weight for term, weight in zip(terms.unbind(), self.objective.weights, strict=True))
        assert isinstance(loss, Tensor)
        found = scores[:, :-1].contiguous() if finds and scores is not None else terms.new_empty(0)
        return loss, terms, found, *gradients.results()

    def teacher_logits(self, here: slice) -> Tensor | TopRows | None:
        if isinstance(self.teacher, Head):
            return self.teacher.logits(here)
        return None if self.teacher is None else self.teacher.part(here)

    def score(self, here: slice, logits: Tensor | TopRows | None, scores: Tensor | None) -> None:
        """Write the teacher's cross-entropy of a slice of the tokens."""
        assert isinstance(logits, Tensor) and scores is not None
        scores.view(-1)[here] = cross_entropy_rows(logits, self.targets.view(-1)[here])

    def shares(self, here: slice, scores: Tensor | None) -> list[Tensor]:
        """For each term of the objective what one unit of a row's loss adds to it, [rows]."""
        mean = None
        result = []
        for kind, temperature in zip(self.objective.kinds, self.objective.temperatures, strict=True):
            if kind.startswith("tsld"):
                assert scores is not None
                share = self.token_scales(here, scores, temperature)
                result.append(share / self.batch if kind == "tsld_mean" else share)
            else:
                mean = self.valid.view(-1)[here].to(self.precise) / self.count if mean is None else mean
                result.append(mean if kind == "gt" or temperature == 1.0 else mean * temperature**2)
        return result

    def token_scales(self, here: slice, scores: Tensor, temperature: float) -> Tensor:
        """TSLD's weights of a slice of the tokens, [rows]."""
        first, last = here.start // self.tokens, (here.stop - 1) // self.tokens + 1
        segments = None
        if self.segment_ids is not None:  # a position belongs to the document of the label that it predicts
            segments = torch.nn.functional.pad(self.segment_ids[first:last, 1:], (0, 1))
        scales = scales_of_scores(scores[first:last], self.valid[first:last], temperature, segments)
        offset = first * self.tokens
        return scales.reshape(-1)[here.start - offset : here.stop - offset]

    def row_weights(self, shares: list[Tensor], scale: float) -> RowWeights:
        """What each row's losses weigh in the gradient, times `scale`."""
        sums: dict[str, Tensor] = {}
        hot = 1.0
        for i, share in enumerate(shares):
            name = self.loss_of_term(i)
            hot = self.objective.temperatures[i] if name == "hot" else hot
            part = share * (self.objective.weights[i] * scale)
            sums[name] = sums[name] + part if name in sums else part
        contiguous = {name: value.contiguous() for name, value in sums.items()}
        return RowWeights(**contiguous, temperature=hot)

    def loss_of_term(self, term: int) -> str:
        """The field of RowLosses and RowWeights that a term of the objective uses."""
        kind = self.objective.kinds[term]
        if kind == "gt":
            return "hard"
        return "hot" if kind == "logit" and self.objective.temperatures[term] != 1.0 else "soft"

    def row_loss(self, rows: RowLosses, term: int) -> Tensor:
        value: Tensor = getattr(rows, self.loss_of_term(term))
        return value


class _Gradients:
    """Sums of the objective's gradient with respect to the hidden states, the head's weight and its bias."""

    def __init__(self, head: Head, want: list[bool], shape: torch.Size) -> None:
        self.head, self.shape, self.scale = head, shape, _HALF_SCALE if head.dtype == torch.float16 else 1.0
        sum_dtype = torch.float64 if head.dtype == torch.float64 else torch.float32
        if head.weight_dtype == torch.bfloat16:  # the sum ends in it anyway, and float32 would take twice the memory
            sum_dtype = torch.bfloat16
        self.hidden = torch.empty_like(head.hidden) if want[0] else None
        self.weight = torch.empty_like(head.weight, dtype=sum_dtype) if want[1] else None
        self.bias = head.weight.new_zeros(head.weight.shape[0], dtype=sum_dtype) if want[2] else None
        self.begun = False

    def add(self, here: slice, change: Tensor) -> None:
        """Add a slice whose gradient with respect to the logits, times `scale`, is `change` [rows, V]."""
        if self.hidden is not None:
            _product(self.hidden[here], change, self.head.weight, False, self.scale)
        if self.weight is not None:
            _product(self.weight, change.t(), self.head.rows(here), self.begun, self.scale)
        if self.bias is not None:
            self.bias.add_(change.sum(0, dtype=self.bias.dtype), alpha=1 / self.scale)
        self.begun = True

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three gradients in the dtypes of what they belong to; empty where they are not wanted."""
        none = self.head.hidden.new_empty(0)
        hidden = none if self.hidden is None else self.hidden.view(*self.shape, -1)
        weight = none if self.weight is None else self.weight.to(self.head.weight_dtype)
        bias = none if self.bias is None or self.head.bias_dtype is None else self.bias.to(self.head.bias_dtype)
        return hidden, weight, bias


def _product(out: Tensor, a: Tensor, b: Tensor, accumulate: bool, scale: float) -> None:
    """out = a @ b / scale, added to what is there with `accumulate`; rounded once to out's dtype."""
    beta, alpha = float(accumulate), 1.0 / scale
    if out.dtype == a.dtype and not accumulate and alpha == 1.0:
        torch.mm(a, b, out=out)
    elif out.dtype == a.dtype:
        torch.addmm(out if accumulate else out.zero_(), a, b, beta=beta, alpha=alpha, out=out)  # 0 * NaN is NaN on CPUs
    elif out.is_cuda and out.dtype == torch.float32:
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=beta, alpha=alpha, out=out)
    elif accumulate:
        out.add_(torch.mm(a, b), alpha=alpha)
    else:
        out.copy_(torch.mm(a, b)).mul_(alpha)


def _weighted(values: Tensor, share: Tensor) -> Tensor:
    return torch.where(share == 0, 0.0, values * share).sum()
