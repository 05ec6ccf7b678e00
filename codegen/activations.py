"""What a product takes: 16-bit activations, or ones that are rounded to 8 bits already."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from tsld_fx.codegen.layout import KernelWeights
from tsld_fx.codegen.spec import CHUNK, Activation, Quantised
from tsld_fx.errors import BackendError

ACTIVATIONS: dict[torch.dtype, Activation] = {torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True, eq=False)
class QuantisedActivations:
    """Activations rounded to 8 bits, one scale per token: made once by `LowBitGemm.quantise`, for any layer that takes
    as many inputs on the same device.

    values: uint8 [..., in_features padded to 128], contiguous: the bits of int8 or fp8 (e4m3) values, zeros past the
        last input. Within 32 inputs the order is that of `cuda_templates/tsld/narrow.cuh`.
    scales: float32 [...]; activations are values * scales.
    kind: 8-bit type of the values.
    dtype: of the activations before rounding, and of the products: float16 or bfloat16.
    in_features: inputs without padding.
    """

    values: Tensor
    scales: Tensor
    kind: Quantised
    dtype: torch.dtype
    in_features: int

    def __post_init__(self) -> None:
        values, scales = self.values, self.scales
        if self.kind not in get_args(Quantised) or self.dtype not in ACTIVATIONS:
            raise BackendError(
                f"QuantisedActivations: no kernel takes {self.dtype} rounded to {self.kind!r}. "
                "Make it with LowBitGemm.quantise from float16 or bfloat16, as 'int8' or 'fp8'."
            )
        shape = (*scales.shape, padded(self.in_features))
        fine = values.dtype == torch.uint8 and scales.dtype == torch.float32 and values.shape == shape
        fine = fine and values.device == scales.device and values.is_contiguous() and scales.is_contiguous()
        if not fine or values.data_ptr() % 16:
            raise BackendError(
                f"QuantisedActivations: values must be contiguous uint8 {list(shape)}, 16-byte aligned, and scales "
                f"contiguous float32 beside them; got {values.dtype} {list(values.shape)} on {values.device} and "
                f"{scales.dtype} {list(scales.shape)} on {scales.device}. Make it with LowBitGemm.quantise."
            )

    @property
    def shape(self) -> torch.Size:
        """Of the activations before rounding: [..., in_features]."""
        return torch.Size((*self.scales.shape, self.in_features))

    @property
    def device(self) -> torch.device:
        return self.values.device


def padded(in_features: int) -> int:
    """Inputs in whole chunks."""
    return -(-in_features // CHUNK) * CHUNK


def check_inputs(
    x: Tensor | QuantisedActivations,
    bias: Tensor | None,
    quantise: Quantised | None,
    weights: KernelWeights,
    device: torch.device,
) -> Activation:
    """Type of the activations of a call. Raises BackendError where x or bias do not fit the layer.

    quantise: what x shall be rounded to.
    """
    rounded = isinstance(x, QuantisedActivations)
    if rounded and quantise is not None:
        raise BackendError(
            f"x is rounded to {x.kind} already. Give it to the layer as it is, without quantise={quantise!r}, or start "
            "from x before rounding."
        )
    if x.device != device:
        mend = "before it is rounded, with" if rounded else "with"
        raise BackendError(f"x is on {x.device}, the weights are on {device}. Move x {mend} x.to('{device}').")
    if x.dtype not in ACTIVATIONS:
        raise BackendError(f"No CUDA kernel takes {x.dtype} activations. Cast x to torch.float16 or torch.bfloat16.")
    if len(x.shape) < 1 or x.shape[-1] != weights.in_features:
        raise BackendError(
            f"x has shape {list(x.shape)}; its last dimension must be in_features={weights.in_features}."
        )
    if (m := math.prod(x.shape[:-1])) >= 2**31:
        raise BackendError(f"x has {m} rows; one call takes fewer than 2^31. Split the batch.")
    if bias is not None and (bias.shape != (weights.out_features,) or bias.dtype != x.dtype or bias.device != device):
        raise BackendError(
            f"bias must be {x.dtype} [{weights.out_features}] on {device}; got {bias.dtype} "
            f"{list(bias.shape)} on {bias.device}. Cast or move it."
        )
    return ACTIVATIONS[x.dtype]


def aligned_rows(x: Tensor) -> Tensor:
    """[m, k] with unit inner stride and 16-byte aligned rows: x itself if it is so, else a copy."""
    m, k = x.shape
    inner = x.stride(1) == 1 or k == 1
    row = x.stride(0) if m > 1 else 8
    if inner and row % 8 == 0 and row >= 0 and x.data_ptr() % 16 == 0:
        return x
    padding = torch.empty(m, -(-k // 8) * 8, dtype=x.dtype, device=x.device)
    return padding[:, :k].copy_(x)
