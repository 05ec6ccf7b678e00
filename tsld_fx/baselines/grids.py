"""The grid of a weight without training: scales and zero points searched for the least error of the layer's output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tsld_fx.quantizers import as_lines, bounds, dynamic_scale, initial_scale, scale_shape

# Factors of the full range that are tried, in this order; ties keep the first. Ternary starts from TWN's scale.
_SHRINK = tuple(1 - 0.05 * i for i in range(15))
_TERNARY = (1.0, *(0.6 + 0.05 * i for i in range(8)), *(1.05 + 0.05 * i for i in range(8)))


@dataclass(frozen=True)
class Grid:
    """Where a weight [out, in] may lie: (level) * scale with whole levels between low and high.

    Attributes:
        scale: [lines, 1], one line per scale.
        zero: [lines, 1] whole floats, or None for a grid that is centred by itself.
        bits, group_size: as in tsld::fake_quant; `ternary` tells 2 bits with 3 levels from 2 bits with 4.
    """

    scale: Tensor
    zero: Tensor | None
    bits: int
    group_size: int
    ternary: bool

    def limits(self) -> tuple[float | Tensor, float | Tensor]:
        """Lowest and highest level, per line where there are zero points."""
        if self.bits == 2 and not self.ternary:
            assert self.zero is not None
            return -self.zero, 3 - self.zero
        return bounds(self.bits, self.zero)

    def levels(self, weight: Tensor) -> Tensor:
        """Nearest levels of a weight [out, in]."""
        lines = as_lines(weight, self.group_size)
        low, high = self.limits()
        divisor = torch.where(self.scale == 0, torch.ones_like(self.scale), self.scale)
        whole = (lines / divisor).round()
        return torch.clamp(whole, low, high).reshape(weight.shape)  # type: ignore[arg-type]

    def values(self, levels: Tensor) -> Tensor:
        """The weight that levels [out, in] stand for."""
        return (as_lines(levels, self.group_size) * self.scale).reshape(levels.shape)

    def of_column(self, column: int, columns: int, rows: int) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """Scale, lowest and highest level [out] (or numbers) of one input feature."""
        per_row = 1 if self.group_size <= 0 else columns // self.group_size
        group = 0 if self.group_size <= 0 else column // self.group_size
        low, high = (self._pick(x, rows, per_row, group) for x in self.limits())
        scale = self._pick(self.scale, rows, per_row, group)
        assert isinstance(scale, Tensor)
        return scale, low, high

    def _pick(self, value: Tensor | float, rows: int, per_row: int, group: int) -> Tensor | float:
        if not isinstance(value, Tensor):
            return value
        return value.expand(rows, 1)[:, 0] if value.numel() == 1 else value.reshape(rows, per_row)[:, group]


def find_grid(
    weight: Tensor, importance: Tensor, bits: int, group_size: int, *, symmetric: bool = False, ternary: bool = True
) -> Grid:
    """The grid whose nearest levels have the least sum of importance * (error)^2 per line, among shrunk ranges.

    Args:
        weight: float [out, in].
        importance: float [in], not negative: the diagonal of the layer's input Gram matrix.
        bits: 2, 4 or 8. `ternary` False gives 2 bits four levels with a zero point, as GPTQ's and AWQ's papers do.
    """
    if bits == 2 and not ternary:
        scale, zero = dynamic_scale(as_lines(weight, group_size), "minmax", 2)
    else:
        first, point = initial_scale(weight, bits, symmetric, group_size)
        scale, zero = first.reshape(-1, 1), None if point is None else point.reshape(-1, 1)
    zero = None if zero is None else zero.to(scale.dtype)
    lines = as_lines(weight, group_size)
    factors = as_lines(importance.to(lines.dtype).expand_as(weight).contiguous(), group_size)
    best = torch.full_like(scale, float("inf"))
    kept = scale.clone()
    for factor in _TERNARY if bits == 2 and ternary else _SHRINK:
        grid = Grid(scale * factor, zero, bits, group_size, ternary)
        error = as_lines(grid.values(grid.levels(weight)), group_size) - lines
        cost = (factors * error.square()).sum(1, keepdim=True)
        kept = torch.where(cost < best, grid.scale, kept)
        best = torch.minimum(cost, best)
    kept = kept.float().to(scale.dtype)  # scales are stored in float32
    return Grid(kept, zero, bits, group_size, ternary)


def shape_of(grid: Grid, weight: Tensor) -> tuple[int, int]:
    """Shape in which the scales of a weight are stored."""
    return scale_shape(weight.shape[0], weight.shape[1], grid.group_size)
