"""The built kernels as a loaded library: built on first use, kept in the kernel cache, called through ctypes."""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from tsld_fx.codegen.cache import CacheError, KernelCache
from tsld_fx.codegen.compiler import KernelBuildError
from tsld_fx.codegen.cpu import KERNEL_DIR
from tsld_fx.codegen.cpu.compiler import REMEDY, CxxCompiler, find_compiler, host_target
from tsld_fx.errors import BackendError

LEVELS = ("portable", "avx2", "avx512", "amx")


class _Pool(ctypes.Structure):
    """`tsld_cpu_pool` of kernels/tsld_cpu.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("parallel", "thread", "threads", "barrier")]


def build() -> Path:
    """The shared library on disk, built if it is not in the cache. Without a compiler, an earlier build serves.

    Raises:
        KernelBuildError: no compiler and no earlier build, or a compiler that fails.
    """
    source, target = (KERNEL_DIR / "tsld_cpu.cpp").read_text(), host_target()
    compiler: CxxCompiler | None = None
    missing: KernelBuildError | None = None
    try:
        compiler = find_compiler()
    except KernelBuildError as error:
        missing = error
    try:
        built = KernelCache.default().file(source, target, compiler, KERNEL_DIR)
    except CacheError:
        raise
    except KernelBuildError as error:
        raise KernelBuildError(f"Building the CPU kernels failed. {error}\n{REMEDY}") from error
    if built is None:
        raise missing or KernelBuildError(f"No C++ compiler found. {REMEDY}")
    return built


@lru_cache(maxsize=1)
def library() -> Any:
    """The loaded library (ctypes), with the types of its functions declared.

    Raises:
        KernelBuildError: it cannot be built or loaded.
    """
    path = build()
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelBuildError(
            f"The CPU kernels were built but do not load ({error}). If the cache folder is mounted noexec, point "
            "TSLD_CACHE_DIR at another folder."
        ) from error
    i32, i64, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    loaded.tsld_cpu_packed_bytes.argtypes = [i32, i64, i64, i64, i32]
    loaded.tsld_cpu_packed_bytes.restype = i64
    loaded.tsld_cpu_pack.argtypes = [i32, i64, i64, i64, pointer, pointer, i32, pointer, pointer]
    loaded.tsld_cpu_pack.restype = None
    loaded.tsld_cpu_large_pages.argtypes = [pointer, i64]
    loaded.tsld_cpu_large_pages.restype = None
    loaded.tsld_cpu_linear.argtypes = [ctypes.c_char_p]
    return loaded


def level() -> int:
    """Index into LEVELS of the kernels to run: the CPU's best, or the one that TSLD_CPU_LEVEL names.

    Raises:
        BackendError: TSLD_CPU_LEVEL names no level, or one that this CPU lacks.
    """
    best = int(library().tsld_cpu_level())
    named = os.environ.get("TSLD_CPU_LEVEL")
    if not named:
        return best
    if named not in LEVELS[: best + 1]:
        raise BackendError(
            f"TSLD_CPU_LEVEL={named!r}: this CPU runs {', '.join(LEVELS[: best + 1])}. Name one of them, or unset it."
        )
    return LEVELS.index(named)


@lru_cache(maxsize=1)
def torch_pool() -> _Pool | None:
    """The OpenMP runtime that torch itself is linked to; None where it has no GNU interface (then one thread runs).

    The symbols are looked up through torch's library, whose dependencies name the runtime: no second pool starts.
    """
    name = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        linked = ctypes.CDLL(str(name), mode=getattr(os, "RTLD_NOLOAD", 4) | getattr(os, "RTLD_LAZY", 1))
        symbols = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier")
        return _Pool(*(ctypes.cast(getattr(linked, symbol), ctypes.c_void_p).value for symbol in symbols))
    except (OSError, AttributeError):
        return None
