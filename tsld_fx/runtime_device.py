"""Whether a machine can run a runtime module, asked before anything is loaded or launched."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from tsld_fx.errors import BackendError


def serving(target: str, capability: int) -> bool:
    """Whether kernels built for `target` run on a device of this compute capability (90 for 9.0)."""
    match = re.fullmatch(r"(sm|compute)_(\d+)(a?)", target)
    if match is None:
        return False
    number = int(match[2])
    if match[3]:
        return capability == number
    return capability >= number and (match[1] == "compute" or capability // 10 == number // 10)


def check_device(manifest: dict[str, Any], folder: Path, device: str | torch.device | None) -> torch.device:
    """-> the device to run on.

    Raises:
        BackendError: no CUDA device or another kind of device, one too old or of an architecture that the module
            lacks, too little shared memory, or a driver too old.
    """
    from tsld_fx.codegen.driver import driver_version

    where = torch.device("cuda" if device is None else device)
    if where.type != "cuda":
        raise BackendError(f"{folder}: a runtime module runs on CUDA devices, not on {str(device)!r}. Pass 'cuda'.")
    if not torch.cuda.is_available():
        raise BackendError(
            f"{folder}: a runtime module needs an NVIDIA GPU that torch can use; torch.cuda.is_available() is False "
            "here. Run it on a machine with one, or load a checkpoint of the model, which runs anywhere."
        )
    index = torch.cuda.current_device() if where.index is None else where.index
    if index >= torch.cuda.device_count():
        raise BackendError(f"there is no cuda:{index} here; torch sees {torch.cuda.device_count()} device(s).")
    properties = torch.cuda.get_device_properties(index)
    capability = 10 * properties.major + properties.minor
    what = f"cuda:{index} ({properties.name}, compute capability {properties.major}.{properties.minor})"
    target = next((t for t in manifest["targets"] if serving(t["name"], capability)), None)
    if target is None:
        names = ", ".join(t["name"] for t in manifest["targets"])
        old = " The kernels need compute capability 8.0 or later." if capability < 80 else ""
        raise BackendError(
            f"{folder}: holds kernels for {names}, none for {what}.{old} Choose another device, or build the module "
            f"with arch=('sm_{max(capability, 80)}', ...)."
        )
    limit = getattr(properties, "shared_memory_per_block_optin", 1 << 30)
    if target["shared_bytes"] > limit:
        raise BackendError(
            f"{folder}: its kernels for {target['name']} take {target['shared_bytes']} bytes of shared memory; {what} "
            f"has {limit}. Build the module with arch=('sm_{capability}', ...)."
        )
    _check_driver(manifest, folder, target["name"], driver_version())
    return torch.device("cuda", index)


def _check_driver(manifest: dict[str, Any], folder: Path, target: str, driver: int) -> None:
    """Machine code needs a driver of the compiler's major version, PTX one of its full version."""
    match = re.search(r"(\d+)\.(\d+)", str(manifest["built_with"]["compiler"]))
    if match is None:
        return
    major, minor = int(match[1]), int(match[2])
    needed = 1000 * major + (10 * minor if target.startswith("compute") else 0)
    if driver < needed:
        raise BackendError(
            f"{folder}: its {target} kernels were built with CUDA {major}.{minor}; the driver here supports CUDA "
            f"{driver // 1000}.{driver % 1000 // 10}. Update the driver, or build with an older toolkit."
        )
