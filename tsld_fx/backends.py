"""Which backends can run a lowered model here, and how a model is put on one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from tsld_fx.errors import BackendError
from tsld_fx.lowbit_linear import LowBitLinear

BACKENDS = ("reference", "cuda")


def check_backend(name: str, device: torch.device | str | None = None) -> None:
    """Refuse a backend that is unknown or cannot run here, before any work is done for it.

    Args:
        device: where the model lies, or will.

    Raises:
        BackendError: it names the backends that exist, or says what `cuda` lacks.
    """
    if name != "auto" and name not in BACKENDS:
        raise BackendError(
            f"backend={name!r} is not available in this version of tsld_fx. "
            f"Use backend='auto' or one of {', '.join(map(repr, BACKENDS))}."
        )
    problem = _cuda_problem(device) if name == "cuda" else None
    if problem is not None:
        raise BackendError(f"backend='cuda': {problem} Or use backend='reference'.")
    if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise BackendError(
            f"device={str(device)!r}: torch.cuda.is_available() is False here. Install a CUDA build of torch and a "
            "driver, or leave the device out."
        )


def use_backend(model: PreTrainedModel, layers: Mapping[str, LowBitLinear], name: str) -> str:
    """Put a lowered model on a backend; returns which (`auto`: the fastest that serves it where it lies).

    Raises:
        BackendError: the backend cannot run here, or serves one of the layers not.
    """
    check_backend(name, model.device)
    if name == "reference" or (name == "auto" and model.device.type != "cuda"):
        return "reference"
    problem = _cuda_problem(model.device) or _unserved(layers)
    if problem is not None:
        if name == "cuda":
            raise BackendError(f"backend='cuda': {problem}")
        warnings.warn(f"backend='auto' runs the reference implementation, not CUDA kernels: {problem}", stacklevel=3)
        return "reference"
    if model.device.type != "cuda":
        model.to(torch.device("cuda", torch.cuda.current_device()))
    for layer in layers.values():
        layer.use_kernels()
    return "cuda"


def _cuda_problem(device: torch.device | str | None) -> str | None:
    """What keeps the CUDA kernels from running, with the remedy; of the current CUDA device if `device` is none."""
    from tsld_fx.codegen.compiler import KernelBuildError, find_compiler

    if not torch.cuda.is_available() or torch.version.cuda is None:
        return (
            "there is no NVIDIA GPU that torch can use. Install a CUDA build of torch and a driver on a machine with "
            "a GPU."
        )
    where = torch.device("cuda" if device is None else device)
    index = torch.cuda.current_device() if where.type != "cuda" or where.index is None else where.index
    if index >= torch.cuda.device_count():
        return f"there is no cuda:{index} here; torch sees {torch.cuda.device_count()} device(s). Name one of them."
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return (
            f"cuda:{index} ({torch.cuda.get_device_name(index)}) has compute capability {major}.{minor}; the low-bit "
            "kernels need 8.0 (A100) or later. Choose another device."
        )
    try:
        find_compiler()
    except KernelBuildError as error:
        return str(error)
    return None


def _unserved(layers: Mapping[str, LowBitLinear]) -> str | None:
    """The first layer whose format no CUDA kernel serves, with the remedy."""
    from tsld_fx.codegen.layout import kernel_group

    for name, layer in layers.items():
        try:
            kernel_group(layer.group_size, layer.in_features)
        except BackendError as error:
            return f"{name}: {error}"
    return None
