"""`tsld-fx export` and `tsld-fx build-ort-op`: ONNX files and the operator library for onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tsld_fx.cli.main import app

console = Console()


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a packed model, as tsld-fx convert writes it.")],
    out: Annotated[Path, typer.Argument(help="File NAME.onnx, or a folder for model.onnx and what belongs to it.")],
    dialect: Annotated[str, typer.Option(help="custom | ort | qdq")] = "custom",
    activations: Annotated[str, typer.Option(help="a16 (float activations) | int8 (faster, coarser)")] = "a16",
    kv_cache: Annotated[bool, typer.Option("--kv-cache", help="With past and present keys and values.")] = False,
    target_ort: Annotated[str | None, typer.Option(help="onnxruntime version that will read it, e.g. 1.28.")] = None,
    opset: Annotated[int | None, typer.Option(help="Opset to write (default: the oldest that will do).")] = None,
    verify: Annotated[bool, typer.Option(help="Run the file beside torch before it is put in place.")] = True,
) -> None:
    """Write a packed model as ONNX."""
    import torch

    from tsld_fx import checkpoint as checkpoints
    from tsld_fx.onnx.export import export_onnx

    lowered = checkpoints.load(checkpoint, backend="reference", dtype=torch.float32)
    file = export_onnx(
        lowered, out, dialect, kv_cache, activations, target_ort, verify, opset=opset, tokenizer=checkpoint
    )  # fmt: skip
    size = sum(f.stat().st_size for f in file.parent.glob(f"{file.name}*"))
    layers = lowered.lowbit_layers().values()
    console.print(f"{file}: {size / 1e6:.1f} MB, {len(layers)} packed layers, dialect {dialect}, {activations}")
    if verify:
        console.print("checked: onnxruntime gives torch's logits and keeps the weights packed")


@app.command(name="build-ort-op")
def build_ort_op(
    out: Annotated[Path, typer.Option("--out", "-o", help="Library to write, or a folder.")] = Path("libtsld_ort.so"),
    ort_include: Annotated[Path | None, typer.Option(help="Folder with onnxruntime_cxx_api.h.")] = None,
) -> None:
    """Build the operator library that runs `custom` files in onnxruntime with tsld_fx's CPU kernels."""
    from tsld_fx.onnx.op_library import build_op_library

    library = build_op_library(out, ort_include)
    console.print(f"{library}; SessionOptions.register_custom_ops_library({str(library)!r}) loads it")
