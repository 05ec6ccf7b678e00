"""Low-bit kernels for CPUs: C++ sources in kernels/, built by the system's compiler, called through ctypes."""

from pathlib import Path

KERNEL_DIR = Path(__file__).resolve().parent / "kernels"
