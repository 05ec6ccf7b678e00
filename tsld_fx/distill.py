"""Which losses pull the student to the teacher: `DistillConfig` and the terms it stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from tsld_fx.config import check_positive
from tsld_fx.errors import ConfigError

LossKind = Literal["gt", "logit", "tsld", "hidden", "attention"]
LOSS_KINDS: tuple[str, ...] = ("gt", "logit", "tsld", "hidden", "attention")


@dataclass(frozen=True)
class LossTerm:
    """One weighted loss.

    Attributes:
        kind: `gt` cross-entropy with the next token; `logit` soft cross-entropy with the teacher; `tsld`
            token-scaled logit distillation; `hidden` / `attention` mean squared error of every layer's hidden
            state / attention scores.
        weight: factor of the loss in the sum.
        temperature: of `logit` it softens both distributions (loss times temperature squared, Hinton et al.,
            arXiv 1503.02531); of `tsld` it is tau, the temperature of the softmax over tokens (default 10).
        reduction: of `tsld`: `sum` over the sequences of a micro-batch (the paper's script) or their `mean`.
    """

    kind: LossKind
    weight: float = 1.0
    temperature: float | None = None
    reduction: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        if self.kind not in LOSS_KINDS:
            raise ConfigError(f"LossTerm: kind={self.kind!r} is not one of {', '.join(map(repr, LOSS_KINDS))}.")
        if self.reduction not in ("sum", "mean"):
            raise ConfigError(f"LossTerm: reduction={self.reduction!r} is not 'sum' or 'mean'.")
        check_positive("LossTerm", "temperature", self.temperature)
        if not (isinstance(self.weight, int | float) and self.weight >= 0):
            raise ConfigError(f"LossTerm: weight must be a number and not negative, got {self.weight!r}.")


METHODS: dict[str, tuple[LossKind, ...]] = {
    "gt": ("gt",),
    "logit": ("logit",),
    "logit_gt": ("logit", "gt"),
    "l2l": ("logit", "hidden", "attention"),
    "tsld": ("tsld", "gt"),
}


@dataclass(frozen=True)
class DistillConfig:
    """The training objective: a named method, or any weighted list of losses.

    Attributes:
        method: `gt` (no teacher), `logit`, `logit_gt`, `l2l` (logit + hidden states + attention scores), `tsld`
            (TSLD + ground truth, the paper's script, section 4.2). Ignored when `losses` is given.
        losses: terms to sum instead of a named method; dicts with LossTerm's fields are accepted.
        temperature: tau of TSLD in a named method.
        reduction: of TSLD in a named method: `sum` over the sequences of one micro-batch on one device, so that
            its share against the cross-entropy grows with that micro-batch (the paper trains with 4), or `mean`
            over them. In both cases the result is averaged over gradient-accumulation steps and over devices.
        separate_documents: one softmax over tokens per packed document (the batch carries `segment_ids`)
            instead of one per sequence.
        fused: run the heads of student and teacher and the losses over their logits as one operator where that is
            possible, so that logits [B, T, V] never exist; the result is the same up to rounding.
        cuda_graph: replay forward and backward pass as one CUDA graph, which small models need to keep a GPU busy.
            For batches of one shape on one GPU, without gradient accumulation, fp16 or torch_compile; else ignored.
        teacher_cache: keep on disk what the teacher says about each training sample, so that epochs after the first
            save its pass for the token scales (`token_scores`, 4 bytes a token), all of it but the head
            (`hidden_states`, 2 or 4 bytes a token and hidden unit), or all of it (`top_logits`, 6 bytes a token and
            kept logit; soft losses then compare with the most likely tokens and the rest as one, in every epoch: see
            `tsld_fx.top_logits` for the bias). For data sets with a length and samples of one length that are the
            same in each epoch.
        cached_logits: most likely tokens that `top_logits` keeps.
        cache_folder: where; None means `teacher_cache` in the Trainer's output folder. Runs on the same data with the
            same teacher can share it.
    """

    method: Literal["gt", "logit", "logit_gt", "l2l", "tsld"] = "tsld"
    losses: Sequence[LossTerm | Mapping[str, Any]] | None = None
    temperature: float = 10.0
    reduction: Literal["sum", "mean"] = "sum"
    separate_documents: bool = False
    fused: bool = True
    cuda_graph: bool = False
    teacher_cache: Literal["token_scores", "hidden_states", "top_logits"] | None = None
    cached_logits: int = 64
    cache_folder: str | None = None

    def __post_init__(self) -> None:
        if self.method not in list(METHODS):
            raise ConfigError(f"DistillConfig: method={self.method!r} is not one of {', '.join(METHODS)}.")
        for name in ("separate_documents", "fused", "cuda_graph"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"DistillConfig: {name} must be true or false, got {getattr(self, name)!r}.")
        if self.losses is not None:
            if not isinstance(self.losses, list | tuple) or not self.losses:
                raise ConfigError(
                    f"DistillConfig: losses must be a list of LossTerms, got {self.losses!r}. Or leave it out and use "
                    "method=."
                )
            object.__setattr__(self, "losses", tuple(_as_term(term) for term in self.losses))
        if self.teacher_cache not in (None, "token_scores", "hidden_states", "top_logits"):
            raise ConfigError(
                f"DistillConfig: teacher_cache={self.teacher_cache!r} is not 'token_scores', 'hidden_states' or "
                "'top_logits'."
            )
        if not isinstance(self.cached_logits, int) or isinstance(self.cached_logits, bool) or self.cached_logits < 1:
            raise ConfigError(f"DistillConfig: cached_logits must be a positive number, got {self.cached_logits!r}.")
        softened = [t for t in self.terms() if t.kind == "logit" and t.temperature not in (None, 1.0)]
        if self.teacher_cache == "top_logits" and softened:
            raise ConfigError(
                "DistillConfig: teacher_cache='top_logits' keeps probabilities, which no temperature of a logit loss "
                f"can soften (got {softened[0].temperature!r}). Use teacher_cache='hidden_states'."
            )
        if self.teacher_cache == "token_scores" and all(term.kind != "tsld" for term in self.terms()):
            raise ConfigError("DistillConfig: only TSLD has token scores. Use teacher_cache='hidden_states'.")
        if self.teacher_cache and not self.fused:
            raise ConfigError("DistillConfig: teacher_cache needs fused=True.")
        if self.teacher_cache and (self.taps or not self.needs_teacher):
            raise ConfigError(
                f"DistillConfig: teacher_cache={self.teacher_cache!r} keeps what losses over the teacher's logits "
                f"need; here are {', '.join(term.kind for term in self.terms())}. Leave teacher_cache out."
            )
        self.terms()  # the named method's terms are checked too

    def terms(self) -> tuple[LossTerm, ...]:
        """The losses to sum, in order."""
        if self.losses is not None:
            return tuple(_as_term(term) for term in self.losses)
        temperature = {"tsld": self.temperature}
        return tuple(
            LossTerm(kind, temperature=temperature.get(kind), reduction=self.reduction) for kind in METHODS[self.method]
        )

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with a teacher."""
        return any(term.kind != "gt" for term in self.terms())

    @property
    def taps(self) -> tuple[str, ...]:
        """Inner values that the graphs must give out: a subset of ('hidden_states', 'attention_scores')."""
        kinds = {term.kind for term in self.terms()}
        named = (("hidden", "hidden_states"), ("attention", "attention_scores"))
        return tuple(tap for kind, tap in named if kind in kinds)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` turns back into an equal configuration."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["losses"] = None if self.losses is None else [asdict(term) for term in self.terms()]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DistillConfig:
        """Read what `to_dict` wrote, or the same shape from YAML.

        Raises:
            ConfigError: an unknown key or value.
        """
        known = [f.name for f in fields(cls)]
        for key in data:
            if key not in known:
                raise ConfigError(f"distill: unknown key {key!r}. Known keys: {', '.join(known)}.")
        return cls(**data)


def _as_term(term: LossTerm | Mapping[str, Any]) -> LossTerm:
    if isinstance(term, LossTerm):
        return term
    known = [f.name for f in fields(LossTerm)]
    if not isinstance(term, Mapping) or "kind" not in term:
        raise ConfigError(f"DistillConfig.losses: expected a mapping such as {{kind: tsld, weight: 1}}, got {term!r}.")
    for key in term:
        if key not in known:
            raise ConfigError(f"DistillConfig.losses: unknown key {key!r}. Known keys: {', '.join(known)}.")
    return LossTerm(**term)
