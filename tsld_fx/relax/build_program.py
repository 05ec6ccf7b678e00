"""A lowered model or a Relax module -> a program folder that TVM's runtime runs without torch or a compiler."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from tsld_fx.capture import max_positions
from tsld_fx.errors import ConfigError
from tsld_fx.lowered import LoweredModel
from tsld_fx.relax.cpu_target import CpuTarget, cpu_target
from tsld_fx.relax.generation import step_functions
from tsld_fx.relax.importer_fixes import Converter
from tsld_fx.relax.program_cache import build_library
from tsld_fx.relax.run import FORMAT
from tsld_fx.relax.translate import PARAMETER_NAMES, export_lowered, parameters_of, program_to_relax
from tsld_fx.relax.tvm_import import check_tvm, load_tvm
from tsld_fx.runs import whole_folder

_ALIGN = 64
RUNTIME_LIBRARIES = {"llvm": ("libtvm_runtime.so",), "cuda": ("libtvm_runtime.so", "libtvm_runtime_cuda.so")}


@dataclass
class Parts:
    """What goes into a folder: a module with its weights, and what the manifest says of them."""

    module: Any
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def compile(
    model: Any,
    path: str | Path,
    *,
    target: str = "llvm",
    generation: bool = True,
    batch: int | None = None,
    tokens: int | None = None,
    runtime: bool = False,
    arch: Sequence[str] = ("sm_80", "sm_90"),
    max_rows: int | None = None,
) -> Path:
    """Compile a lowered model into a program folder: model.so, weights.bin, manifest.json and run.py.

    The folder is written whole or not at all. `tsld_fx.relax.load(path)` runs it here; `python path/run.py` runs it
    anywhere with numpy and apache-tvm-ffi. For CPUs, weights stay packed and are no part of the code, so that models of
    one architecture share a compiled library: it is taken from the cache (TSLD_CACHE_DIR) when it was built before.
    For CUDA, model.so holds TVM's kernels, ours, and the weights in our kernels' layout; no GPU is needed to build it.

    Args:
        model: a lowered model; or a Relax IRModule with bound weights, of which every function becomes callable (CPU).
        target: `llvm` (this machine's CPU), `llvm:x86-64-v2`, `-v3`, `-v4`, or `cuda`.
        generation: also build `prefill` and `decode`, the step functions with a KV cache behind `.generate`.
        batch, tokens: a fixed size of `main`'s inputs; None for any.
        runtime: put TVM's runtime library (3.4 MB) into the folder, so that apache-tvm need not be installed there.
        arch: of `cuda`: architectures to hold machine code for; newer ones run PTX of the lowest.
        max_rows: of `cuda`: kernels only for calls with up to so many tokens (batch x length); None for any number.

    Raises:
        TsldError: TVM is absent or of another version, the model or the target is not fit for it, or `path` exists and
            is no program folder.
    """
    where = cpu_target("llvm" if target == "cuda" else target)
    load_tvm("tsld_fx.relax.compile")
    folder = Path(path)
    check_writable(folder)
    if target == "cuda":
        parts, library = _for_cuda(model, generation, batch, tokens, tuple(arch), max_rows)
        facts: dict[str, Any] = {"kind": "cuda", "mcpu": "generic", "machine": where.machine, "flags": []}
        facts["arch"] = list(arch)
    else:
        parts = _for_cpu(model, where, generation, batch, tokens)
        library = build_library(parts.module, where)
        facts = {"kind": "llvm", "mcpu": where.mcpu, "machine": where.machine, "flags": where.flags}
    return write_program(folder, library, parts, facts, runtime=runtime)


def _for_cpu(model: Any, target: CpuTarget, generation: bool, batch: int | None, tokens: int | None) -> Parts:
    from tvm import IRModule

    if isinstance(model, IRModule):
        return Parts(model)
    weights: dict[str, np.ndarray] = {}

    def imported(program: ExportedProgram) -> Any:
        weights.update(as_arrays(parameters_of(program)))
        return program_to_relax(program, target, bind_params=False)

    parts = _parts(model, imported, generation, batch, tokens)
    parts.weights = weights
    return parts


def _for_cuda(
    model: Any, generation: bool, batch: int | None, tokens: int | None, arch: tuple[str, ...], max_rows: int | None
) -> tuple[Parts, bytes]:
    from tsld_fx.codegen.runtime_module import targets_of
    from tsld_fx.relax.cuda_build import build_cuda_library, load_cuda_runtime
    from tsld_fx.relax.cuda_kernels import CudaMatmuls, check_dtype, kernel_layouts

    matmuls = CudaMatmuls({}, targets_of(arch))
    if isinstance(model, LoweredModel):
        check_dtype(model.dtype)
    load_cuda_runtime()

    def imported(program: ExportedProgram) -> Any:
        matmuls.layers.update(kernel_layouts(program, model))
        converters: dict[str, Converter] = {"lowbit_linear.default": matmuls.lowbit_linear}
        return program_to_relax(program, None, bind_params=True, converters=converters)

    parts = _parts(model, imported, generation, batch, tokens)
    parts.facts["max_rows"] = max_rows
    return parts, build_cuda_library(parts.module, matmuls, arch, max_rows)


def _parts(
    model: Any, imported: Callable[[ExportedProgram], Any], generation: bool, batch: int | None, tokens: int | None
) -> Parts:
    if not isinstance(model, LoweredModel):
        raise ConfigError(
            f"compile: expected a lowered model or a Relax IRModule, got {type(model).__name__}. "
            "Give the result of tsld_fx.convert, tsld_fx.load or tsld_fx.to_relax."
        )
    parts = Parts(imported(export_lowered(model, batch, tokens)), facts=facts_of(model))
    if generation:
        steps, _, parts.facts["cache"] = step_functions(model, imported)
        parts.module = merged(parts.module, steps)
    return parts


def facts_of(model: LoweredModel) -> dict[str, Any]:
    """What the loader must know of a model: vocabulary, longest input, end and padding tokens."""
    config, generation = model.config.get_text_config(), model.generation_config
    ends = generation.eos_token_id if generation is not None else config.eos_token_id
    return {
        "model": type(model).__name__,
        "vocabulary": int(config.vocab_size),
        "max_tokens": max_positions(model),
        "eos_token_id": ends,
        "pad_token_id": generation.pad_token_id if generation is not None else config.pad_token_id,
    }


def merged(first: Any, second: Any) -> Any:
    """Both modules' functions in one; kernels that have one name are one kernel."""
    from tvm import IRModule

    module = IRModule(dict(first.functions), attrs=first.attrs)
    names = {variable.name_hint: variable for variable in module.functions}
    replaced = {}
    for variable, function in second.functions.items():
        if variable.name_hint in names:
            replaced[variable] = names[variable.name_hint]
        else:
            module[variable] = function
    return _redirected(module, replaced)


def _redirected(module: Any, replaced: Mapping[Any, Any]) -> Any:
    from tvm import relax

    if not replaced:
        return module

    @relax.expr_functor.mutator
    class Redirect(relax.PyExprMutator):
        def visit_global_var_(self, variable: Any) -> Any:
            return replaced.get(variable, variable)

    for variable, function in list(module.functions.items()):
        if isinstance(function, relax.Function):
            module[variable] = Redirect(module).visit_expr(function)
    return module


def as_arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Tensors on the host as numpy arrays; bfloat16, which numpy has not, is refused.

    Raises:
        ConfigError: a bfloat16 tensor.
    """
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bfloat16:
            raise ConfigError(
                f"compile: {name} is bfloat16, which the CPU program does not take. Load the model with "
                "dtype=torch.float32 (packed weights stay packed)."
            )
    return {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in tensors.items()}


def check_writable(folder: Path) -> None:
    """Refuse a place that holds something else than a program folder.

    Raises:
        ConfigError: it says what lies there.
    """
    if folder.exists() and not (
        (folder / "manifest.json").is_file() or (folder.is_dir() and not any(folder.iterdir()))
    ):
        raise ConfigError(f"compile: {folder} exists and is no program folder. Name a new one.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"compile: {folder.parent} cannot be made: {error}. Name another folder.") from error


def write_program(folder: Path, library: bytes, parts: Parts, target: dict[str, Any], *, runtime: bool) -> Path:
    """Write a program folder, whole or not at all."""
    with whole_folder(folder) as inside:
        (inside / "model.so").write_bytes(library)
        weights = _write_weights(inside / "weights.bin", parts.weights)
        shutil.copyfile(Path(__file__).with_name("run.py"), inside / "run.py")
        if runtime:
            for name in RUNTIME_LIBRARIES[target["kind"]]:
                shutil.copyfile(_library(name), inside / name)
        manifest = {
            "format_version": FORMAT,
            "tsld_fx": version("tsld-fx"),
            "versions": {"apache-tvm": check_tvm("compile"), "apache-tvm-ffi": version("apache-tvm-ffi")},
            "target": target,
            "files": {path.name: _entry(path) for path in sorted(inside.iterdir()) if path.suffix in (".so", ".bin")},
            "functions": signatures(parts.module),
            "weights": weights,
            **{
                "model": None,
                "vocabulary": None,
                "max_tokens": None,
                "eos_token_id": None,
                "pad_token_id": None,
                "max_rows": None,
                "cache": None,
            },
            **parts.facts,
        }
        (inside / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return folder


def _library(name: str) -> Path:
    import tvm

    return Path(tvm.__file__).parent / "lib" / name


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _write_weights(path: Path, weights: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Raw tensors at multiples of 64 bytes, so that a mapped file is used as it is; a tied one is written once."""
    entries, written, offset = [], {}, 0
    with path.open("wb") as file:
        for name, array in weights.items():
            place = (array.ctypes.data, array.nbytes)
            if place not in written:
                padding = -offset % _ALIGN
                file.write(b"\0" * padding)
                file.write(array.tobytes())
                written[place] = offset + padding
                offset += padding + array.nbytes
            entries.append(
                {
                    "name": name, "dtype": str(array.dtype), "shape": list(array.shape),
                    "offset": written[place], "bytes": array.nbytes,
                }
            )  # fmt: skip
    return entries


def signatures(module: Any) -> dict[str, Any]:
    """Name -> {"inputs": [{"name", "dtype", "shape"}], "weights": [names]} of a module's Relax functions."""
    from tvm import relax

    found = {}
    for variable, function in module.functions.items():
        if isinstance(function, relax.Function):
            weights = [str(name) for name in (function.attrs or {}).get(PARAMETER_NAMES, [])]
            inputs = list(function.params)[: len(function.params) - len(weights)]
            found[variable.name_hint] = {"inputs": [_input(value) for value in inputs], "weights": weights}
    return found


def _input(value: Any) -> dict[str, Any]:
    shape = [int(size.value) if hasattr(size, "value") else str(size) for size in value.ty.shape]
    return {"name": str(value.name), "dtype": str(value.ty.dtype), "shape": shape}
