"""Round activations to 8 bits on the GPU, one scale per token, in the order of inputs that the kernels expect."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from tsld_fx.codegen.activations import QuantisedActivations, aligned_rows, padded
from tsld_fx.codegen.cache import KernelCache
from tsld_fx.codegen.compiler import find_compiler
from tsld_fx.codegen.devices import device_facts
from tsld_fx.codegen.driver import LoadedKernel, ensure_context, load_kernel
from tsld_fx.codegen.render import QuantiseConfig, quantise_name, render_quantise
from tsld_fx.codegen.spec import CHUNK, KernelSpec
from tsld_fx.errors import BackendError


class QuantiseParams(ctypes.Structure):
    """Arguments of the kernel; mirrors `cuda_templates/tsld/narrow.cuh`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "q", "scale")),
        *((name, ctypes.c_int64) for name in ("ldx", "ldq")),
        *((name, ctypes.c_int) for name in ("m", "k")),
    ]


@lru_cache(maxsize=32)
def _kernel(spec: KernelSpec, config: QuantiseConfig, device: int) -> LoadedKernel:
    ensure_context(device)
    binary, _ = KernelCache.default().get_or_build(render_quantise(spec, config), spec.target, find_compiler())
    return load_kernel(binary, quantise_name(spec, config), config.threads)


def quantise_tokens(x: Tensor, spec: KernelSpec) -> QuantisedActivations:
    """fp16 or bf16 [..., k] -> the same rounded to the type that `spec` says; any strides, any number of tokens.

    int8: scale = max|x| / 127; fp8 (e4m3): max|x| / 448. Ties round to even. A token that holds an Inf or a NaN gets a
    NaN scale. On the current stream of x's device, which has to be the current one.
    """
    if spec.quantised is None:
        raise BackendError("There is nothing to round x to. Say which type of 8 bits: 'int8' or 'fp8'.")
    k, width = x.shape[-1], padded(x.shape[-1])
    values = torch.empty(*x.shape[:-1], width, dtype=torch.uint8, device=x.device)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    result = QuantisedActivations(values, scales, spec.quantised, x.dtype, k)
    m = scales.numel()
    if m == 0:
        return result
    if k == 0:
        scales.zero_()
        return result
    rows = aligned_rows(x.reshape(m, k))
    config = QuantiseConfig.of(width // CHUNK)
    kernel = _kernel(spec, config, x.device.index)
    blocks = min(m, device_facts(x.device.index)[1] * config.blocks)
    ldx = rows.stride(0) if m > 1 else -(-k // 8) * 8
    params = QuantiseParams(rows.data_ptr(), values.data_ptr(), scales.data_ptr(), ldx, width, m, k)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    kernel.launch((blocks, 1, 1), 0, [params], stream, overlap=spec.capability >= 90)
    return result
