"""GPTQ: round one input feature after another and let the ones still to come make up for the error.

Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, arXiv 2210.17323,
algorithm 1. Scales are found before the first rounding ("static groups"), so that any order of columns keeps them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsld_fx.baselines.grids import Grid, find_grid
from tsld_fx.errors import DataError


def gptq_weight(
    weight: Tensor,
    gram: Tensor,
    bits: int,
    group_size: int = 0,
    *,
    symmetric: bool = False,
    ternary: bool = True,
    damping: float = 0.01,
    ordered: bool = True,
    block: int = 128,
) -> tuple[Tensor, Grid]:
    """Quantise one layer.

    Args:
        weight: float [out, in].
        gram: float64 [in, in], the sum of x x^T over the calibration inputs x of the layer.
        bits, group_size, symmetric, ternary: as in `find_grid`.
        damping: this share of the mean diagonal is added to the diagonal.
        ordered: take the input features by falling diagonal (the paper's code calls it act-order).
        block: columns between two updates of the rest.

    Returns:
        levels float [out, in], and the grid: the weight is `grid.values(levels)`.

    Raises:
        DataError: calibration inputs that are not finite.
    """
    if not bool(torch.isfinite(gram).all()):
        raise DataError("gptq: the calibration activations hold NaN or Inf. Use another text or a healthy model.")
    hessian = gram.double().clone()
    work = weight.double().clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0  # features that are always zero: their weights have no effect
    diagonal[dead] = 1.0
    work[:, dead] = 0.0
    grid = find_grid(work, diagonal, bits, group_size, symmetric=symmetric, ternary=ternary)
    diagonal += damping * diagonal.mean()
    order = diagonal.argsort(descending=True) if ordered else torch.arange(len(diagonal), device=weight.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True)
    levels = torch.zeros_like(work)
    work = work[:, order]
    rows, columns = work.shape
    numbers = order.tolist()  # once: the loop below waits for no device
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.zeros(rows, stop - start, dtype=work.dtype, device=work.device)
        for i in range(start, stop):
            column = numbers[i]
            scale, low, high = grid.of_column(column, columns, rows)
            divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
            level = torch.clamp((work[:, i] / divisor).round(), low, high)  # type: ignore[arg-type]
            levels[:, column] = level
            error = (work[:, i] - level * scale) / factor[i, i]
            work[:, i:stop] -= torch.outer(error, factor[i, i:stop])
            errors[:, i - start] = error
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    return levels, grid
