"""A lowered model or a Relax module -> a program folder that TVM's runtime runs without torch or a compiler."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from tsld_fx.capture import max_positions
from tsld_fx.errors import ConfigError
from tsld_fx.lowered import LoweredModel
from tsld_fx.relax.cpu_target import CpuTarget, cpu_target
from tsld_fx.relax.generation import step_functions
from tsld_fx.relax.importer_fixes import Converter
from tsld_fx.relax.program_cache import build_library
from tsld_fx.relax.program_folder import Parts, as_arrays, check_writable, write_program
from tsld_fx.relax.program_request import look_up, weight
from tsld_fx.relax.translate import PARAMETER_NAMES, export_lowered, program_to_relax
from tsld_fx.relax.tvm_import import check_tvm, load_tvm


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
    check_tvm("tsld_fx.relax.compile")
    check_model(model)
    folder = Path(path)
    check_writable(folder)
    if target == "cuda":
        parts, library = _for_cuda(model, generation, batch, tokens, tuple(arch), max_rows)
        facts: dict[str, Any] = {"kind": "cuda", "mcpu": "generic", "machine": where.machine, "flags": []}
        facts["arch"] = list(arch)
    else:
        parts, library = _for_cpu(model, where, generation, batch, tokens)
        facts = {"kind": "llvm", "mcpu": where.mcpu, "machine": where.machine, "flags": where.flags}
    return write_program(folder, library, parts, facts, runtime=runtime)


def _for_cpu(
    model: Any, target: CpuTarget, generation: bool, batch: int | None, tokens: int | None
) -> tuple[Parts, bytes]:
    if not isinstance(model, LoweredModel):
        return Parts(signatures(model)), build_library(model, target)

    def build() -> tuple[bytes, dict[str, Any]]:
        load_tvm("tsld_fx.relax.compile")
        imported = partial(program_to_relax, target=target, bind_params=False)
        module, cache = _module(model, imported, generation, batch, tokens)
        return build_library(module, target), {"functions": signatures(module), "cache": cache}

    options = {"generation": generation, "batch": batch, "tokens": tokens}
    library, facts = look_up(model, target, options, build)
    functions = facts.pop("functions")
    names = dict.fromkeys(name for function in functions.values() for name in function["weights"])
    weights = as_arrays({name: weight(model, name) for name in names})
    return Parts(functions, weights, {**facts, **facts_of(model)}), library


def _for_cuda(
    model: Any, generation: bool, batch: int | None, tokens: int | None, arch: tuple[str, ...], max_rows: int | None
) -> tuple[Parts, bytes]:
    from tsld_fx.codegen.runtime_module import targets_of
    from tsld_fx.relax.cuda_build import build_cuda_library, load_cuda_runtime
    from tsld_fx.relax.cuda_kernels import CudaMatmuls, check_dtype, kernel_layouts

    if not isinstance(model, LoweredModel):
        raise ConfigError("compile: target='cuda' takes lowered models only. Give the result of tsld_fx.convert.")
    check_dtype(model.dtype)
    load_tvm("tsld_fx.relax.compile")
    load_cuda_runtime()
    matmuls = CudaMatmuls({}, targets_of(arch))

    def imported(program: ExportedProgram) -> Any:
        matmuls.layers.update(kernel_layouts(program, model))
        converters: dict[str, Converter] = {"lowbit_linear.default": matmuls.lowbit_linear}
        return program_to_relax(program, None, bind_params=True, converters=converters)

    module, cache = _module(model, imported, generation, batch, tokens)
    facts = {"cache": cache, "max_rows": max_rows, **facts_of(model)}
    return Parts(signatures(module), facts=facts), build_cuda_library(module, matmuls, arch, max_rows)


def _module(
    model: LoweredModel,
    imported: Callable[[ExportedProgram], Any],
    generation: bool,
    batch: int | None,
    tokens: int | None,
) -> tuple[Any, dict[str, Any] | None]:
    """-> (IRModule with `main`, and `prefill` and `decode` with `generation`, what their cache looks like)."""
    module = imported(export_lowered(model, batch, tokens))
    if not generation:
        return module, None
    steps, _, cache = step_functions(model, imported)
    return merged(module, steps), cache


def check_model(model: Any) -> None:
    """Refuse what cannot be compiled.

    Raises:
        ConfigError: neither a lowered model nor a Relax IRModule.
    """
    if isinstance(model, LoweredModel):
        return
    tvm = sys.modules.get("tvm")  # not loaded: then it cannot be one of its modules
    if tvm is None or not isinstance(model, tvm.IRModule):
        raise ConfigError(
            f"compile: expected a lowered model or a Relax IRModule, got {type(model).__name__}. "
            "Give the result of tsld_fx.convert, tsld_fx.load or tsld_fx.to_relax."
        )


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
