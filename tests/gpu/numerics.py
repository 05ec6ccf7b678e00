"""A layer's product against float64, into memory that holds NaN."""

from __future__ import annotations

import torch
from torch import Tensor

from tsld_fx.codegen import LowBitGemm
from tsld_fx.codegen.select_config import Plan

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
TOKENS = (1, 2, 7, 16, 17, 64, 127, 2048)


def poison(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Leave NaN in the block that the allocator hands out next for an output of this size."""
    torch.full(shape, float("nan"), dtype=dtype, device="cuda")


def views(base: Tensor) -> list[Tensor]:
    """Of [6, 5, 400]: 160 inputs with strides, rows that are not aligned, one token and none."""
    return [
        base[:, :, :160],
        base[:, :, 3:163],
        base[:, :, ::2][:, :, :160],
        base.transpose(0, 1)[:, :, :160],
        base[:, :1, :160].expand(6, 5, 160),
        base[0, 0, :160],
        base[:0, :, :160],
    ]


def relative_error(y: Tensor, expected: Tensor) -> float:
    scale = expected.norm()
    return float((y.double() - expected).norm() / torch.where(scale > 0, scale, 1.0))


def check(gemm: LowBitGemm, weight: Tensor, m: int, dtype: torch.dtype, plan: Plan | None = None) -> None:
    x = torch.randn(m, weight.shape[1], dtype=dtype, device="cuda")
    bias = torch.randn(weight.shape[0], dtype=dtype, device="cuda") if m % 2 else None
    expected = x.double() @ weight.T + (0 if bias is None else bias.double())
    poison((m, weight.shape[0]), dtype)
    y = gemm(x, bias, plan=plan)
    assert y.dtype == dtype and y.shape == expected.shape
    error = relative_error(y, expected)
    assert error <= TOLERANCE[dtype], f"m={m}: relative error {error:.2e}"  # NaN fails too
