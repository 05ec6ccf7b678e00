"""Read a packed checkpoint with numpy alone, and check it. docs/checkpoint-format.md describes the format.

    python examples/read_checkpoint.py FOLDER

FOLDER is what `tsld-fx convert MODEL --out FOLDER` wrote. Without it, the script first converts the embedded model
into a temporary folder; that part needs tsld_fx, reading does not.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {"U8": "u1", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2"}


def read_safetensors(file: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file, mapped and not read; bfloat16 comes as its 16 bits."""
    data = np.memmap(file, mode="r", dtype=np.uint8)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header: dict[str, Any] = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = data[start + begin : start + end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The configuration and the tensors of a checkpoint, split over files or not."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.is_file():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(files):
        tensors |= read_safetensors(folder / name)
    return config, tensors


def unpack(packed: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """uint8 codes [out, columns]: least significant bits first in each byte, padding dropped."""
    mask = (1 << bits) - 1
    parts = [(packed >> shift) & mask for shift in range(0, 8, bits)]
    return np.stack(parts, axis=-1).reshape(packed.shape[0], -1)[:, :columns]


def dequantize(name: str, layer: dict[str, Any], tensors: dict[str, np.ndarray]) -> np.ndarray:
    """The float32 weight [out, in] of one layer."""
    bits, rows, columns, size = layer["bits"], layer["out_features"], layer["in_features"], layer["group_size"]
    packed, scale = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"]
    shape = {-1: (1, 1), 0: (rows, 1)}.get(size) or (rows, columns // size)
    check(packed.dtype == np.uint8 and packed.shape == (rows, -(-columns * bits // 8)), f"{name}: packed weight")
    check(scale.dtype == np.float32 and scale.shape == shape and bool(np.isfinite(scale).all()), f"{name}: scales")
    codes = unpack(packed, bits, columns)
    check(bits != 2 or int(codes.max()) <= 2, f"{name}: ternary code 3")
    zero = np.float32(1 if bits == 2 else 1 << (bits - 1))
    if layer["zero"]:
        stored = tensors[f"{name}.weight_zero"]
        check(stored.dtype == np.uint8 and stored.shape == shape, f"{name}: zero points")
        zero = stored.astype(np.float32).reshape(-1, 1)
    lines = codes.astype(np.float32).reshape(scale.size, -1)
    weight: np.ndarray = ((lines - zero) * scale.reshape(-1, 1)).reshape(rows, columns)
    return weight


def check(good: bool, what: str) -> None:
    """Stop at anything that is not as the format says."""
    if not good:
        sys.exit(f"not a valid checkpoint: {what}")


def report(folder: Path) -> None:
    """One line per packed layer, and the sizes in all."""
    config, tensors = read_folder(folder)
    quantization = config.get("quantization_config") or {}
    check(quantization.get("quant_method") == "tsld_fx", "config.json has no quant_method tsld_fx")
    check(quantization.get("format_version") == 1, f"format_version {quantization.get('format_version')}")
    packed = dense = 0
    for name, layer in quantization["layers"].items():
        weight = dequantize(name, layer, tensors)
        parts = [tensors[f"{name}.{leaf}"] for leaf in ("weight_packed", "weight_scale")]
        parts += [tensors[f"{name}.weight_zero"]] if layer["zero"] else []
        packed, dense = packed + sum(part.nbytes for part in parts), dense + weight.nbytes
        rms = float(np.sqrt(np.square(weight, dtype=np.float64).mean()))
        print(f"{name:36} {layer['bits']} bits  {weight.shape!s:14} zeros {(weight == 0).mean():4.0%}  rms {rms:.4f}")
    print(f"{len(quantization['layers'])} packed layers: {packed} bytes, {dense / packed:.1f}x smaller than float32")


def main() -> None:
    if len(sys.argv) > 1:
        report(Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "packed"
        command = [sys.executable, "-m", "tsld_fx.cli", "convert", "demo", "--out", str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        report(folder)


if __name__ == "__main__":
    main()
