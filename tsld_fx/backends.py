"""Which backends can run a lowered model here, and how a model is put on one."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedModel

from tsld_fx.errors import BackendError
from tsld_fx.lowbit_linear import LowBitLinear

BACKENDS = ("reference", "cuda", "cpu", "tvm")
ACTIVATIONS = {"a16": BACKENDS, "int8": ("cpu", "cuda"), "add": ("cpu",), "fp8": ("cuda",)}  # mode -> who has it


def check_backend(name: str, device: torch.device | str | None = None) -> None:
    """Refuse a backend that is unknown or cannot run here, before any work is done for it.

    Args:
        device: where the model lies, or will.

    Raises:
        BackendError: it names the backends that exist, or says what the backend lacks; or the device is unknown.
    """
    if name != "auto" and name not in BACKENDS:
        raise BackendError(
            f"backend={name!r} is not available in this version of tsld_fx. "
            f"Use backend='auto' or one of {', '.join(map(repr, BACKENDS))}."
        )
    try:
        torch.device("cpu" if device is None else device)
    except RuntimeError:
        raise BackendError(f"device={device!r} is unknown. Use 'cpu', 'cuda' or a device such as 'cuda:1'.") from None
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
    if activations not in ACTIVATIONS:
        raise BackendError(f"activations={activations!r} is unknown. Use one of {', '.join(map(repr, ACTIVATIONS))}.")
    having = ACTIVATIONS[activations]
    if backend != "auto" and backend in BACKENDS and backend not in having:
        names = " and ".join(f"backend={name!r}" for name in having)
        raise BackendError(
            f"activations={activations!r} is a mode of {names}; backend={backend!r} keeps activations as they are. "
            f"Leave activations out, or use backend={having[0]!r}."
        )


def check_rounding(
    activations: str, backend: str, device: torch.device | str | None, formats: Iterable[tuple[int, bool]]
) -> None:
    """Refuse 8-bit activations on a CUDA device, or for weights, without kernels for them.

    Args:
        device: where the model lies, or will.
        formats: (bits, whether scales are per group) of the layers.

    Raises:
        BackendError: it says what lacks kernels. `auto` is never refused: it keeps activations as they are, and warns.
    """
    if backend == "cuda" and activations in ("int8", "fp8"):
        problem = _rounding_problem(device, formats)
        if problem is not None:
            raise BackendError(f"activations={activations!r}: {problem} Leave activations out.")


def layer_formats(layers: Iterable[LowBitLinear]) -> list[tuple[int, bool]]:
    """(bits, whether scales are per group) of each layer, as `check_rounding` wants them."""
    return [(layer.bits, 0 < layer.group_size < layer.in_features) for layer in layers]


def use_backend(model: PreTrainedModel, layers: Mapping[str, LowBitLinear], name: str, activations: str = "a16") -> str:
    """Put a lowered model on a backend; returns which (`auto`: the fastest that serves it where it lies).

    Raises:
        BackendError: the backend cannot run here, or serves one of the layers not.
    """
    check_backend(name, model.device)
    used = _put_on(model, layers, name)
    problem = None
    if used not in ACTIVATIONS[activations]:
        problem = f"{used!r} keeps activations as they are."
    elif used == "cuda" and activations != "a16":
        problem = _rounding_problem(model.device, layer_formats(layers.values()))
    if problem is not None and activations in ("int8", "fp8"):
        warnings.warn(
            f"activations={activations!r} has no effect here: {problem} Results differ in the second or third digit "
            "from those with rounded activations.",
            stacklevel=3,
        )
    if used == "reference":
        return used
    for name, layer in layers.items():
        try:
            layer.use_kernels(used, "a16" if problem is not None else activations)
        except BackendError as error:
            raise BackendError(f"{name}: {error}") from error
    return used


def move(model: PreTrainedModel, device: torch.device | str) -> None:
    """`model.to(device)`.

    Raises:
        BackendError: too little memory there.
    """
    try:
        model.to(device)
    except torch.OutOfMemoryError as error:
        raise BackendError(f"{out_of_memory(device, model.get_memory_footprint())} ({error})") from error


def out_of_memory(device: object, size: int | None = None) -> str:
    """What to say and to do when a model does not fit on a device; size in bytes."""
    what = "the model" if size is None else f"the model ({size / 1e9:.1f} GB)"
    return (
        f"Out of memory on {device} while moving {what} there. Free memory on it, choose another device, or load in "
        "dtype=torch.float16."
    )


def _put_on(model: PreTrainedModel, layers: Mapping[str, LowBitLinear], name: str) -> str:
    """The backend that runs, with the model where that wants it."""
    wanted = model.device.type if name == "auto" else name
    if wanted == "tvm" and layers:
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
        move(model, torch.device("cuda", torch.cuda.current_device()))
    return wanted


def _rounding_problem(device: torch.device | str | None, formats: Iterable[tuple[int, bool]]) -> str | None:
    """What keeps 8-bit activations from having kernels on a CUDA device; of the current one if `device` is none."""
    where = torch.device("cuda" if device is None else device)
    index = torch.cuda.current_device() if where.type != "cuda" or where.index is None else where.index
    if torch.cuda.get_device_capability(index) != (9, 0):
        return (
            f"cuda:{index} ({torch.cuda.get_device_name(index)}) has none of the kernels for 8-bit activations, which "
            "are for Hopper (compute capability 9.0)."
        )
    if not any(bits == 2 and not grouped for bits, grouped in formats):
        return "kernels for 8-bit activations serve ternary layers with one scale per channel or tensor; there is none."
    return None


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
