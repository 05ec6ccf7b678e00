"""Models compiled ahead of time: one folder with kernels, weights in their layout, and a manifest.

| file | what |
|---|---|
| `manifest.json` | format version, what the kernels compute, for which devices, versions, sizes and hashes |
| `kernels.so` | the compiled kernels and their launchers (`codegen/runtime_module.py`) |
| `model.safetensors` | weights in kernel layout, everything else under Hugging Face's names |
| `config.json`, `generation_config.json` | Hugging Face's |
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from tsld_fx.backends import move
from tsld_fx.errors import BackendError, CheckpointError, ConfigError
from tsld_fx.lowbit_linear import LowBitLinear
from tsld_fx.lowered import _OWN, LoweredModel, _as_lowered, _clone
from tsld_fx.runtime_linear import RuntimeLinear, open_library
from tsld_fx.runtime_quantizer import TsldRuntimeConfig, TsldRuntimeQuantizer
from tsld_fx.whole_files import file_sha256, whole_folder

FORMAT, FORMAT_VERSION = "tsld_fx runtime module", 1
MANIFEST, LIBRARY = "manifest.json", "kernels.so"
_DTYPES: dict[torch.dtype, Literal["fp16", "bf16"]] = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_PARTS = ("codes", "row_scale", "meta", "row_zero")


def build_runtime_module(
    lowered: LoweredModel,
    path: str | Path,
    arch: Sequence[str] = ("sm_80", "sm_90"),
    *,
    dtype: torch.dtype | None = None,
    max_tokens: int | None = None,
) -> Path:
    """Compile a lowered model for CUDA devices, on a machine that needs no GPU, into a folder that needs no compiler.

    `tsld_fx.load(path)` runs it: without nvcc, without compilation and without passes.

    Args:
        lowered: what `convert` or `load` returned, on any device.
        path: the folder to write, whole or not at all. A runtime module that is there is replaced.
        arch: architectures to hold machine code for; newer ones run PTX that the driver compiles.
        dtype: torch.float16 or torch.bfloat16, of activations and of what is not packed; default the model's own, or
            float16 for a float32 model.
        max_tokens: kernels only for calls with up to so many tokens (batch x length); None for any number.

    Returns:
        The folder.

    Raises:
        TsldError: not a lowered model, an unknown architecture, a format no kernel serves, no compiler, or a folder
            that is taken.
    """
    from tsld_fx.codegen import runtime_module as modules
    from tsld_fx.codegen.compiler import find_compiler
    from tsld_fx.codegen.layout import kernel_group, to_kernel_layout
    from tsld_fx.codegen.spec import KernelSpec

    layers = _check_build(lowered, Path(path), dtype, max_tokens)
    _warn_of_rounding(lowered)
    targets = modules.targets_of(arch)
    dtype = dtype or (lowered.dtype if lowered.dtype in _DTYPES else torch.float16)
    kernels, described = {}, {}
    for name, layer in layers.items():
        try:
            group = kernel_group(layer.group_size, layer.in_features)
        except BackendError as error:
            raise BackendError(f"build_runtime_module: {name}: {error}") from None
        kernels[name] = modules.LinearKernel(
            KernelSpec(_DTYPES[dtype], layer.bits, group), layer.out_features, layer.in_features
        )
    compiler = find_compiler().version
    with whole_folder(path) as folder:
        unique = list(dict.fromkeys(kernels.values()))
        built = modules.build_library(unique, targets, folder / LIBRARY, max_tokens)
        replaced: dict[str, Any] = {}
        for name, layer in layers.items():
            weights = to_kernel_layout(
                layer.weight_packed, layer.weight_scale, layer.weight_zero,
                layer.bits, layer.group_size, layer.in_features,
            )  # fmt: skip
            parts = {part: value for part in _PARTS if (value := getattr(weights, part)) is not None}
            described[name] = {
                "in_features": layer.in_features, "out_features": layer.out_features, "bits": layer.bits,
                "group": weights.group, "shapes": {part: value.numel() for part, value in parts.items()},
                "bias": layer.bias is not None, "function": kernels[name].name,
            }  # fmt: skip
            replaced[name] = _filled(described[name], parts, layer)
        _save_model(lowered, replaced, described, dtype, folder)
        shared = modules.shared_bytes(unique, targets, max_tokens)
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "dtype": str(dtype).removeprefix("torch."),
            "targets": [{"name": name, "shared_bytes": size} for name, size in zip(targets, shared, strict=True)],
            "max_tokens": max_tokens,
            "functions": {k.name: {"spec": _spec(k.spec), "n": k.n, "k": k.k} for k in unique},
            "kernels": built,
            "layers": described,
            "built_with": {"compiler": compiler, **{p: _version(p) for p in _PACKAGES}},
            "files": {file.name: _fingerprint(file) for file in sorted(folder.iterdir())},
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return Path(path)


_PACKAGES = ("tsld-fx", "torch", "transformers", "apache-tvm-ffi")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _spec(spec: Any) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(spec).items() if key != "target"}


def _fingerprint(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": file_sha256(file)}


def _check_build(
    lowered: object, path: Path, dtype: torch.dtype | None, max_tokens: int | None
) -> dict[str, LowBitLinear]:
    if not isinstance(lowered, LoweredModel):
        raise ConfigError(
            f"build_runtime_module: expected the result of tsld_fx.convert, got {type(lowered).__name__}. "
            "Prepare and convert the model first."
        )
    layers = lowered.lowbit_layers()
    if not layers:
        raise ConfigError(
            "build_runtime_module: the model has no packed layer. Give the result of tsld_fx.convert or of "
            "tsld_fx.load on a checkpoint; a runtime module cannot be built from a runtime module."
        )
    if dtype is not None and dtype not in _DTYPES:
        raise ConfigError(f"build_runtime_module: no kernel computes in {dtype}. Use torch.float16 or torch.bfloat16.")
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"build_runtime_module: max_tokens={max_tokens}; give at least 1, or None for any number.")
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not (path / MANIFEST).is_file()):
        raise CheckpointError(f"{path}: something that is no runtime module is in the way. Choose another folder.")
    return layers


def _warn_of_rounding(lowered: LoweredModel) -> None:
    recorded = getattr(lowered.config.quantization_config, "activations", "a16")
    if recorded in ("int8", "fp8"):
        warnings.warn(
            f"build_runtime_module: the model was converted with activations={recorded!r}, which runtime modules do "
            "not have: theirs stay 16 bits.",
            stacklevel=3,
        )


def _filled(described: dict[str, Any], parts: dict[str, torch.Tensor], layer: LowBitLinear) -> RuntimeLinear:
    made = RuntimeLinear(
        layer.in_features, layer.out_features, described["shapes"], layer.bias is not None, described["function"], ""
    )
    for part, value in parts.items():
        setattr(made, f"weight_{part}", value.cpu())
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach().cpu(), requires_grad=False)
    return made.eval()


def _save_model(
    lowered: LoweredModel, replaced: dict[str, Any], layers: dict[str, Any], dtype: torch.dtype, folder: Path
) -> None:
    """config.json and model.safetensors, written by transformers."""
    cloned = _clone(lowered, "", replaced, {})
    base: Any = type(lowered).__mro__[2]
    twin: PreTrainedModel = object.__new__(base)
    twin.__dict__.update({k: v for k, v in cloned.__dict__.items() if k not in (*_OWN, "backend")})
    for parameter in twin.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    twin.config = copy.deepcopy(lowered.config)
    twin.config.dtype = dtype
    quantization = TsldRuntimeConfig(layers=layers)
    twin.config.quantization_config = quantization
    twin.__dict__["hf_quantizer"] = TsldRuntimeQuantizer(quantization, pre_quantized=True, building=True)
    twin.__dict__["quantization_method"] = quantization.quant_method
    twin.save_pretrained(folder)


def is_runtime_module(folder: Path) -> bool:
    """Whether `build_runtime_module` wrote this folder."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, its version and the sizes of the files checked.

    Raises:
        CheckpointError: not a manifest, another format version, or files that are missing, cut short or changed.
    """
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        found, version, files = manifest["format"], manifest["format_version"], manifest["files"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{file}: damaged ({type(error).__name__}: {error}). Build the module again.") from None
    if found != FORMAT or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: {found!r} of format version {version}; this tsld_fx runs version {FORMAT_VERSION} of {FORMAT!r}. "
            "Build the module again, or install the tsld_fx that built it."
        )
    for name, known in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != known["bytes"] or (name == LIBRARY and _fingerprint(path)["sha256"] != known["sha256"]):
            what = "missing" if size is None else f"{size} bytes" if size != known["bytes"] else "of other content"
            raise CheckpointError(f"{path}: {what}, expected {known['bytes']} bytes. Copy the whole folder again.")
    return manifest  # type: ignore[no-any-return]


def load_runtime_module(
    folder: Path, backend: str = "auto", device: str | torch.device | None = None, **kwargs: Any
) -> LoweredModel:
    """Load what `build_runtime_module` wrote onto a CUDA device (default: the current one).

    Raises:
        CheckpointError: the folder is damaged or of another version.
        BackendError: this machine, its driver or its device cannot run the module.
    """
    from tsld_fx.checkpoint import from_pretrained
    from tsld_fx.runtime_device import check_device

    manifest = read_manifest(folder)
    if backend not in ("auto", "cuda"):
        raise BackendError(f"backend={backend!r}: {folder} is a runtime module, which holds CUDA kernels only.")
    dtype = getattr(torch, manifest["dtype"])
    if kwargs.pop("dtype", dtype) not in (dtype, manifest["dtype"], "auto"):
        raise BackendError(f"{folder}: this module computes in {manifest['dtype']}. Build another for another dtype.")
    where = check_device(manifest, folder, device)
    library = str((folder / LIBRARY).resolve())
    opened = open_library(library)
    for layer in manifest["layers"].values():
        opened.function(layer["function"])
    model = from_pretrained(folder, dtype=dtype, **kwargs)
    for module in model.modules():
        if isinstance(module, RuntimeLinear):
            module.library = library
    move(model, where)
    lowered = _as_lowered(model.eval(), type(model))
    lowered.__dict__["backend"] = "cuda"
    return lowered
