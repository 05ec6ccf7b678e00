"""Round activations to 8 bits on the GPU, one scale per token, in the order of inputs that the kernels expect."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from tsld_fx.codegen.cache import KernelCache
from tsld_fx.codegen.compiler import find_compiler
from tsld_fx.codegen.driver import LoadedKernel, ensure_context, load_kernel
from tsld_fx.codegen.render import QUANTISE_THREADS, quantise_name, quantise_vecs, render_quantise
from tsld_fx.codegen.spec import CHUNK, KernelSpec


class QuantiseParams(ctypes.Structure):
    """Arguments of the kernel; mirrors `cuda_templates/tsld/narrow.cuh`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "q", "scale")),
        *((name, ctypes.c_int64) for name in ("ldx", "ldq")),
        *((name, ctypes.c_int) for name in ("m", "k")),
    ]


@lru_cache(maxsize=32)
def _kernel(spec: KernelSpec, vecs: int, device: int) -> LoadedKernel:
    ensure_context(device)
    binary, _ = KernelCache.default().get_or_build(render_quantise(spec, vecs), spec.target, find_compiler())
    return load_kernel(binary, quantise_name(spec, vecs), QUANTISE_THREADS)


def quantise_tokens(rows: Tensor, spec: KernelSpec, chunks: int) -> tuple[Tensor, Tensor]:
    """fp16 or bf16 [m, k], 16-byte aligned rows -> (8-bit values as uint8 [m, 128 * chunks], scales float32 [m]).

    int8: scale = max|x| / 127; fp8 (e4m3): max|x| / 448. Ties round to even. Within 32 inputs the order is that of
    narrow.cuh, past the last there are zeros. A token that holds an Inf or a NaN gets a NaN scale. On the current
    stream of the rows' device.
    """
    m, k = rows.shape
    values = torch.empty(m, chunks * CHUNK, dtype=torch.uint8, device=rows.device)
    scales = torch.empty(m, dtype=torch.float32, device=rows.device)
    kernel = _kernel(spec, quantise_vecs(chunks), rows.device.index)
    ldx = rows.stride(0) if m > 1 else -(-k // 8) * 8
    params = QuantiseParams(rows.data_ptr(), values.data_ptr(), scales.data_ptr(), ldx, values.shape[1], m, k)
    stream = torch.cuda.current_stream(rows.device).cuda_stream
    kernel.launch((m, 1, 1), 0, [params], stream, overlap=spec.capability >= 90)
    return values, scales
