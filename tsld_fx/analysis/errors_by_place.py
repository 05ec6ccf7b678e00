"""Quantisation error by token position and by depth: how it accumulates along a sequence under causal attention.

Kim et al., NeurIPS 2023, arXiv 2308.06744, section 3: in a decoder a later token attends to more quantised keys and
values, so the error of the attention output grows along the sequence and from layer to layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tsld_fx.analysis.activations import Activations, run

Mode = Literal["accumulated", "local"]


@dataclass(frozen=True)
class PlaceErrors:
    """Error of the student at every place.

    Attributes:
        relative: (tensor, mode) -> float64 [layers, T]: sum of |student - teacher|^2 over the sum of |teacher|^2 at a
            position. Modes: `accumulated` is the student as it runs; `local` feeds every layer the teacher's hidden
            states, which leaves what the layer itself adds. Logits have one line and no `local`.
        mean_squared: the same keys, mean of (student - teacher)^2 over sequences and features.
    """

    relative: dict[tuple[str, Mode], Tensor]
    mean_squared: dict[tuple[str, Mode], Tensor]

    def rows(self) -> list[dict[str, Any]]:
        """One mapping per tensor, mode, layer and position, as `errors.csv` has them."""
        made = []
        for (tensor, mode), values in self.relative.items():
            squared = self.mean_squared[tensor, mode]
            for layer, position in torch.cartesian_prod(*(torch.arange(n) for n in values.shape)).tolist():
                made.append(
                    {
                        "tensor": tensor,
                        "mode": mode,
                        "layer": layer,
                        "position": position,
                        "relative_error": float(values[layer, position]),
                        "mean_squared_error": float(squared[layer, position]),
                    }
                )
        return made

    def growth(self, tensor: str, mode: Mode = "accumulated") -> list[float]:
        """Per layer: mean relative error of the last quarter of the positions over that of the second eighth.

        The first eighth is left out: the very first tokens (attention sinks) have activations of another size.
        """
        values = self.relative[tensor, mode]
        length = values.shape[1]
        early = values[:, length // 8 : max(length // 4, length // 8 + 1)].mean(1)
        late = values[:, -max(length // 4, 1) :].mean(1)
        return [float(x) for x in late / early.clamp_min(1e-30)]


class _Sums:
    """Sums over the sequences of [layers, T]."""

    def __init__(self) -> None:
        self.error: Tensor | float = 0.0
        self.power: Tensor | float = 0.0
        self.count = 0

    def add(self, student: list[Tensor], teacher: list[Tensor]) -> None:
        pairs = [(s.double(), t.double()) for s, t in zip(student, teacher, strict=True)]
        self.error = self.error + torch.stack([(s - t).square().sum((0, 2)).cpu() for s, t in pairs])
        self.power = self.power + torch.stack([t.square().sum((0, 2)).cpu() for _, t in pairs])
        self.count += teacher[0].shape[0] * teacher[0].shape[2]

    def means(self) -> tuple[Tensor, Tensor]:
        assert isinstance(self.error, Tensor) and isinstance(self.power, Tensor)
        return self.error / self.power.clamp_min(1e-300), self.error / self.count


def errors_by_place(
    teacher: PreTrainedModel, student: PreTrainedModel, batches: Iterable[Tensor], *, local: bool = True
) -> PlaceErrors:
    """Compare two models of one architecture on the same tokens.

    Args:
        teacher, student: decoders whose modules run (`as_modules`), with equal layers and hidden sizes.
        batches: token numbers [B, T], the same T in all.
        local: also run each student layer on the teacher's hidden states.
    """
    sums: dict[tuple[str, Mode], _Sums] = {}
    for ids in batches:
        theirs, ours = run(teacher, ids), run(student, ids)
        _add(sums, "accumulated", ours, theirs)
        sums.setdefault(("logits", "accumulated"), _Sums()).add([ours.logits], [theirs.logits])
        if local:
            _add(sums, "local", run(student, ids, feed=theirs.inputs), theirs)
    means = {key: value.means() for key, value in sums.items()}
    return PlaceErrors({k: v[0] for k, v in means.items()}, {k: v[1] for k, v in means.items()})


def _add(sums: dict[tuple[str, Mode], _Sums], mode: Mode, ours: Activations, theirs: Activations) -> None:
    sums.setdefault(("attention_output", mode), _Sums()).add(ours.attention_outputs, theirs.attention_outputs)
    sums.setdefault(("hidden_state", mode), _Sums()).add(ours.hidden_states, theirs.hidden_states)
