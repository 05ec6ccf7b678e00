"""Program folders: what `compile` writes and `run.py` reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsld_fx.errors import BackendError, ConfigError
from tsld_fx.relax.run import FORMAT, installed_library
from tsld_fx.relax.tvm_import import check_tvm
from tsld_fx.whole_files import file_sha256, whole_folder

_ALIGN = 64
RUNTIME_LIBRARIES = {"llvm": ("libtvm_runtime.so",), "cuda": ("libtvm_runtime.so", "libtvm_runtime_cuda.so")}


@dataclass
class Parts:
    """What goes into a folder besides the library: functions' signatures, weights, and facts for the manifest."""

    functions: dict[str, Any]
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


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
            "functions": parts.functions,
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
    found = installed_library(name)
    if found is None or not found.is_file():
        raise BackendError(f"compile: {name} is not in the installed apache-tvm. Install it again.")
    return found


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


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
