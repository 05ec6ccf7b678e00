"""The mathematics of every quantiser in plain torch: the one definition that training, packing and tests share.

A weight [out_features, in_features] is viewed as [scales, elements]: one line per scale. Everything is computed in
float32 (float64 for a float64 weight). `levels` are code - zero as floats, so a quantised weight is levels * scale.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tsld_fx import stretched_elastic
from tsld_fx.errors import ConfigError

TWN_THRESHOLD = 0.7  # Li et al., arXiv 1605.04711, eq. 6
LEARNED = ("pact", "lsq", "seq")
SCHEMES = ("twn", "absmean", "minmax", "absmax", *LEARNED)
_BITS_OF_SCHEME = {"twn": (2,), "absmean": (2,), "minmax": (4, 8), "absmax": (4, 8), "seq": (2, 4)}


@dataclass(frozen=True)
class Quantized:
    """A quantised weight: `codes` uint8 [out, in], `scale` float32 [out, groups] or [1, 1], `zero` uint8 or None."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


def check_scheme(scheme: str, bits: int) -> None:
    """Refuse a scheme that does not exist or does not exist at this width.

    Raises:
        ConfigError: it names the schemes or widths that do exist.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"tsld::fake_quant: scheme {scheme!r} is not one of {', '.join(SCHEMES)}.")
    allowed = _BITS_OF_SCHEME.get(scheme, (2, 4, 8))
    if bits not in allowed:
        raise ConfigError(f"tsld::fake_quant: scheme {scheme!r} works with bits in {allowed}, got {bits}.")


def scale_shape(out_features: int, in_features: int, group_size: int) -> tuple[int, int]:
    """Shape of the scales of an [out_features, in_features] weight: [1, 1], [out, 1] or [out, groups].

    Raises:
        ConfigError: the group size does not divide in_features.
    """
    if group_size == -1:
        return (1, 1)
    if group_size == 0:
        return (out_features, 1)
    if group_size < -1 or in_features % group_size:
        raise ConfigError(
            f"group_size={group_size} does not divide in_features={in_features}. Choose a divisor of "
            f"{in_features}, use granularity='channel', or leave the layer out through QuantConfig.overrides."
        )
    return (out_features, in_features // group_size)


def as_lines(weight: Tensor, group_size: int) -> Tensor:
    """View an [out, in] weight as [scales, elements] in the dtype to compute in (float32, or float64 kept)."""
    rows, groups = scale_shape(weight.shape[0], weight.shape[1], group_size)
    compute = weight if weight.dtype == torch.float64 else weight.float()
    return compute.reshape(rows * groups, -1)


def bounds(bits: int, zero: Tensor | None) -> tuple[float | Tensor, float | Tensor]:
    """Lowest and highest level: -1 and 1 for ternary, -zero and 2^bits - 1 - zero otherwise."""
    if bits == 2:
        return -1.0, 1.0
    if zero is None:
        return -float(2 ** (bits - 1)), float(2 ** (bits - 1) - 1)
    return -zero, (2**bits - 1) - zero


def _nonzero(scale: Tensor) -> Tensor:
    """The scale to divide by: 1 where it is 0, so that an all-zero line gives zeros and never NaN."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def highest_level(bits: int) -> int:
    """Qp of LSQ: 1 for ternary, 2^(bits-1) - 1 otherwise."""
    return 1 if bits == 2 else 2 ** (bits - 1) - 1


def on_triton(weight: Tensor, group_size: int = 0) -> bool:
    """Whether the Triton kernels quantise this weight: a real CUDA tensor whose lines fit into a program."""
    if not weight.is_cuda or type(weight) not in (Tensor, torch.nn.Parameter) or not _has_triton():
        return False
    from tsld_fx import fake_quant_triton

    return fake_quant_triton.fits(weight, group_size)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _twn_levels(lines: Tensor) -> tuple[Tensor, Tensor]:
    """TWN: threshold 0.7 * mean|w|, scale = mean of |w| above it; both from the same comparison."""
    if on_triton(lines):
        from tsld_fx.fake_quant_triton import fake_quantize

        quantised, scale, _ = fake_quantize(lines, None, None, "twn", 2, 0)
        return quantised.sign_(), scale.unsqueeze(1)
    work = lines.abs()
    threshold = work.mean(1, keepdim=True).mul_(TWN_THRESHOLD)
    levels = torch.gt(lines, threshold, out=torch.empty_like(lines))
    levels.sub_(torch.lt(lines, -threshold, out=work))
    total = torch.linalg.vecdot(lines, levels).unsqueeze(1)
    count = torch.linalg.vecdot(levels, levels).unsqueeze(1)
    scale = total / count.clamp_min_(1)
    return levels, scale


