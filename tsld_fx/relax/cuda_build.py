"""A Relax module with our CUDA kernels -> one library with machine code, on a machine that needs no GPU.

TVM writes CUDA source into a library, to be compiled where it is loaded, unless its CUDA runtime is loaded while it
compiles; and that runtime wants the driver's library. Where there is no driver a stand-in takes its place, whose every
function says that there is no device. The result is checked: no source may be in it.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from tsld_fx.codegen.compiler import KernelBuildError, find_compiler
from tsld_fx.errors import BackendError
from tsld_fx.relax.cuda_kernels import CudaMatmuls, build_object

_STUB = """
#define S(n) int n() { return 100; }
S(cuInit) S(cuCtxGetCurrent) S(cuCtxSetCurrent) S(cuDeviceGet) S(cuDeviceGetName) S(cuDevicePrimaryCtxRetain)
S(cuFuncSetAttribute) S(cuLaunchKernel) S(cuLaunchKernelEx) S(cuLibraryGetKernel) S(cuLibraryLoadData)
S(cuLibraryUnload) S(cuModuleGetFunction) S(cuModuleLoadData) S(cuModuleUnload) S(cuTensorMapEncodeTiled)
int cuGetErrorName(int e, const char** p) { *p = "CUDA_ERROR_NO_DEVICE"; return 0; }
int cuGetErrorString(int e, const char** p) { *p = "no CUDA driver on this machine"; return 0; }
"""
_stubs: list[Any] = []  # the folder of the stand-in lives as long as the process


def gencode(arch: tuple[str, ...]) -> list[str]:
    """nvcc flags for machine code of each architecture and PTX of the lowest."""
    numbers = sorted(int(name.removeprefix("sm_").rstrip("a")) for name in arch)
    flags = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
    return [*flags, f"-gencode=arch=compute_{numbers[0]},code=compute_{numbers[0]}"]


@cache
def load_cuda_runtime() -> None:
    """Load TVM's CUDA runtime, over a stand-in for the driver where there is none.

    Raises:
        BackendError: no nvcc, no CUDA runtime library beside it, or TVM's library does not load.
    """
    import tvm

    toolkit = nvcc_path().parent.parent
    if tvm.get_global_func("ffi.Module.create.cuda", True) is not None:
        return
    try:
        ctypes.CDLL("libcuda.so.1", ctypes.RTLD_GLOBAL)
    except OSError:
        ctypes.CDLL(str(_stand_in()), ctypes.RTLD_GLOBAL)
    try:
        runtime = next(iter(sorted((toolkit / "lib64").glob("libcudart.so.13*"))), Path("libcudart.so.13"))
        ctypes.CDLL(str(runtime), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise BackendError(
            f"compile: TVM's CUDA runtime does not load ({error}). It needs CUDA 13: install that toolkit, or "
            "point CUDA_HOME at it."
        ) from error


def nvcc_path() -> Path:
    """nvcc, which TVM's kernels are compiled with.

    Raises:
        BackendError: there is none.
    """
    try:
        return Path(find_compiler("nvcc").path).resolve()  # type: ignore[attr-defined]
    except KernelBuildError as error:
        raise BackendError(f"compile: target='cuda' needs nvcc. {error}") from error


def _stand_in() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="tsld-stub-")
    _stubs.append(folder)
    library, source = Path(folder.name, "libcuda.so.1"), Path(folder.name, "stub.c")
    source.write_text(_STUB)
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(f"compile: gcc does not build the stand-in for the driver: {done.stderr.strip()[-300:]}.")
    return library


def build_cuda_library(module: Any, matmuls: CudaMatmuls, arch: tuple[str, ...], max_rows: int | None) -> bytes:
    """The shared library with TVM's kernels, ours, and the host code.

    Raises:
        BackendError: TVM or a compiler refuses something, or CUDA source would be embedded.
    """
    import tvm
    import tvm_ffi

    load_cuda_runtime()
    flags, nvcc, sources = gencode(arch), str(nvcc_path()), []

    @tvm_ffi.register_global_func("tvm_callback_cuda_compile", override=True)
    def compile_fatbin(code: str) -> bytes:
        sources.append(code)
        with tempfile.TemporaryDirectory(prefix="tsld-tvm-") as name:
            source, out = Path(name, "kernels.cu"), Path(name, "kernels.fatbin")
            source.write_text(code)
            command = [nvcc, "-O3", "-std=c++17", "--fatbin", *flags, "-o", str(out), str(source)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
            return out.read_bytes()

    with tempfile.TemporaryDirectory(prefix="tsld-tvm-") as name:
        kernels, library = Path(name, "tsld_kernels.o"), Path(name, "model.so")
        functions = build_object(matmuls.kernels, matmuls.targets, kernels, max_rows)
        module = module.with_attr("external_mods", [tvm.runtime.load_static_library(str(kernels), functions)])
        where = cuda_target(arch)
        try:
            with where:
                built = tvm.compile(module, target=where, relax_pipeline=cuda_pipeline(where))
            built.export_library(str(library), options=["-ldl"])
        except Exception as error:
            last = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
            raise BackendError(f"compile: TVM does not compile the module for CUDA: {last.strip()[:400]}.") from error
        code = library.read_bytes()
    check_no_source(code, sources)
    return code


def check_no_source(library: bytes, sources: list[str]) -> None:
    """Refuse a library that holds CUDA source.

    Raises:
        BackendError: it does, or TVM compiled no kernel at all (then its source is in there).
    """
    marks = (b"__global__", b"__launch_bounds__", b"#include <cuda")
    if not sources or any(mark in library for mark in marks):
        raise BackendError(
            "compile: TVM embedded CUDA source instead of machine code. Its CUDA runtime was not loaded in time: "
            "compile in a fresh process, before anything else uses TVM."
        )


def cuda_target(arch: tuple[str, ...]) -> Any:
    """The lowest architecture's limits; kernels of it run on all."""
    import tvm

    lowest = sorted(arch)[0].rstrip("a")
    device = {"kind": "cuda", "arch": lowest, "max_shared_memory_per_block": 49152, "max_threads_per_block": 1024}
    return tvm.target.Target(device, host="llvm")


def cuda_pipeline(target: Any) -> Any:
    """TVM's GPU passes, its schedules without tensor cores (0.27 crashes on them; the large products are ours)."""
    import tvm
    from tvm import relax
    from tvm.relax.backend.cuda import pipeline as stock
    from tvm.s_tir import dlight
    from tvm.tirx import PrimFunc

    @tvm.transform.module_pass(opt_level=0)
    def without_tensor_cores(module: Any, _: Any) -> Any:
        marked = {
            name: function.with_attr("dlight.do_not_tensorize", True) if isinstance(function, PrimFunc) else function
            for name, function in module.functions.items()
        }
        return tvm.IRModule(marked, attrs=module.attrs)

    gpu = dlight.gpu
    return tvm.transform.Sequential(
        [
            *stock.library_dispatch_passes(target),
            relax.transform.LegalizeOps(),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FoldConstant(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            without_tensor_cores,
            dlight.ApplyDefaultSchedule(
                gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Fallback()
            ),
            *stock.dataflow_lower_passes(target),
            *stock.finalize_passes(target),
        ]
    )
