"""The dead zone of ternary weights: those that become 0, and the bias that Tequila (arXiv 2509.23809) makes of them."""

from __future__ import annotations

import torch
from torch import Tensor

from tsld_fx.quantizers import as_lines, levels_and_scale


def is_dead(weight: Tensor, scale: Tensor | None, scheme: str, group_size: int) -> Tensor:
    """Which weights [out, in] a ternary scheme turns into 0."""
    levels, _, _ = levels_and_scale(as_lines(weight, group_size), scale, None, scheme, 2)
    return levels.reshape(weight.shape) == 0


def bias_of_dead_weights(
    weight: Tensor, scale: Tensor | None, bias: Tensor | None, scheme: str, group_size: int, factor: float
) -> Tensor:
    """Tequila (arXiv 2509.23809): bias + factor * sum of the weights that become 0, [out], in the weight's dtype.

    The factor's gradient reaches these weights straight, beside what the straight-through estimator gives them.
    """
    dead = torch.where(is_dead(weight, scale, scheme, group_size), weight, 0.0)
    found = dead.sum(1, dtype=torch.float64).mul_(factor)
    return (found if bias is None else found + bias).to(weight.dtype)
