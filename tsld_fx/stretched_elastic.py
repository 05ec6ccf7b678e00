"""Stretched elastic quantisation (SEQ) of ParetoQ, Liu et al., arXiv 2502.02631: evenly spread levels, a learned scale.

With the authors' alpha, w_q = alpha * (round(clip(w / alpha, -c, c) * k / 2 - d) + d) / (k / 2) and c = 0.99:

- ternary: k = 3, d = 0, levels -1, 0, 1 times s = alpha / 1.5;
- four levels: k = 4, d = 1/2, levels -3, -1, 1, 3 times s = alpha / 4, none of them zero. They are levels of the
  symmetric 4-bit range, which stores and multiplies them.

What is learned here is s. The gradient passes to weights with |w| <= c * alpha, and s receives
sum(grad * (level - w/s there, level elsewhere)) / sqrt(elements of a line).
"""

from __future__ import annotations

from torch import Tensor

CLIP = 0.99
STRETCH = {2: 1.5, 4: 4.0}  # alpha / s by stored bits: ternary, and four levels in 4 bits


def levels(lines: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Levels [lines, elements] as floats, for scales [lines, 1] that are not 0."""
    ratio = lines / scale
    if bits == 2:
        return ratio.round_().clamp_(-1.0, 1.0).add_(0.0)  # + 0.0: no negative zero
    edge = 2 * CLIP
    return ratio.div_(2).clamp_(-edge, edge).sub_(0.5).round_().mul_(2).add_(1.0)


def first_scale(lines: Tensor, bits: int) -> Tensor:
    """The first s [lines, 1]: the authors' alpha = max|w|."""
    return lines.abs().amax(1, keepdim=True) / STRETCH[bits]


def straight_through(grads: Tensor, lines: Tensor, scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Gradients of the weights [lines, elements] and of s [lines, 1]."""
    ratio = lines / scale
    inside = ratio.abs() <= CLIP * STRETCH[bits]
    slope = levels(lines, scale, bits) - ratio * inside
    return grads * inside, (grads * slope).sum(1, keepdim=True) / lines.shape[1] ** 0.5
