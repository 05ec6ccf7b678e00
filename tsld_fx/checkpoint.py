"""Read checkpoint folders, with an error for everything that can be wrong with one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tsld_fx.backends import check_activations, check_backend, check_rounding, move, out_of_memory
from tsld_fx.errors import BackendError, CheckpointError
from tsld_fx.hf_quantizer import METHOD
from tsld_fx.lowered import LoweredModel, as_lowered
from tsld_fx.runtime_module import is_runtime_module, load_runtime_module


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder.

    Raises:
        CheckpointError: no folder, no config, or one that is not JSON.
    """
    file = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder. Give the folder that save_pretrained wrote.")
    if not file.is_file():
        raise CheckpointError(f"{folder}: no config.json in it, so this is not a model's folder.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}). The checkpoint is damaged; save it again.") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: not a JSON object. The checkpoint is damaged; save it again.")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, each checked to be whole.

    Raises:
        CheckpointError: none there, one missing, or one cut short.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{index}: not a table of weights ({type(error).__name__}: {error}). Copy it again, or save again."
            ) from None
        files = [folder / name for name in names]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: missing. Copy the whole checkpoint folder, or save the model again.")
        try:
            with safe_open(file, framework="pt") as handle:
                handle.keys()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: cut short or damaged ({error}). Copy it again, or save again.") from None
    return files


def read_tensors(folder: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The tensors of a checkpoint whose names satisfy `wanted`."""
    found = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118  (safe_open is no mapping)
                if wanted(name):
                    found[name] = handle.get_tensor(name)
    return found


def from_pretrained(folder: Path, **kwargs: Any) -> Any:
    """AutoModelForCausalLM.from_pretrained, with one error for everything that a damaged folder can cause.

    Raises:
        CheckpointError: a file is cut short, or a tensor is missing or of another shape than the model's.
        BackendError: too little memory on a device of `device_map`.
    """
    dtype = kwargs.get("dtype")
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise CheckpointError(f"{folder}: dtype={dtype!r} is none of torch's. Use one such as torch.float16.")
    _check_packed_names(folder)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    except torch.OutOfMemoryError as error:
        raise BackendError(f"{folder}: {out_of_memory(kwargs.get('device_map', 'the device'))} ({error})") from error
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: transformers cannot load it ({error}). Check config.json and the options, or save it again."
        ) from error
    for name in sorted(info["missing_keys"]):
        raise CheckpointError(f"{folder}: tensor {name!r} is missing. The checkpoint is incomplete; save it again.")
    mismatched = [(name, tuple(stored), tuple(wanted)) for name, stored, wanted in info["mismatched_keys"]]
    for name, stored, wanted in sorted(mismatched + _other_shapes(model)):
        raise CheckpointError(
            f"{folder}: tensor {name!r} has shape {list(stored)}, the model needs {list(wanted)}. "
            "config.json and the weights are not of one checkpoint; save it again."
        )
    return model


def _check_packed_names(folder: Path) -> None:
    """Every packed layer has its tensors in the files; transformers would leave a missing one uninitialised."""
    stored = set()
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as handle:
            stored |= set(handle.keys())
    quantization = read_config(folder).get("quantization_config")
    layers = quantization.get("layers") if isinstance(quantization, dict) else None
    for name, layer in (layers if isinstance(layers, dict) else {}).items():
        zero = ["weight_zero"] if isinstance(layer, dict) and layer.get("zero") else []
        needed = [f"{name}.{leaf}" for leaf in ("weight_packed", "weight_scale", *zero)]
        missing = [tensor for tensor in needed if tensor not in stored]
        if missing and len(missing) < len(needed):  # a layer that is missing as a whole is left to transformers
            raise CheckpointError(
                f"{folder}: tensor {missing[0]!r} is missing. The checkpoint is incomplete; save it again."
            )


def _other_shapes(model: PreTrainedModel) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Parameters (name, shape, shape by config) that a loader took over as they were (transformers 5.17 does)."""
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    loaded = dict(model.named_parameters())
    pairs = ((name, loaded[name].shape, p.shape) for name, p in skeleton.named_parameters() if name in loaded)
    return [(name, tuple(found), tuple(wanted)) for name, found, wanted in pairs if found != wanted]


def _formats(quantization: dict[str, Any]) -> list[tuple[int, bool]]:
    """(bits, whether scales are per group) of the layers that config.json describes."""
    layers = quantization.get("layers")
    described = layers.values() if isinstance(layers, dict) else ()
    return [
        (int(layer["bits"]), 0 < layer["group_size"] < layer["in_features"])
        for layer in described
        if isinstance(layer, dict) and {"bits", "group_size", "in_features"} <= set(layer)
    ]


def load(
    path: str | Path,
    backend: str = "auto",
    device: str | torch.device | None = None,
    *,
    activations: str | None = None,
    **kwargs: Any,
) -> LoweredModel:
    """Load a converted model: what `lowered.save_pretrained(path)` or `build_runtime_module` wrote.

    Args:
        path: the checkpoint's folder.
        backend: as in `convert`; `auto` goes by `device`.
        device: where to put it (default: where transformers loads it, the CPU; with backend `cuda` the current GPU).
        activations: as in `convert`; default what the checkpoint records, where the backend has that mode.
        kwargs: go to AutoModelForCausalLM.from_pretrained (`dtype`, `device_map`, `attn_implementation`, ...).

    Raises:
        CheckpointError: not a converted model, of another format version, cut short or damaged.
        BackendError: the backend cannot run here.
    """
    folder = Path(path)
    if is_runtime_module(folder):
        return load_runtime_module(folder, backend, device, **kwargs)
    if activations is not None:
        check_activations(activations, backend)
    check_backend(backend, device)
    if backend == "cuda" and device is not None and torch.device(device).type != "cuda":
        raise BackendError(f"backend='cuda' cannot run on device={str(device)!r}. Pass device='cuda', or leave it out.")
    config = read_config(folder)
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        hint = "tsld_fx.load_prepared" if "tsld_fx" in config else "AutoModelForCausalLM.from_pretrained"
        raise CheckpointError(
            f"{folder}: config.json says nothing of quant_method '{METHOD}', so this is not a converted model. "
            f"Load it with {hint}, then prepare and convert it."
        )
    if activations is None:
        activations = str(quantization.get("activations", "a16"))
        try:
            check_activations(activations, "auto")
        except BackendError as error:
            raise CheckpointError(f"{folder}: quantization_config: {error} Or pass activations= to load.") from None
    else:
        check_rounding(activations, backend, device, _formats(quantization))
    model = from_pretrained(folder, **kwargs)
    if device is not None:
        move(model, device)
    model.config.quantization_config.activations = activations
    return as_lowered(model, backend, activations)
