"""Operators of decode graphs that compute a low-bit product and what surrounds it: RMSNorm before, gating after.

The implementations compose the separate operators, in plain torch on any device: the oracle of the kernels. For fp16
and bf16 tokens of registered weights on CUDA, up to `codegen.fused_linear.MOST_TOKENS`, each is one kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tsld_fx import cuda_linear, decode_ops, ops  # noqa: F401  (they register the operators used here)

_LINEAR = "Tensor packed, Tensor scales, Tensor? zeros, Tensor? bias, int bits, int group_size, int in_features"
torch.library.define("tsld::gated_linear", f"(Tensor x, {_LINEAR}) -> Tensor")
torch.library.define("tsld::norm_linear", f"(Tensor x, Tensor norm_weight, float eps, {_LINEAR}, bool gated) -> Tensor")
torch.library.define(
    "tsld::add_norm_linear",
    f"(Tensor x, Tensor residual, Tensor norm_weight, float eps, {_LINEAR}, bool gated) -> (Tensor, Tensor)",
)


def taking_turns(gate: Tensor, up: Tensor) -> Tensor:
    """Rows [F, ...] of both, F a multiple of 8 -> [2F, ...]: 8 rows of gate, the same 8 of up, and so on."""
    both = torch.stack([gate.unflatten(0, (-1, 8)), up.unflatten(0, (-1, 8))], dim=1)
    return both.flatten(0, 2)


def silu_mul_taking_turns(both: Tensor) -> Tensor:
    """[..., 2F] in the order of `taking_turns` -> silu(gate) * up, [..., F]."""
    if both.is_cuda:
        from tsld_fx.codegen import decode_kernels as kernels

        if kernels.taking_turns_supported(both):
            return kernels.silu_mul_taking_turns(both)
    gate, up = both.unflatten(-1, (-1, 2, 8)).unbind(-2)
    return decode_ops.silu_mul(gate, up).flatten(-2)


def gated_linear(x: Tensor, *linear: Any) -> Tensor:
    """silu(x @ Wg.T) * (x @ Wu.T) with the packed rows of Wg and Wu as `taking_turns` orders them; [..., F].

    `linear`: the arguments of tsld::lowbit_linear after x.
    """
    return silu_mul_taking_turns(torch.ops.tsld.lowbit_linear(x, *linear))


def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, *linear: Any) -> Tensor:
    """lowbit_linear(rms_norm(x)), or gated_linear where the last argument, `gated`, is true."""
    *weight, gated = linear
    y = torch.ops.tsld.lowbit_linear(torch.ops.tsld.rms_norm(x, norm_weight, eps), *weight)
    return silu_mul_taking_turns(y) if gated else y


def add_norm_linear(
    x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, *linear: Any
) -> tuple[Tensor, Tensor]:
    """-> (norm_linear(x + residual), x + residual)."""
    *weight, gated = linear
    normed, total = torch.ops.tsld.add_rms_norm(x, residual, norm_weight, eps)
    y = torch.ops.tsld.lowbit_linear(normed, *weight)
    return silu_mul_taking_turns(y) if gated else y, total


# ---------------------------------------------------------------- CUDA
def _fused(x: Tensor, norm: Any, weight: Any, gated: bool) -> tuple[Tensor, Tensor | None] | None:
    """One kernel for all of it; None where there is none. norm: (weight, eps, residual) or None."""
    from tsld_fx.codegen.fused_linear import MOST_TOKENS, Norm, fused_linear

    packed, scales, zeros, bias, *numbers = weight
    if x.dtype not in cuda_linear.KERNEL_DTYPES or x.numel() > MOST_TOKENS * x.shape[-1]:
        return None
    gemm = cuda_linear.find(packed, scales, zeros, *numbers)
    if gemm is None:
        return None
    bias = None if bias is None else bias.to(x.dtype)
    return fused_linear(gemm, x, bias, None if norm is None else Norm(*norm), gated)


def _gated_linear_cuda(x: Tensor, *linear: Any) -> Tensor:
    found = _fused(x, None, linear, True)
    return gated_linear(x, *linear) if found is None else found[0]


def _norm_linear_cuda(x: Tensor, norm_weight: Tensor, eps: float, *linear: Any) -> Tensor:
    found = _fused(x, (norm_weight, eps, None), linear[:-1], linear[-1])
    return norm_linear(x, norm_weight, eps, *linear) if found is None else found[0]


def _add_norm_linear_cuda(
    x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, *linear: Any
) -> tuple[Tensor, Tensor]:
    found = _fused(x, (norm_weight, eps, residual), linear[:-1], linear[-1])
    if found is None or found[1] is None:
        return add_norm_linear(x, residual, norm_weight, eps, *linear)
    return found[0], found[1]


# ---------------------------------------------------------------- registration
for _name, _plain, _cuda in (
    ("gated_linear", gated_linear, _gated_linear_cuda),
    ("norm_linear", norm_linear, _norm_linear_cuda),
    ("add_norm_linear", add_norm_linear, _add_norm_linear_cuda),
):
    torch.library.impl(f"tsld::{_name}", "default", _plain)
    torch.library.impl(f"tsld::{_name}", "cuda", _cuda)


def _result(x: Tensor, packed: Tensor, gated: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0] // (2 if gated else 1)))


@torch.library.register_fake("tsld::gated_linear")
def _(x: Tensor, packed: Tensor, *rest: Any) -> Tensor:
    return _result(x, packed, True)


@torch.library.register_fake("tsld::norm_linear")
def _(x: Tensor, norm_weight: Tensor, eps: float, packed: Tensor, *rest: Any) -> Tensor:
    return _result(x, packed, rest[-1])


@torch.library.register_fake("tsld::add_norm_linear")
def _(
    x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, packed: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return _result(x, packed, rest[-1]), torch.empty_like(residual)
