"""The packed weights that have a CUDA kernel layout; `kernel_registry` says how they are found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tsld_fx.errors import BackendError
from tsld_fx.kernel_registry import KernelRegistry

if TYPE_CHECKING:
    from tsld_fx.codegen import LowBitGemm

KERNEL_DTYPES = (torch.float16, torch.bfloat16)


def _pack(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    activations: str = "a16",
) -> LowBitGemm:
    from tsld_fx.codegen import LowBitGemm

    gemm = LowBitGemm.pack(packed, scales, zeros, bits, group_size, in_features, packed.device)
    gemm.round_activations(activations)
    return gemm


def _refuse_in_capture() -> None:
    if torch.cuda.is_current_stream_capturing():
        raise BackendError(
            "tsld::lowbit_linear: the packed weight was changed in place, and its kernel layout cannot be made "
            "again while a CUDA graph is captured. Run the layer once before the capture."
        )


def _pack_now(*weight: Any) -> LowBitGemm:
    return _pack(*weight)


_registry = KernelRegistry(_pack_now, _refuse_in_capture)
_entries, _owners = _registry.entries, _registry.owners
register, find = _registry.register, _registry.find
