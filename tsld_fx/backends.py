"""Which backends can run a lowered model here, and how a model is put on one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from tsld_fx.errors import BackendError
from tsld_fx.lowbit_linear import LowBitLinear

BACKENDS = ("reference", "cuda", "cpu", "tvm")


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
    problems = {"cuda": _cuda_problem, "cpu": _cpu_problem, "tvm": _tvm_problem}
    problem = problems[name](device) if name in problems else None
    if problem is not None:
        raise BackendError(f"backend={name!r}: {problem} Or use backend='reference'.")
    if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise BackendError(
            f"device={str(device)!r}: torch.cuda.is_available() is False here. Install a CUDA build of torch and a "
            "driver, or leave the device out."
        )


def check_activations(activations: str, backend: str) -> None:
    """Refuse an activation mode that is unknown, or that the named backend does not have.

    Raises:
        BackendError: it says which there are.
    """
    from tsld_fx.codegen.cpu.gemm import check_activations as check

    check(activations)
    if activations != "a16" and backend not in ("auto", "cpu"):
        raise BackendError(
            f"activations={activations!r} is a mode of backend='cpu'; backend={backend!r} keeps activations as they "
            "are. Leave activations out, or use backend='cpu'."
        )


def use_backend(model: PreTrainedModel, layers: Mapping[str, LowBitLinear], name: str, activations: str = "a16") -> str:
    """Put a lowered model on a backend; returns which (`auto`: the fastest that serves it where it lies).

    Raises:
        BackendError: the backend cannot run here, or serves one of the layers not.
    """
    used = _put_on(model, layers, name, activations)
    if activations == "int8" and used != "cpu":
        warnings.warn(
            f"activations='int8' is what only backend='cpu' has; {used!r} keeps activations as they are, so results "
            "differ from the CPU's in the second or third digit.",
            stacklevel=3,
        )
    return used


def _put_on(model: PreTrainedModel, layers: Mapping[str, LowBitLinear], name: str, activations: str) -> str:
    check_backend(name, model.device)
    wanted = model.device.type if name == "auto" else name
    if wanted == "tvm" and layers:
        for layer in layers.values():
            layer.use_kernels("tvm")
        return "tvm"
    if wanted not in ("cpu", "cuda") or not layers:
        return "reference"
    problem = _cpu_problem(model.device) if wanted == "cpu" else _cuda_problem(model.device) or _unserved(layers)
    if problem is not None:
        if name != "auto":
            raise BackendError(f"backend={name!r}: {problem}")
        kind = "CPU" if wanted == "cpu" else "CUDA"
        warnings.warn(f"backend='auto' runs the reference implementation, not {kind} kernels: {problem}", stacklevel=4)
        return "reference"
    if wanted == "cuda" and model.device.type != "cuda":
        model.to(torch.device("cuda", torch.cuda.current_device()))
    for layer in layers.values():
        layer.use_kernels(wanted, activations)
    return wanted


def _cpu_problem(device: torch.device | str | None) -> str | None:
    """What keeps the CPU kernels from running, with the remedy. Builds them, unless they are in the cache."""
    from tsld_fx.codegen.compiler import KernelBuildError
    from tsld_fx.codegen.cpu import library

    if device is not None and torch.device(device).type not in ("cpu", "meta"):
        return f"the model lies on {device}. Move it with .to('cpu'), or pass device='cpu'."
    try:
        library.level()
    except KernelBuildError as error:
        return str(error)
    return None


def _tvm_problem(device: torch.device | str | None) -> str | None:
    """What keeps the layers from running what TVM compiles."""
    from tsld_fx.relax.tvm_import import check_tvm

    if device is not None and torch.device(device).type not in ("cpu", "meta"):
        return f"the model lies on {device}, and its kernels are for CPUs. Move it with .to('cpu')."
    try:
        check_tvm("backend='tvm'")
    except BackendError as error:
        return str(error)
    return None


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
