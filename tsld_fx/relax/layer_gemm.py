"""backend='tvm': one packed layer's matrix product as a PrimFunc that TVM compiled, called through tvm-ffi."""

from __future__ import annotations

import ctypes
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsld_fx.codegen.cache import KernelCache
from tsld_fx.errors import BackendError
from tsld_fx.relax.cpu_target import CpuTarget, cpu_target
from tsld_fx.relax.kernels import MatmulSpec, matmul_function, render
from tsld_fx.relax.program_cache import TvmCompiler
from tsld_fx.relax.run import installed_library, leave_threads_alone
from tsld_fx.relax.tvm_import import check_tvm

_ALIGNMENT = 64  # bytes; compiled code loads whole vectors
_threads = [0]


@cache
def product(spec: MatmulSpec, where: CpuTarget) -> Any:
    """The compiled function of a product: (x, weight, [scales], [zeros], [bias], y) on DLPack tensors.

    Raises:
        BackendError: TVM is absent or of another version, or nothing can link what it compiles.
    """
    check_tvm("backend='tvm'")
    source, target = render(spec), f"llvm {where.mcpu} {where.machine}"
    code = KernelCache.default().get_or_build(source, target, TvmCompiler(lambda: _module(spec), where))[0]
    import tvm_ffi

    runtime = installed_library("libtvm_runtime.so")
    if runtime is None:
        raise BackendError("backend='tvm': libtvm_runtime.so is missing. `pip install 'tsld-fx[tvm]'`.")
    leave_threads_alone()
    ctypes.CDLL(str(runtime), ctypes.RTLD_GLOBAL)
    with tempfile.TemporaryDirectory(prefix="tsld-tvm-") as folder:  # a loaded library needs its file no more
        path = Path(folder, "product.so")
        path.write_bytes(code)
        return tvm_ffi.load_module(str(path), keep_module_alive=True)["product"]


def _module(spec: MatmulSpec) -> Any:
    import tvm

    return tvm.IRModule({"product": matmul_function(spec).with_attr("global_symbol", "product")})


@dataclass(frozen=True)
class TvmGemm:
    """y = x W^T + b of one packed layer on the CPU, in float32; other activation types are cast to it and back."""

    weights: tuple[Tensor, ...]
    spec: MatmulSpec
    where: CpuTarget

    @classmethod
    def pack(
        cls, packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, in_features: int
    ) -> TvmGemm:
        """Take a layer in the canonical packed format, which is also the kernel's.

        Raises:
            BackendError: as `product`.
        """
        where = cpu_target()
        spec = MatmulSpec(
            packed.shape[0], in_features, bits, group_size, zeros is not None, False, None, where.lanes, where.table
        )
        weights = tuple(_aligned(t) for t in (packed, scales, zeros) if t is not None)
        product(spec, where)
        return cls(weights, spec, where)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in_features] -> [..., out_features] in the dtype of x."""
        spec = self.spec
        rows = _aligned(x.reshape(-1, spec.in_features).to(torch.float32))
        y = torch.empty(rows.shape[0], spec.out_features, dtype=torch.float32)
        if len(rows):
            _follow_threads()
            product(spec, self.where)(rows, *self.weights, y)
        if bias is not None:
            y += bias
        return y.to(x.dtype).reshape(*x.shape[:-1], spec.out_features)


def _aligned(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().contiguous()
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def _follow_threads() -> None:
    """TVM's pool has as many threads as torch's."""
    count = torch.get_num_threads()
    if _threads[0] != count:
        import tvm_ffi

        tvm_ffi.get_global_func("runtime.config_threadpool")(1, count)
        _threads[0] = count
