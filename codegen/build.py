"""From a specification and a configuration to a GEMM kernel: its binary, and the kernel on a device."""

from __future__ import annotations

from functools import lru_cache

from tsld_fx.codegen.cache import KernelCache
from tsld_fx.codegen.compiler import KernelBuildError, find_compiler
from tsld_fx.codegen.config import GemmConfig, shared_limit
from tsld_fx.codegen.driver import LoadedKernel, ensure_context, load_kernel
from tsld_fx.codegen.render import kernel_name, render
from tsld_fx.codegen.spec import KernelSpec


def build_kernel(spec: KernelSpec, config: GemmConfig) -> tuple[bytes, str]:
    """-> (cubin or PTX, compiler log), from the cache or built now. Needs no GPU."""
    source = render(spec, [config])
    try:
        return KernelCache.default().get_or_build(source, spec.target, find_compiler())
    except KernelBuildError as error:
        raise KernelBuildError(
            f"Building the CUDA kernel for {spec} with {config} failed.\n{error}\n"
            "If the compiler is older than CUDA 12 or does not know this GPU, install a newer toolkit (CUDA_HOME, "
            "TSLD_NVCC); otherwise report this message, and use backend='reference' meanwhile."
        ) from error


@lru_cache(maxsize=512)
def loaded_kernel(spec: KernelSpec, config: GemmConfig, device: int) -> LoadedKernel:
    """The kernel on a GPU, ready for launches of any shape."""
    ensure_context(device)
    binary, _ = build_kernel(spec, config)
    kernel = load_kernel(binary, kernel_name(spec, config), config.threads)
    kernel.allow_shared(shared_limit(spec.capability) if config.walks else config.shared_bytes(spec), device)
    return kernel
