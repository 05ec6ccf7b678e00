"""The operators that graphs carry: schema, implementation, fake implementation and gradient of each.

They are registered with torch.library when this module is imported, and work under torch.export, torch.compile,
autocast and autograd. The implementations here are plain torch on any device: the oracle of every backend. For weights
that `cpu_linear` or `cuda_linear` knows, tsld::lowbit_linear runs kernels instead: on the CPU for float32, bfloat16 and
float16 activations, on CUDA devices for float16 and bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tsld_fx import cpu_linear, cuda_linear, dead_zone, packing, quantizers, weight_cache
from tsld_fx.errors import BackendError

torch.library.define(
    "tsld::fake_quant",
    "(Tensor weight, Tensor? scale, Tensor? zero, str scheme, int bits, int group_size) -> Tensor",
)
torch.library.define(  # fake_quant rounded to another dtype, which autocast asks for
    "tsld::fake_quant_as",
    "(Tensor weight, Tensor? scale, Tensor? zero, str scheme, int bits, int group_size, ScalarType dtype) -> Tensor",
)
torch.library.define(
    "tsld::learned_clip",
    "(Tensor weight, Tensor gamma, int bits, bool symmetric, int group_size) -> (Tensor, Tensor)",
)
torch.library.define(
    "tsld::dead_zone_bias",
    "(Tensor weight, Tensor? scale, Tensor? bias, str scheme, int group_size, float factor) -> Tensor",
)
torch.library.define(
    "tsld::dequantize_weight",
    "(Tensor packed, Tensor scales, Tensor? zeros, int bits, int group_size, int in_features) -> Tensor",
)
torch.library.define(
    "tsld::lowbit_linear",
    "(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? bias, int bits, int group_size, "
    "int in_features) -> Tensor",
)


# ---------------------------------------------------------------- tsld::fake_quant
def _fake_quant(
    weight: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    scheme: str,
    bits: int,
    group_size: int,
    dtype: Any = None,
) -> Tensor:
    how = (scheme, bits, group_size, dtype or weight.dtype)
    return weight_cache.quantised(
        (weight, scale, zero), how, lambda: quantizers.fake_quantize(weight, scale, zero, *how)
    )


for _name in ("tsld::fake_quant", "tsld::fake_quant_as"):
    torch.library.impl(_name, "default", _fake_quant)


@torch.library.register_fake("tsld::fake_quant")
def _(weight: Tensor, scale: Any, zero: Any, scheme: str, bits: int, group_size: int) -> Tensor:
    return quantizers.fake_quantize(weight, scale, zero, scheme, bits, group_size)  # strides follow the weight's


@torch.library.register_fake("tsld::fake_quant_as")
def _(weight: Tensor, scale: Any, zero: Any, scheme: str, bits: int, group_size: int, dtype: torch.dtype) -> Tensor:
    return quantizers.fake_quantize(weight, scale, zero, scheme, bits, group_size, dtype)


def _fake_quant_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    weight, scale, zero, ctx.scheme, ctx.bits, ctx.group_size, *rest = inputs
    ctx.extra, ctx.dtype = len(rest), weight.dtype
    ctx.learned = scale is not None and ctx.scheme in quantizers.LEARNED
    if ctx.learned:
        ctx.save_for_backward(weight, scale, zero)


def _fake_quant_backward(ctx: Any, grad: Tensor) -> tuple:
    none = (None,) * (4 + ctx.extra)
    if not ctx.learned:
        return grad.to(ctx.dtype), None, *none
    weight, scale, zero = ctx.saved_tensors
    grads = quantizers.straight_through(grad, weight, scale, zero, ctx.scheme, ctx.bits, ctx.group_size)
    return *grads, *none


for _name in ("tsld::fake_quant", "tsld::fake_quant_as"):
    torch.library.register_autograd(_name, _fake_quant_backward, setup_context=_fake_quant_context)


def _register_autocast(device: str) -> None:
    key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")

    def in_low_precision(weight: Tensor, *args: Any) -> Tensor:
        """Under autocast the linear reads its weight in autocast's dtype: quantise and round in one pass."""
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            if weight.dtype != torch.float32:
                return torch.ops.tsld.fake_quant(weight, *args)
            return torch.ops.tsld.fake_quant_as(weight, *args, torch.get_autocast_dtype(device))

    torch.library.impl("tsld::fake_quant", f"Autocast{device.upper()}", in_low_precision)


for _device in ("cpu", "cuda"):
    _register_autocast(_device)


# ---------------------------------------------------------------- tsld::learned_clip
@torch.library.impl("tsld::learned_clip", "default")
def _learned_clip(weight: Tensor, gamma: Tensor, bits: int, symmetric: bool, group_size: int) -> tuple[Tensor, Tensor]:
    scale, zero, _ = quantizers.clipped_scale(weight, gamma, bits, symmetric, group_size)
    return scale, torch.empty(0, dtype=torch.uint8, device=weight.device) if zero is None else zero


@torch.library.register_fake("tsld::learned_clip")
def _(weight: Tensor, gamma: Tensor, bits: int, symmetric: bool, group_size: int) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    centred = symmetric or bits == 2
    zero = torch.empty((0,) if centred else gamma.shape, dtype=torch.uint8, device=weight.device)
    return torch.empty(gamma.shape, dtype=dtype, device=weight.device), zero


def _learned_clip_context(ctx: Any, inputs: tuple, output: Any) -> None:
    weight, gamma, ctx.bits, ctx.symmetric, ctx.group_size = inputs
    ctx.save_for_backward(weight, gamma)


