"""CUDA C++ templates of the low-bit GEMM kernels: ordinary headers in `tsld/`, instantiated by `gemm.cu.j2`."""

from __future__ import annotations

from pathlib import Path

TEMPLATE_DIR = Path(__file__).resolve().parent
