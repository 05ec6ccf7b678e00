"""The quantisers once more, as plain float64 loops over rows: what the tests compare the package with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def lines_of(weight: Floats, group_size: int) -> list[tuple[slice, slice]]:
    """The pieces of a weight that share one scale: the tensor (-1), each row (0), or groups within rows."""
    rows, columns = weight.shape
    if group_size == -1:
        return [(slice(0, rows), slice(0, columns))]
    width = group_size or columns
    return [(slice(r, r + 1), slice(c, c + width)) for r in range(rows) for c in range(0, columns, width)]


def top_level(bits: int) -> int:
    return 1 if bits == 2 else 2 ** (bits - 1) - 1


def find_scale(line: Floats, scheme: str, bits: int) -> tuple[float, float | None]:
    """Scale and zero point (None: fixed) of one line, by the formulas of the papers."""
    size = np.abs(line)
    if scheme == "twn":
        kept = size[size > 0.7 * size.mean()]
        return (float(kept.mean()) if kept.size else 0.0), None
    if scheme == "absmean":
        return float(size.mean()), None
    if scheme == "absmax":
        return float(size.max()) / top_level(bits), None
    return range_of(float(line.min()), float(line.max()), bits)


def range_of(low: float, high: float, bits: int) -> tuple[float, float]:
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits - 1)
    return scale, float(np.clip(np.round(-low / scale), 0, 2**bits - 1)) if scale else 0.0


def quantise_line(line: Floats, scheme: str, bits: int, scale: float, zero: float | None) -> Floats:
    """Every value of a line on the grid of its scale."""
    if scheme == "twn":
        return np.where(np.abs(line) > 0.7 * np.abs(line).mean(), np.sign(line), 0.0) * scale
    if scale == 0.0:
        return np.zeros_like(line)
    if bits == 2:
        low, high = -1.0, 1.0
    elif zero is None:
        low, high = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    else:
        low, high = -zero, 2.0**bits - 1 - zero
    return np.clip(np.round(line / scale), low, high) * scale


def fake_quantise(
    weight: Floats, scheme: str, bits: int, group_size: int, scales: Floats | None = None, zeros: Floats | None = None
) -> Floats:
    """The quantised weight; learned scales (and zero points) come in order of the lines."""
    result = np.empty_like(weight)
    for number, place in enumerate(lines_of(weight, group_size)):
        if scales is None:
            scale, zero = find_scale(weight[place], scheme, bits)
        else:
            scale, zero = float(scales.flat[number]), None if zeros is None else float(zeros.flat[number])
        result[place] = quantise_line(weight[place], scheme, bits, scale, zero)
    return result