def range_scale(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point (floats) of the asymmetric range [min(low, 0), max(high, 0)]."""
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = (high - low) / (2**bits - 1)
    zero = torch.round(-low / _nonzero(scale)).clamp_(0, 2**bits - 1)
    return scale, zero


def dynamic_scale(lines: Tensor, scheme: str, bits: int) -> tuple[Tensor, Tensor | None]:
    """Scale [lines, 1] and zero point [lines, 1] or None that a scheme without learned values finds in the weights."""
    if scheme == "twn":
        return _twn_levels(lines)[1], None
    if (scheme == "absmean" or bits != 2) and on_triton(lines):
        from tsld_fx.fake_quant_triton import fake_quantize

        _, scale, zero = fake_quantize(lines, None, None, scheme, bits, 0)
        return scale.unsqueeze(1), None if zero is None else zero.unsqueeze(1).float()
    if scheme == "absmean":
        return lines.abs().mean(1, keepdim=True), None
    if scheme == "absmax":
        return lines.abs().amax(1, keepdim=True) / highest_level(bits), None
    low, high = torch.aminmax(lines, dim=1, keepdim=True)
    return range_scale(low, high, bits)


def initial_scale(
    weight: Tensor, bits: int, symmetric: bool, group_size: int, scheme: str = "lsq"
) -> tuple[Tensor, Tensor | None]:
    """First values of a learned scale and its zero point, uint8 or None.

    LSQ: TWN's scale for ternary, the range's otherwise. SEQ: see `stretched_elastic.first_scale`.
    """
    shape = scale_shape(weight.shape[0], weight.shape[1], group_size)
    if scheme == "seq":
        return stretched_elastic.first_scale(as_lines(weight, group_size), bits).reshape(shape), None
    scheme = "twn" if bits == 2 else ("absmax" if symmetric else "minmax")
    scale, zero = dynamic_scale(as_lines(weight, group_size), scheme, bits)
    return scale.reshape(shape), None if zero is None else zero.reshape(shape).to(torch.uint8)


def clipped_scale(
    weight: Tensor, gamma: Tensor, bits: int, symmetric: bool, group_size: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """PACT / QuantGPT: the clip alpha = gamma * mean|w| turned into a scale (arXiv 2203.10705, section 3.2).

    Returns:
        scale [out, groups], zero point uint8 or None, and d scale / d gamma, all in the scales' shape.
    """
    lines = as_lines(weight, group_size)
    mean = lines.abs().mean(1, keepdim=True)
    alpha = gamma.to(lines.dtype).reshape(-1, 1) * mean
    shape = scale_shape(weight.shape[0], weight.shape[1], group_size)
    if symmetric or bits == 2:
        top = highest_level(bits)
        return (alpha / top).reshape(shape), None, (mean / top).reshape(shape)
    low, high = torch.aminmax(lines, dim=1, keepdim=True)
    scale, zero = range_scale(torch.maximum(low, -alpha), torch.minimum(high, alpha), bits)
    cut = (low < -alpha).to(lines.dtype) + (high > alpha).to(lines.dtype)
    slope = mean * cut / (2**bits - 1)
    return scale.reshape(shape), zero.reshape(shape).to(torch.uint8), slope.reshape(shape)


def levels_and_scale(
    lines: Tensor, scale: Tensor | None, zero: Tensor | None, scheme: str, bits: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Levels [lines, elements], scale [lines, 1] and zero point (float) [lines, 1] or None of a weight's lines.

    Raises:
        ConfigError: a learned scheme without its scale.
    """
    if scheme == "twn":  # the levels come from the threshold, a frozen scale only stands in for the one found
        levels, found = _twn_levels(lines)
        return levels, found if scale is None else scale.to(lines.dtype).reshape(-1, 1), None
    if scale is None:
        if scheme in LEARNED:
            raise ConfigError(f"tsld::fake_quant: scheme {scheme!r} needs a scale tensor.")
        found, point = dynamic_scale(lines, scheme, bits)
    else:
        found = scale.to(lines.dtype).reshape(-1, 1)
        point = None if zero is None else zero.to(lines.dtype).reshape(-1, 1)
    if scheme == "seq":
        return stretched_elastic.levels(lines, _nonzero(found), bits), found, None
    low, high = bounds(bits, point)
    levels = (lines / _nonzero(found)).round_()
    levels = levels.clamp_(low, high) if point is None else torch.clamp(levels, low, high)
    return (
        levels.add_(0.0),
        found,
        point,
    )  # + 0.0 turns -0.0 into +0.0, the sign of a zero that packing gives back


def fake_quantize(
    weight: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    scheme: str,
    bits: int,
    group_size: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The float weight that the packed codes stand for: (code - zero) * scale, in the weight's shape.

    Args:
        dtype: of the result, the weight's own when None; the value is rounded to it once.
    """
    check_scheme(scheme, bits)
    scale_shape(weight.shape[0], weight.shape[1], group_size)
    known = scheme != "seq" and (scheme == "twn" or scale is not None or scheme not in LEARNED)
    if known and on_triton(weight, group_size):
        from tsld_fx.fake_quant_triton import fake_quantize as kernel

        return kernel(weight, scale, zero, scheme, bits, group_size, dtype)[0]
    levels, found, _ = levels_and_scale(as_lines(weight, group_size), scale, zero, scheme, bits)
    return levels.mul_(found).reshape(weight.shape).to(dtype or weight.dtype)


def quantize(
    weight: Tensor, scale: Tensor | None, zero: Tensor | None, scheme: str, bits: int, group_size: int
) -> Quantized:
    """The codes, scales and zero points of which `fake_quantize` is the dequantised form."""
    check_scheme(scheme, bits)
    levels, found, point = levels_and_scale(as_lines(weight, group_size), scale, zero, scheme, bits)
    shape = scale_shape(weight.shape[0], weight.shape[1], group_size)
    offset = point if point is not None else (1 if bits == 2 else 2 ** (bits - 1))
    return Quantized(
        codes=(levels + offset).to(torch.uint8).reshape(weight.shape),
        scale=found.float().reshape(shape),
        zero=None if point is None else point.to(torch.uint8).reshape(shape),
    )


def straight_through(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    scheme: str,
    bits: int,
    group_size: int,
) -> tuple[Tensor, Tensor | None]:
    """Gradients with respect to the weight and the scale.

    Schemes that find their scale in the weights pass the gradient on unchanged. With a learned scale (`pact`, `lsq`)
    it passes where the weight is inside the clip, and the scale receives
    sum(grad * (level - w/s inside, bound outside)) (LSQ, arXiv 1902.08153, eq. 3; QuantGPT, arXiv 2203.10705, eq. 6),
    times 1 / sqrt(elements * Qp) for `lsq` (section 2.2). For `seq` see `stretched_elastic`.
    """
    if scale is None or scheme not in LEARNED:
        return grad, None
    if scheme != "seq" and on_triton(weight, group_size):
        from tsld_fx.fake_quant_triton import straight_through as kernel

        return kernel(grad, weight, scale, zero, scheme, bits, group_size)
    lines = as_lines(weight, group_size)
    grads = as_lines(grad, group_size).to(lines.dtype)
    found = _nonzero(scale.to(lines.dtype).reshape(-1, 1))
    if scheme == "seq":
        through, change = stretched_elastic.straight_through(grads, lines, found, bits)
        return through.reshape(weight.shape).to(weight.dtype), change.reshape(scale.shape).to(scale.dtype)
    point = None if zero is None else zero.to(lines.dtype).reshape(-1, 1)
    low, high = bounds(bits, point)
    ratio = lines / found
    inside = (ratio >= low) & (ratio <= high)
    grad_weight = (grads * inside).reshape(weight.shape).to(weight.dtype)
    levels = torch.clamp(ratio.round(), low, high)
    grad_scale = (grads * (levels - ratio * inside)).sum(1, keepdim=True)
    if scheme == "lsq":
        grad_scale = grad_scale / (lines.shape[1] * highest_level(bits)) ** 0.5
    return grad_weight, grad_scale.reshape(scale.shape).to(scale.dtype)


def saturated_fraction(weight: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int) -> float:
    """Share of the weights that lie more than half a step beyond the lowest or highest level."""
    lines = as_lines(weight, group_size)
    ratio = lines / _nonzero(scale.to(lines.dtype).reshape(-1, 1))
    low, high = bounds(bits, None if zero is None else zero.to(lines.dtype).reshape(-1, 1))
    return float(((ratio < low - 0.5) | (ratio > high + 0.5)).double().mean())


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no Inf: one pass without temporaries unless the sum itself overflows."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
