"""The few calls of the CUDA driver that loading and launching need, through ctypes.

The driver's own library (libcuda) is on every machine that has a GPU, so that a prebuilt kernel needs neither nvcc
nor a host compiler nor torch's headers. Kernels are context-independent (cuLibrary*, CUDA 12): one load serves all
devices. Reference: docs.nvidia.com/cuda/cuda-driver-api.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from tsld_fx.errors import BackendError

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_PROGRAMMATIC_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_JIT_ERROR_BUFFER, _JIT_ERROR_BYTES = 5, 6  # CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES
_ERROR_OUT_OF_MEMORY = 2


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class _LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    ]


class TensorMap(ctypes.Structure):
    """CUtensorMap: what the tensor copy engine needs to know of a matrix. Opaque; aligned to 64 bytes."""

    _fields_ = [("opaque", ctypes.c_uint64 * 16)]


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise BackendError(
            "backend='cuda' needs an NVIDIA driver on this machine (libcuda not found). "
            "Use backend='reference', or build on this machine and run where there is a GPU."
        ) from error
    if not hasattr(library, "cuLibraryLoadData"):
        raise BackendError("The NVIDIA driver is too old: these kernels need a driver of CUDA 12 or later.")
    library.cuInit(0)
    return library


def _check(status: int, what: str, remedy: str = "") -> None:
    if status == 0:
        return
    text = ctypes.c_char_p()
    _driver().cuGetErrorString(status, ctypes.byref(text))
    message = text.value.decode() if text.value else "unknown error"
    raise BackendError(f"{what} failed: {message} (CUDA driver error {status}).{' ' + remedy if remedy else ''}")


def driver_version() -> int:
    """CUDA version that the driver supports, e.g. 13000."""
    version = ctypes.c_int()
    _check(_driver().cuDriverGetVersion(ctypes.byref(version)), "Reading the driver's version")
    return version.value


@dataclass(frozen=True)
class LoadedKernel:
    """A kernel ready to launch on any device that its binary serves."""

    name: str
    handle: int
    threads: int

    def allow_shared(self, shared_bytes: int, device: int) -> None:
        """Allow the kernel so much dynamic shared memory on `device`; once per device, before the first launch."""
        _check(
            _driver().cuKernelSetAttribute(
                _MAX_DYNAMIC_SHARED, shared_bytes, ctypes.c_void_p(self.handle), ctypes.c_int(device)
            ),
            f"Setting {shared_bytes} bytes of shared memory for {self.name}",
            "The kernel was built for a GPU with more shared memory per block: build it for this one.",
        )

    def launch(
        self,
        grid: tuple[int, int, int],
        shared_bytes: int,
        arguments: Sequence[ctypes.Structure],
        stream: int,
        *,
        overlap: bool = False,
        cluster: tuple[int, int, int] | None = None,
    ) -> None:
        """Enqueue on `stream` of the current device. `arguments`: the kernel's parameters in order.

        overlap: programmatic dependent launch (Hopper and later): the kernel may start its prologue before earlier
        kernels of the stream have ended; it waits for them itself before it reads their results.
        cluster: blocks that share their shared memory (Hopper and later); divides the grid.
        """
        config = _LaunchConfig()
        config.grid[:] = grid
        config.block[:] = (self.threads, 1, 1)
        config.shared, config.stream = shared_bytes, stream
        attributes = (_Attribute * 2)()
        config.attributes = ctypes.cast(attributes, ctypes.POINTER(_Attribute))
        wanted = {_PROGRAMMATIC_SERIALIZATION: (1,) if overlap else None, _CLUSTER_DIMENSION: cluster}
        for number, value in wanted.items():
            if value is not None:
                attribute = attributes[config.attribute_count]
                attribute.id, attribute.value[: len(value)] = number, value
                config.attribute_count += 1
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        status = _driver().cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(self.handle), pointers, None)
        if status:
            _check(
                status,
                f"Launching {self.name} with grid {grid}, {self.threads} threads, {shared_bytes} B",
            )


def ensure_context(device: int) -> None:
    """Make the device's primary context (torch's) current if this thread has none yet."""
    current = ctypes.c_void_p()
    _check(_driver().cuCtxGetCurrent(ctypes.byref(current)), "Reading the current context")
    if not current.value:
        _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(current), device), f"Opening CUDA device {device}")
        _check(_driver().cuCtxSetCurrent(current), f"Opening CUDA device {device}")


_TENSOR_MAP_TYPES = {torch.uint8: 0, torch.float16: 6, torch.bfloat16: 9}  # CU_TENSOR_MAP_DATA_TYPE_*


def tensor_map(address: int, dtype: torch.dtype, rows: int, columns: int, row_stride: int, box_rows: int) -> TensorMap:
    """Map of a row-major matrix at `address` for boxes of box_rows x 128 bytes, 128-byte swizzle.

    dtype: float16, bfloat16 or uint8. row_stride in elements, a multiple of 16 bytes. Elements outside of
    [rows, columns] read as zero.
    """
    buffer = (ctypes.c_char * 192)()  # ctypes aligns to 16 at most before Python 3.13
    offset = -ctypes.addressof(buffer) % 64
    found = TensorMap.from_buffer(buffer, offset)
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.byref(found),
        ctypes.c_int(_TENSOR_MAP_TYPES[dtype]),
        ctypes.c_uint32(2),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)(row_stride * dtype.itemsize),
        (ctypes.c_uint32 * 2)(128 // dtype.itemsize, box_rows),
        (ctypes.c_uint32 * 2)(1, 1),
        ctypes.c_int(0),  # not interleaved
        ctypes.c_int(3),  # 128-byte swizzle
        ctypes.c_int(3),  # 256-byte L2 promotion
        ctypes.c_int(0),  # zeros outside
    )
    _check(status, f"Describing a [{rows}, {columns}] matrix with row stride {row_stride} to the copy engine")
    return found


def load_kernel(binary: bytes, name: str, threads: int) -> LoadedKernel:
    """Load a cubin or PTX image and find the kernel `name` in it. The image stays loaded for good."""
    log = ctypes.create_string_buffer(8192)
    keys = (ctypes.c_int * 2)(_JIT_ERROR_BUFFER, _JIT_ERROR_BYTES)
    values = (ctypes.c_void_p * 2)(ctypes.addressof(log), len(log))
    library, kernel = ctypes.c_void_p(), ctypes.c_void_p()
    status = _driver().cuLibraryLoadData(ctypes.byref(library), binary + b"\0", keys, values, 2, None, None, 0)
    detail = log.value.decode(errors="replace").strip()
    _check(
        status,
        f"Loading the kernel {name}",
        f"{detail} " * bool(detail)
        + ("Free GPU memory." if status == _ERROR_OUT_OF_MEMORY else "Build it for this GPU, or update the driver."),
    )
    _check(
        _driver().cuLibraryGetKernel(ctypes.byref(kernel), library, name.encode()),
        f"Finding the kernel {name}",
    )
    return LoadedKernel(name, kernel.value or 0, threads)
