"""A lowered model or a Relax module -> a program folder that TVM's runtime runs, without torch and without a compiler."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsld_fx.capture import max_positions
from tsld_fx.errors import ConfigError
from tsld_fx.lowered import LoweredModel
from tsld_fx.relax.cpu_target import CpuTarget, cpu_target
from tsld_fx.relax.program_cache import build_library
from tsld_fx.relax.run import FORMAT
from tsld_fx.relax.translate import PARAMETER_NAMES, export_lowered, parameters_of, program_to_relax
from tsld_fx.relax.tvm_import import check_tvm, load_tvm

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
) -> Path:
    """Compile a lowered model into a program folder: model.so, weights.bin, manifest.json and run.py.

    The folder is written whole or not at all. `tsld_fx.relax.load(path)` runs it here; `python path/run.py` runs it
    anywhere with numpy and apache-tvm-ffi. Weights stay packed and are no part of the code, so that models of one
    architecture share a compiled library: it is taken from the cache (TSLD_CACHE_DIR) when it was built before.

    Args:
        model: a lowered model; or a Relax IRModule with bound weights, of which every function becomes callable.
        target: `llvm` (this machine's CPU) or `llvm:x86-64-v2`, `-v3`, `-v4`.
        generation: also build `prefill` and `decode`, the step functions with a KV cache behind `.generate`.
        batch, tokens: a fixed size of `main`'s inputs; None for any.
        runtime: put TVM's runtime library (3.4 MB) into the folder, so that apache-tvm need not be installed there.

    Raises:
        TsldError: TVM is absent or of another version, the model or the target is not fit for it, or `path` exists and
            is no program folder.
    """
    where = cpu_target(target)
    load_tvm("tsld_fx.relax.compile")
    folder = Path(path)
    check_writable(folder)
    parts = _parts(model, where, generation, batch, tokens)
    library = build_library(parts.module, where)
    facts = {"kind": "llvm", "mcpu": where.mcpu, "machine": where.machine, "flags": where.flags}
    return write_program(folder, library, parts, facts, runtime=runtime)


def _parts(model: Any, target: CpuTarget, generation: bool, batch: int | None, tokens: int | None) -> Parts:
    from tvm import IRModule

    if isinstance(model, IRModule):
        return Parts(model)
    if not isinstance(model, LoweredModel):
        raise ConfigError(
            f"compile: expected a lowered model or a Relax IRModule, got {type(model).__name__}. "
            "Give the result of tsld_fx.convert, tsld_fx.load or tsld_fx.to_relax."
        )
    program = export_lowered(model, batch, tokens)
    parts = Parts(program_to_relax(program, target, bind_params=False), as_arrays(parameters_of(program)), facts_of(model))
    if generation:
        from tsld_fx.relax.generation import step_functions

        steps, weights, cache = step_functions(model, target)
        parts.module = merged(parts.module, steps)
        parts.weights.update(weights)
        parts.facts["cache"] = cache
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
    if folder.exists() and not ((folder / "manifest.json").is_file() or (folder.is_dir() and not any(folder.iterdir()))):
        raise ConfigError(f"compile: {folder} exists and is no program folder. Name a new one.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"compile: {folder.parent} cannot be made: {error}. Name another folder.") from error


def write_program(folder: Path, library: bytes, parts: Parts, target: dict[str, Any], *, runtime: bool) -> Path:
    """Write a program folder: into a temporary one beside it, then renamed."""
    temporary = folder.parent / f".tmp-{folder.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        temporary.mkdir()
        (temporary / "model.so").write_bytes(library)
        weights = _write_weights(temporary / "weights.bin", parts.weights)
        shutil.copyfile(Path(__file__).with_name("run.py"), temporary / "run.py")
        if runtime:
            for name in RUNTIME_LIBRARIES[target["kind"]]:
                shutil.copyfile(_library(name), temporary / name)
        manifest = {
            "format_version": FORMAT,
            "tsld_fx": version("tsld-fx"),
            "versions": {"apache-tvm": check_tvm("compile"), "apache-tvm-ffi": version("apache-tvm-ffi")},
            "target": target,
            "files": {path.name: _entry(path) for path in sorted(temporary.iterdir()) if path.suffix in (".so", ".bin")},
            "functions": signatures(parts.module),
            "weights": weights,
            **{"model": None, "vocabulary": None, "max_tokens": None, "eos_token_id": None, "pad_token_id": None},
            **parts.facts,
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        _put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _put_in_place(temporary: Path, folder: Path) -> None:
    if folder.exists():
        old = folder.parent / f".old-{temporary.name}"
        folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.rename(folder)


def _library(name: str) -> Path:
    import tvm

    return Path(tvm.__file__).parent / "lib" / name


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _write_weights(path: Path, weights: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Raw tensors at multiples of 64 bytes, so that a mapped file can be used as it is; one that is tied is written once."""
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
    return {"name": value.name_hint, "dtype": str(value.ty.dtype), "shape": shape}
