"""AWQ: scale input features by how large their activations are before rounding, and undo it after.

Lin et al., AWQ: Activation-aware Weight Quantization, arXiv 2306.00978, section 3.2: s = mean|x|^alpha, alpha searched
per layer for the least error of the layer's output. Here the division by s stays in the weight, as a simulation: where
it can be folded into the operation before the layer, the result is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsld_fx.baselines.grids import find_grid

STEPS = 20


def awq_weight(
    weight: Tensor,
    gram: Tensor,
    mean_abs: Tensor,
    bits: int,
    group_size: int = 0,
    *,
    symmetric: bool = False,
    ternary: bool = True,
) -> tuple[Tensor, float]:
    """Quantise one layer.

    Args:
        weight: float [out, in].
        gram: float64 [in, in], the sum of x x^T over the layer's calibration inputs x.
        mean_abs: float [in], mean of |x|.
        bits, group_size, symmetric, ternary: as in `find_grid`.

    Returns:
        The weight after quantisation, float64 [out, in], and the alpha chosen.
    """
    work, gram = weight.double(), gram.double()
    size = mean_abs.double().clamp_min(1e-8)
    best, chosen, kept = float("inf"), 0.0, work
    for step in range(STEPS):
        alpha = step / STEPS
        scales = size**alpha
        scales = scales / (scales.amax() * scales.amin()).sqrt()
        grid = find_grid(work * scales, gram.diagonal() / scales.square(), bits, group_size,
                         symmetric=symmetric, ternary=ternary)  # fmt: skip
        made = grid.values(grid.levels(work * scales)) / scales
        error = made - work
        cost = float(torch.einsum("oi,ij,oj->", error, gram, error))
        if cost < best:
            best, chosen, kept = cost, alpha, made
    return kept, chosen
