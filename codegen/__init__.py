"""From a kernel specification to a running CUDA kernel: spec -> configuration -> source -> binary -> launch.

spec.py           what a kernel computes
config.py         tile shapes; select_config.py chooses them by shape and architecture
render.py         source text (pure)
compiler.py       nvcc or NVRTC; cache.py keeps the binaries
driver.py         load and launch through the CUDA driver
layout.py         canonical packed weights -> kernel layout
workspace.py      memory for split-K
activations.py    what a call takes, QuantisedActivations among it; quantise.py rounds
cuda_gemm.py      LowBitGemm, the call

Importing builds nothing and touches no GPU; torch is imported with `LowBitGemm` or `QuantisedActivations`.
"""

from typing import TYPE_CHECKING

from tsld_fx.codegen.spec import KernelSpec

if TYPE_CHECKING:
    from tsld_fx.codegen.activations import QuantisedActivations
    from tsld_fx.codegen.cuda_gemm import LowBitGemm

__all__ = ["KernelSpec", "LowBitGemm", "QuantisedActivations"]


def __getattr__(name: str) -> object:
    """`LowBitGemm` and `QuantisedActivations`, on their first use."""
    if name == "LowBitGemm":
        from tsld_fx.codegen.cuda_gemm import LowBitGemm

        return LowBitGemm
    if name == "QuantisedActivations":
        from tsld_fx.codegen.activations import QuantisedActivations

        return QuantisedActivations
    raise AttributeError(f"module 'tsld_fx.codegen' has no attribute {name!r}")
