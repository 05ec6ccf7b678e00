"""What a prepared model gives, and the graphs that it holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, fx
from transformers.utils import ModelOutput

from tsld_fx.config import QuantConfig
from tsld_fx.fused_loss_chunks import Objective
from tsld_fx.layered import LayeredView
from tsld_fx.passes.runner import Listener

Ending = Objective | Literal["head_input"] | None  # how a graph ends: losses, the head's input, or logits
Key = tuple[bool, str]  # with positions; the name of the ending


@dataclass
class PreparedOutput(ModelOutput):
    """What a prepared model returns.

    Attributes:
        loss: cross-entropy with the next token when labels are given.
        logits: [B, T, V].
        hidden_states, attention_scores: one tensor per layer where the taps are on, else None.
        loss_terms, token_scores: with `head_loss`: value of each loss [terms], and the teacher's cross-entropy of each
            token [B, T - 1] when it was computed here.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attention_scores: tuple[Tensor, ...] | None = None
    loss_terms: Tensor | None = None
    token_scores: Tensor | None = None


class HeadInput(NamedTuple):
    """What the head of a model reads: hidden states [B, T, H], weight [V, H], bias [V] or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


@dataclass
class GraphState:
    """The graphs of one prepared model; all of them read the model's own parameters."""

    config: QuantConfig | None  # None: a full-precision model that only runs as a graph (a teacher with taps)
    taps: tuple[str, ...]
    device: torch.device
    listener: Listener | None = None
    graphs: dict[Key, fx.GraphModule] = field(default_factory=dict)
    layered: bool = False  # run by layers, not as the flat graph
    recompute: bool = False  # layers are computed again in the backward pass
    views: dict[bool, LayeredView] = field(default_factory=dict)  # by layers, without and with positions

    def graph_modules(self) -> list[fx.GraphModule]:
        return [*self.graphs.values(), *(part for view in self.views.values() for part in view.graph_modules())]


def ending_name(ending: Ending) -> str:
    """The name of an ending in `Root.forward` and `LayeredView.stage`; "" for logits."""
    return (ending if isinstance(ending, str) else ending.key) if ending else ""
