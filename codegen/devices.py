"""What the kernels need to know of a GPU."""

from __future__ import annotations

from functools import lru_cache

import torch

from tsld_fx.errors import BackendError


@lru_cache(maxsize=64)
def device_facts(index: int) -> tuple[str, int]:
    """-> (target to build for, number of multiprocessors). Raises for devices that no kernel serves."""
    properties = torch.cuda.get_device_properties(index)
    capability = properties.major * 10 + properties.minor
    if capability < 80:
        raise BackendError(
            f"cuda:{index} ({properties.name}) has compute capability {properties.major}.{properties.minor}; the "
            "low-bit kernels need 8.0 (A100) or later. Use backend='reference' on this GPU."
        )
    return ("sm_90a" if capability == 90 else f"sm_{capability}"), properties.multi_processor_count


def cuda_device(device: torch.device | str | int) -> torch.device:
    """The CUDA device with its index. Raises BackendError where there is none."""
    if not torch.cuda.is_available():
        raise BackendError(
            "backend='cuda' needs an NVIDIA GPU that torch can use; torch.cuda.is_available() is False here. "
            "Install a CUDA build of torch and a driver, or use backend='reference'."
        )
    found = torch.device(device)
    if found.type != "cuda":
        raise BackendError(f"The CUDA kernels cannot hold weights on {found}. Pass device='cuda'.")
    index = torch.cuda.current_device() if found.index is None else found.index
    if index >= torch.cuda.device_count():
        raise BackendError(f"There is no cuda:{index} here; torch sees {torch.cuda.device_count()} device(s).")
    return torch.device("cuda", index)
