"""Triton kernels of the fused head loss: one program reads one row of logits and leaves its gradient in their place."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tsld_fx.fused_loss_rows import RowLosses, RowWeights

_BLOCK = 2048
_WARPS = 8


@triton.jit
def _cross_entropy_rows(z, targets, losses, stride, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    z += row * stride
    offsets = tl.arange(0, BLOCK)
    highest = tl.full([BLOCK], -1e30, tl.float32)  # finite, so that no difference of two of them is NaN
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        x = tl.load(z + start + offsets, mask=start + offsets < size, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, x)
        total = total * tl.exp(highest - higher) + tl.exp(x - higher)
        highest = higher
    top = tl.max(highest, 0)
    partition = top + tl.log(tl.sum(total * tl.exp(highest - top), 0))
    target = tl.load(targets + row)
    known = (target >= 0) & (target < size)
    at = tl.load(z + tl.where(known, target, 0)).to(tl.float32)
    loss = tl.where(known, partition - at, float("nan"))
    tl.store(losses + row, tl.where(target == -100, 0.0, loss))


@triton.jit
def _loss_rows(
    z, t, targets, hard, soft, hot, hard_out, soft_out, hot_out,
    z_stride, t_stride, size, temperature,
    HARD: tl.constexpr, SOFT: tl.constexpr, HOT: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z += row * z_stride
    t += row * t_stride
    offsets = tl.arange(0, BLOCK)
    inverse = 1.0 / temperature
    zeros = tl.zeros([BLOCK], tl.float32)
    lowest = tl.full([BLOCK], -1e30, tl.float32)
    zh, zs, th, ts, cross = lowest, zeros, lowest, zeros, zeros
    hzs, hts, hot_cross = zeros, zeros, zeros
    for start in range(0, size, BLOCK):
        inside = start + offsets < size
        x = tl.load(z + start + offsets, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(zh, x)
        zs = zs * tl.exp(zh - higher) + tl.exp(x - higher)
        if HOT:
            hzs = hzs * tl.exp((zh - higher) * inverse) + tl.exp((x - higher) * inverse)
        zh = higher
        if SOFT or HOT:
            y = tl.load(t + start + offsets, mask=inside, other=float("-inf")).to(tl.float32)
            value = tl.where(inside, x, 0.0)
            higher = tl.maximum(th, y)
            if SOFT:
                keep, new = tl.exp(th - higher), tl.exp(y - higher)
                ts = ts * keep + new
                cross = cross * keep + new * value
            if HOT:
                keep, new = tl.exp((th - higher) * inverse), tl.exp((y - higher) * inverse)
                hts = hts * keep + new
                hot_cross = hot_cross * keep + new * value
            th = higher
    z_top, t_top = tl.max(zh, 0), tl.max(th, 0)
    partition = z_top + tl.log(tl.sum(zs * tl.exp(zh - z_top), 0))
    target = tl.load(targets + row)
    known = (target >= 0) & (target < size)
    label = tl.where(known, target, -1)
    at = tl.load(z + tl.where(known, target, 0)).to(tl.float32)
    loss = tl.where(known, partition - at, float("nan"))
    tl.store(hard_out + row, tl.where(target == -100, 0.0, loss))
    a, g, h = 0.0, 0.0, 0.0
    t_partition, hz_partition, ht_partition = 0.0, 0.0, 0.0
    if HARD:
        g = tl.load(hard + row)
    if SOFT:
        a = tl.load(soft + row)
        share = tl.exp(th - t_top)
        mass = tl.sum(ts * share, 0)
        t_partition = t_top + tl.log(mass)
        tl.store(soft_out + row, partition - tl.sum(cross * share, 0) / mass)
    if HOT:
        h = tl.load(hot + row)
        hz_partition = z_top * inverse + tl.log(tl.sum(hzs * tl.exp((zh - z_top) * inverse), 0))
        share = tl.exp((th - t_top) * inverse)
        mass = tl.sum(hts * share, 0)
        ht_partition = t_top * inverse + tl.log(mass)
        tl.store(hot_out + row, hz_partition - tl.sum(hot_cross * share, 0) / mass * inverse)
    if GRADIENT:
        for start in range(0, size, BLOCK):
            inside = start + offsets < size
            x = tl.load(z + start + offsets, mask=inside, other=0.0).to(tl.float32)
            change = tl.exp(x - partition) * (a + g)
            if SOFT or HOT:
                y = tl.load(t + start + offsets, mask=inside, other=0.0).to(tl.float32)
                if SOFT:
                    change -= a * tl.exp(y - t_partition)
                if HOT:
                    change += h * inverse * (tl.exp(x * inverse - hz_partition) - tl.exp(y * inverse - ht_partition))
            if HARD:
                change -= tl.where(start + offsets == label, g, 0.0)
            tl.store(z + start + offsets, change.to(z.dtype.element_ty), mask=inside)


def cross_entropy_rows(logits: Tensor, targets: Tensor) -> Tensor:
    """See `fused_loss_rows.cross_entropy_rows`."""
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    grid = (logits.shape[0],)
    _cross_entropy_rows[grid](
        logits, targets, losses, logits.stride(0), logits.shape[1], BLOCK=_BLOCK, num_warps=_WARPS
    )
    return losses


def loss_rows(
    student: Tensor, teacher: Tensor | None, targets: Tensor, weights: RowWeights, gradient: bool
) -> RowLosses:
    """See `fused_loss_rows.loss_rows`."""
    rows, size = student.shape
    outs = [torch.empty(rows, dtype=torch.float32, device=student.device) for _ in range(3)]
    given = [weights.hard, weights.soft, weights.hot]
    other = student if teacher is None else teacher
    _loss_rows[(rows,)](
        student, other, targets, *(outs[0] if w is None else w for w in given), *outs,
        student.stride(0), other.stride(0), size, weights.temperature,
        HARD=given[0] is not None, SOFT=given[1] is not None, HOT=given[2] is not None, GRADIENT=gradient,
        BLOCK=_BLOCK, num_warps=_WARPS,
    )  # fmt: skip
    return RowLosses(outs[0], None if given[1] is None else outs[1], None if given[2] is None else outs[2])
