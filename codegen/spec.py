"""What a kernel computes: `KernelSpec`. How it does so is a `GemmConfig` (config.py)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from tsld_fx.errors import BackendError

Activation = Literal["fp16", "bf16"]
Quantised = Literal["int8", "fp8"]

CHUNK = 128  # inputs per chunk of the kernel layout
TILE_ROWS = 16  # output rows per tile of the kernel layout
SUPPORTED_BITS = (2, 4, 8)
SUPPORTED_GROUPS = (0, 32, 64, 128)
_TARGET = re.compile(r"^(sm|compute)_(\d+)(a?)$")


@dataclass(frozen=True)
class KernelSpec:
    """One family member of y = x @ dequantised(weights).T (+ bias), accumulated in float32.

    activation: type of x, bias and y.
    bits: 2 (ternary), 4 or 8 (unsigned codes with zero points).
    group: inputs per scale: 0 (one scale per output row, which serves a per-tensor scale too), 32, 64 or 128.
    target: "sm_XX" (machine code), "sm_90a" (Hopper's own instructions) or "compute_XX" (PTX, compiled by the driver).
    quantised: 8-bit type that x is rounded to before the product, with one scale per token; None keeps x as it is.
    norm: x is normalised first (RMSNorm), after a residual was added to it where one is given; stream kernels only.
    gated: rows are tiles of 8 features of a gate and the same 8 of `up`; y = silu(gate) * up. Stream kernels only.
    """

    activation: Activation
    bits: int
    group: int = 0
    target: str = "sm_80"
    quantised: Quantised | None = None
    norm: bool = False
    gated: bool = False

    def __post_init__(self) -> None:
        if self.activation not in get_args(Activation):
            raise BackendError(
                f"KernelSpec: no CUDA kernel takes {self.activation!r} activations. "
                "Cast them to torch.float16 or torch.bfloat16."
            )
        if self.bits not in SUPPORTED_BITS:
            raise BackendError(
                f"KernelSpec: no CUDA kernel for {self.bits}-bit weights. Use bits 2 (ternary), 4 or 8, "
                "or backend='reference'."
            )
        if self.group not in SUPPORTED_GROUPS:
            raise BackendError(
                f"KernelSpec: no CUDA kernel for scales per group of {self.group}. "
                "Use group_size 32, 64, 128 or a multiple of 128, or one scale per channel."
            )
        if self.quantised is not None and self.quantised not in get_args(Quantised):
            raise BackendError(
                f"KernelSpec: no CUDA kernel rounds activations to {self.quantised!r}. "
                "Use 'int8' or 'fp8', or keep them as they are (None)."
            )
        if self.quantised is not None and (self.bits != 2 or self.group):
            raise BackendError(
                f"KernelSpec: activations are rounded to {self.quantised} only for ternary weights with one scale per "
                f"channel or tensor, not for {self.bits} bits in groups of {self.group}. Keep the activations as they "
                "are (activations='a16')."
            )
        if not _TARGET.match(self.target) or self.capability < 80:
            raise BackendError(
                f"KernelSpec: {self.target!r} is no target of these kernels. "
                "Use sm_80 or later (sm_90a for Hopper), or compute_80 for PTX."
            )
        if self.quantised is not None and not self.hopper:
            raise BackendError(
                f"KernelSpec: {self.quantised} activations have kernels for Hopper (compute capability 9.0) only, not "
                f"for {self.target}. Keep the activations as they are (activations='a16')."
            )

    @property
    def capability(self) -> int:
        """80 for sm_80 and compute_80, 90 for sm_90a."""
        match = _TARGET.match(self.target)
        return int(match.group(2)) if match else 0

    @property
    def hopper(self) -> bool:
        """Whether Hopper's own instructions (wgmma, tensor copies) may be used."""
        return self.target == "sm_90a"

    @property
    def name(self) -> str:
        granularity = f"g{self.group}" if self.group else "row"
        quantised = f"_{self.quantised}" if self.quantised else ""
        fused = "_norm" * self.norm + "_gated" * self.gated
        return f"w{self.bits}{quantised}_{self.activation}_{granularity}{fused}"

    @property
    def x_bytes(self) -> int:
        """Bytes per input of what the tensor cores multiply the weights with."""
        return 1 if self.quantised else 2
