"""A low-bit product together with what surrounds it in a decoding step, in one stream kernel.

Before the product: RMSNorm, after a residual was added. After it: silu(gate) * up, where tiles of 8 rows of both take
turns. `fused_linear` says None where no kernel does it (many tokens, mostly): `tsld_fx.decode_linear_ops` then computes
the parts one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tsld_fx.codegen.activations import ACTIVATIONS, aligned_rows
from tsld_fx.codegen.cuda_gemm import LowBitGemm

MOST_TOKENS = 8  # of a stream kernel that normalises: each block does so for all tokens


@dataclass(frozen=True)
class Norm:
    """RMSNorm of x + residual: weight [k], residual in x's shape or None."""

    weight: Tensor
    eps: float
    residual: Tensor | None = None


def fused_linear(
    gemm: LowBitGemm, x: Tensor, bias: Tensor | None, norm: Norm | None, gated: bool
) -> tuple[Tensor, Tensor | None] | None:
    """x [..., k] -> (y [..., n], or n / 2 features where gated; x + residual or None), or None: no kernel."""
    weights, m = gemm.weights, x.numel() // max(x.shape[-1], 1)
    n, k = weights.out_features, weights.in_features
    if x.dtype not in ACTIVATIONS or not 0 < m <= MOST_TOKENS or x.shape[-1] != k or x.device != gemm.device:
        return None
    if (norm is not None and not _norm_fits(norm, x)) or (gated and n % 16):
        return None
    activation = ACTIVATIONS[x.dtype]
    plan = gemm.plan(m, activation)
    if plan.config.kernel != "stream" or plan.splits > 1:
        return None
    prepared = gemm._prepare(m, activation, None, None, norm is not None, gated)
    rows = aligned_rows(x.reshape(m, k))
    y = torch.empty(*x.shape[:-1], n // 2 if gated else n, dtype=x.dtype, device=x.device)
    extra, total = None, None
    if norm is not None:
        residual = None if norm.residual is None else norm.residual.contiguous()
        total = None if residual is None else torch.empty_like(residual)
        extra = (norm.weight.contiguous(), residual, total, norm.eps)
    with torch.cuda.device(gemm.device):
        gemm._launch(rows, None, bias, y, prepared, norm=extra)
    return y, total


def _norm_fits(norm: Norm, x: Tensor) -> bool:
    """Whole 16-byte vectors of one type."""
    same = norm.weight.dtype == x.dtype and norm.weight.shape == x.shape[-1:]
    if norm.residual is not None:
        same = same and norm.residual.shape == x.shape and norm.residual.dtype == x.dtype
    return same and x.shape[-1] % 8 == 0
