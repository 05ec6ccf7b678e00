"""Operators of decode graphs. The implementations here are plain torch on any device: the oracle of the kernels.

On CUDA devices fp16 and bf16 tensors run the kernels of `codegen/decode_kernels.py` where there is one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

torch.library.define("tsld::rms_norm", "(Tensor x, Tensor weight, float eps) -> Tensor")
torch.library.define("tsld::add_rms_norm", "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)")
torch.library.define("tsld::silu_mul", "(Tensor gate, Tensor up) -> Tensor")
torch.library.define(
    "tsld::cached_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor positions, Tensor(a!) key_cache, "
    "Tensor(b!) value_cache, Tensor(c!) scratch, float scale, bool fresh) -> Tensor",
)


# ---------------------------------------------------------------- tsld::rms_norm, tsld::add_rms_norm
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps), normalised in float32 and rounded to x's dtype before the weight."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rms_norm_cuda(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from tsld_fx.codegen import decode_kernels as kernels

    return kernels.rms_norm(x, None, weight, eps)[0] if kernels.norm_supported(x, weight) else rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> (rms_norm(x + residual), x + residual)."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def _add_rms_norm_cuda(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from tsld_fx.codegen import decode_kernels as kernels

    if not kernels.norm_supported(x, weight) or x.shape != residual.shape or x.dtype != residual.dtype:
        return add_rms_norm(x, residual, weight, eps)
    y, total = kernels.rms_norm(x, residual, weight, eps)
    assert total is not None
    return y, total


# ---------------------------------------------------------------- tsld::silu_mul
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return functional.silu(gate) * up


def _silu_mul_cuda(gate: Tensor, up: Tensor) -> Tensor:
    from tsld_fx.codegen import decode_kernels as kernels

    return kernels.silu_mul(gate, up) if kernels.gate_supported(gate, up) else silu_mul(gate, up)


# ---------------------------------------------------------------- tsld::cached_attention
def rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Rotary embedding of x [B, T, heads, D] by cos, sin [B, T, D]: halves of D are pairs (GPT-NeoX's order)."""
    if cos is None or sin is None:
        return x
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(2) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(2)


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, positions: Tensor,
    key_cache: Tensor, value_cache: Tensor, scratch: Tensor, scale: float, fresh: bool,
) -> Tensor:  # fmt: skip
    """Causal attention of new tokens over a static cache, which they are written to first.

    Args:
        q: [B, T, heads, D]; k, v: [B, T, kv_heads, D], before the rotary embedding.
        cos, sin: [B, T, D]; or of every position, [L, D]; or None for no rotary embedding.
        positions: int64 [B, T]: where each token goes; it attends to everything at and before its position.
        key_cache, value_cache: [>= B, kv_heads, L, D], written at the positions.
        scratch: float32, for the kernels; unused here.
        fresh: the tokens are the first of their sequences, at positions 0 .. T - 1.

    Returns:
        [B, T, heads, D].
    """
    if cos is not None and sin is not None and cos.dim() == 2:
        cos, sin = cos[positions], sin[positions]
    q, k = rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2)
    v = v.transpose(1, 2)
    batch, tokens = positions.shape
    grouped = q.shape[1] != k.shape[1]
    if fresh:
        key_cache[:batch, :, :tokens] = k
        value_cache[:batch, :, :tokens] = v
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2)
    where = (torch.arange(batch, device=q.device)[:, None], slice(None), positions)
    key_cache[where] = k.transpose(1, 2)
    value_cache[where] = v.transpose(1, 2)
    seen = torch.arange(key_cache.shape[2], device=q.device) <= positions[:, None, :, None]
    out = functional.scaled_dot_product_attention(
        q, key_cache[:batch], value_cache[:batch], seen, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)


def _cached_attention_cuda(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, positions: Tensor,
    key_cache: Tensor, value_cache: Tensor, scratch: Tensor, scale: float, fresh: bool,
) -> Tensor:  # fmt: skip
    from tsld_fx.codegen import decode_kernels as kernels

    if not fresh and key_cache.dtype == q.dtype and kernels.attention_supported(q, k, v, cos, sin):
        return kernels.attention(q, k, v, cos, sin, positions, key_cache, value_cache, scratch, scale)
    return cached_attention(q, k, v, cos, sin, positions, key_cache, value_cache, scratch, scale, fresh)


# ---------------------------------------------------------------- registration
for _name, _plain, _cuda in (
    ("rms_norm", rms_norm, _rms_norm_cuda),
    ("add_rms_norm", add_rms_norm, _add_rms_norm_cuda),
    ("silu_mul", silu_mul, _silu_mul_cuda),
    ("cached_attention", cached_attention, _cached_attention_cuda),
):
    torch.library.impl(f"tsld::{_name}", "default", _plain)
    torch.library.impl(f"tsld::{_name}", "cuda", _cuda)


@torch.library.register_fake("tsld::rms_norm")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.register_fake("tsld::add_rms_norm")
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.register_fake("tsld::silu_mul")
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@torch.library.register_fake("tsld::cached_attention")
def _(q: Tensor, *rest: Any) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)