def _learned_clip_backward(ctx: Any, grad_scale: Tensor, _grad_zero: Any) -> tuple:
    weight, gamma = ctx.saved_tensors
    slope = quantizers.clipped_scale(weight, gamma, ctx.bits, ctx.symmetric, ctx.group_size)[2]
    return None, (grad_scale * slope).to(gamma.dtype), None, None, None


torch.library.register_autograd("tsld::learned_clip", _learned_clip_backward, setup_context=_learned_clip_context)


# ---------------------------------------------------------------- tsld::dead_zone_bias
@torch.library.impl("tsld::dead_zone_bias", "default")
def _dead_zone_bias(
    weight: Tensor, scale: Tensor | None, bias: Tensor | None, scheme: str, group_size: int, factor: float
) -> Tensor:
    return dead_zone.bias_of_dead_weights(weight, scale, bias, scheme, group_size, factor)


@torch.library.register_fake("tsld::dead_zone_bias")
def _(weight: Tensor, scale: Any, bias: Any, scheme: str, group_size: int, factor: float) -> Tensor:
    return weight.new_empty(weight.shape[0])


def _dead_zone_bias_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    weight, scale, bias, ctx.scheme, ctx.group_size, ctx.factor = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(weight, scale)


def _dead_zone_bias_backward(ctx: Any, grad: Tensor) -> tuple:
    weight, scale = ctx.saved_tensors
    dead = dead_zone.is_dead(weight, scale, ctx.scheme, ctx.group_size)
    grad_weight = (dead * (grad * ctx.factor).unsqueeze(1)).to(weight.dtype)
    return grad_weight, None, grad if ctx.has_bias else None, None, None, None


torch.library.register_autograd("tsld::dead_zone_bias", _dead_zone_bias_backward, setup_context=_dead_zone_bias_context)


# ---------------------------------------------------------------- tsld::dequantize_weight
@torch.library.impl("tsld::dequantize_weight", "default")
def _dequantize_weight(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, in_features: int
) -> Tensor:
    return packing.dequantize(packed, scales, zeros, bits, group_size, in_features)


@torch.library.register_fake("tsld::dequantize_weight")
def _(packed: Tensor, scales: Tensor, zeros: Any, bits: int, group_size: int, in_features: int) -> Tensor:
    return torch.empty((packed.shape[0], in_features), dtype=torch.float32, device=packed.device)


# ---------------------------------------------------------------- tsld::lowbit_linear
def _lowbit_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    if x.shape[-1] != in_features:
        raise BackendError(
            f"tsld::lowbit_linear: the input has {x.shape[-1]} features, the packed weight {in_features}. "
            "Give activations of the layer that this weight was packed from."
        )
    if not x.is_floating_point():
        raise BackendError(f"tsld::lowbit_linear: the input is {x.dtype}; give float16, bfloat16, float32 or float64.")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = packing.dequantize(packed, scales, zeros, bits, group_size, in_features).to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        result = functional.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype))
    return result.to(x.dtype)


torch.library.impl("tsld::lowbit_linear", "default", _lowbit_linear)


@torch.library.impl("tsld::lowbit_linear", "cpu")
def _lowbit_linear_cpu(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """Kernels for the activations of registered weights; float64 keeps its accuracy."""
    if x.dtype in cpu_linear.KERNEL_DTYPES:
        kernels = cpu_linear.find(packed, scales, zeros, bits, group_size, in_features)
        if kernels is not None:
            return kernels(x, bias)
    return _lowbit_linear(x, packed, scales, zeros, bias, bits, group_size, in_features)


@torch.library.impl("tsld::lowbit_linear", "cuda")
def _lowbit_linear_cuda(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """Kernels for fp16 and bf16 activations of registered weights; float32 and float64 keep their accuracy."""
    for name, tensor in (("packed weight", packed), ("scales", scales), ("zero points", zeros), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise BackendError(
                f"tsld::lowbit_linear: the input is on {x.device}, the {name} on {tensor.device}. "
                "Move the input or the model with .to(device)."
            )
    if x.dtype in cuda_linear.KERNEL_DTYPES:
        kernels = cuda_linear.find(packed, scales, zeros, bits, group_size, in_features)
        if kernels is not None:
            return kernels(x, None if bias is None else bias.to(x.dtype))
    return _lowbit_linear(x, packed, scales, zeros, bias, bits, group_size, in_features)


@torch.library.register_fake("tsld::lowbit_linear")
def _(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Any,
    bias: Any,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def _lowbit_linear_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, packed, scales, zeros, bias, ctx.bits, ctx.group_size, ctx.in_features = inputs
    ctx.save_for_backward(packed, scales, zeros)
    ctx.has_bias = bias is not None


def _lowbit_linear_backward(ctx: Any, grad: Tensor) -> tuple:
    packed, scales, zeros = ctx.saved_tensors
    weight = torch.ops.tsld.dequantize_weight(packed, scales, zeros, ctx.bits, ctx.group_size, ctx.in_features)
    grad_x = torch.matmul(grad, weight.to(grad.dtype))
    grad_bias = grad.flatten(0, -2).sum(0) if ctx.has_bias and ctx.needs_input_grad[4] else None
    return grad_x, None, None, None, grad_bias, None, None, None


torch.library.register_autograd("tsld::lowbit_linear", _lowbit_linear_backward, setup_context=_lowbit_linear_context)
