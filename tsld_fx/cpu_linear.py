"""The packed weights that have a CPU kernel layout; `kernel_registry` says how they are found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tsld_fx.kernel_registry import KernelRegistry

if TYPE_CHECKING:
    from tsld_fx.codegen.cpu.gemm import CpuGemm
    from tsld_fx.relax.layer_gemm import TvmGemm

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _pack(*weight_and_activations: Any) -> CpuGemm | TvmGemm:
    if weight_and_activations[-1] == "tvm":
        from tsld_fx.relax.layer_gemm import TvmGemm

        return TvmGemm.pack(*weight_and_activations[:-1])
    from tsld_fx.codegen.cpu.gemm import CpuGemm

    return CpuGemm.pack(*weight_and_activations)


_registry = KernelRegistry(_pack)
register, find = _registry.register, _registry.find


def is_plain_call(x: Tensor) -> bool:
    """Whether nothing but the result of tsld::lowbit_linear on `x` is asked for: no gradient, tracing or torch mode."""
    return (
        type(x) is Tensor
        and x.dtype in KERNEL_DTYPES
        and x.device.type == "cpu"
        and not (x.requires_grad and torch.is_grad_enabled())
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and torch._C._get_tracing_state() is None
    )
